"""`patchbay harness ...`: lm-evaluation-harness, with `--model patchbay` known to it; all arguments are its own."""

from __future__ import annotations

import click


@click.command("harness", context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def harness(arguments: tuple[str, ...]) -> None:
    """Run lm-evaluation-harness: patchbay harness --model patchbay --model_args pretrained=NAME,knob=x.knob@2 --tasks NAME."""
    from patchbay.measure.lm_eval import main

    main(arguments)

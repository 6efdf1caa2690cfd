"""`patchbay compare MODEL --task TASK --knob A --knob B`: several knobs on the same prompts, as one table, one figure and one page."""

from __future__ import annotations

from typing import Any

import click

from patchbay.cli import complete, options, outputs, prompt_files, reading
from patchbay.cli.commands import json_option, load_model, make_task, model_options, task_options
from patchbay.cli.under import OTHER, fitting


def compare_command() -> click.Command:
    """The command, with the story's own docstring as its help."""

    def callback(
        model: str, knobs: tuple[str, ...], neutral: str | None, strengths: str, other_weights: bool, **given: Any
    ) -> None:
        outputs.refuse_to_replace(given)
        from patchbay.draw import screen

        loaded = load_model(model, given, quiet=given["as_json"])
        task = make_task(loaded, given)
        turned = [fitting(reading.read_knob(text), loaded, other_weights) for text in knobs]
        texts = None if neutral is None else prompt_files.read_texts(neutral, "--neutral")
        steps = reading.read(strengths, list[float], "--strengths", loaded)
        from patchbay.stories.compare import compare

        with screen.working(f"turning {len(turned)} knobs", quiet=given["as_json"]):
            made = {key: given[key] for key in ("cap", "draws", "seed", "batch_size")}
            result = compare(loaded, task, turned, texts, strengths=steps, **made)
        outputs.show(result, given)

    text = "\n\n".join(f"\b\n{paragraph}" for paragraph in options.doc("stories/compare").split("\n\n"))
    made: list[click.Parameter] = [
        click.Argument(["model"], shell_complete=complete.models),
        *task_options(()),
        click.Option(["--knob", "knobs"], multiple=True, required=True, metavar="FILE", help="A knob to compare; given twice or more."),
        click.Option(["--neutral"], metavar="FILE", help="Texts that have nothing to do with the task, for the side effects."),
        click.Option(["--strengths"], default="-2,-1,0,0.5,1,2,4", show_default=True, metavar="LIST", help="The strengths to turn each to."),
        click.Option(["--cap"], type=click.FloatRange(0, min_open=True), default=0.5, show_default=True,
                     help="Divergence on neutral text, in nats per token, up to which a strength is recommended."),
        click.Option(["--draws"], type=click.IntRange(0), default=3, show_default=True, help="Random knobs beside each."),
        click.Option(["--seed"], type=int, default=0, show_default=True, help="Of prompts, halves and random knobs."),
        click.Option(["--batch-size"], type=click.IntRange(1), default=32, show_default=True, help="Prompts that are run at a time."),
        OTHER,
        *model_options(),
        json_option(),
        *outputs.output_options(),
    ]  # fmt: skip
    return click.Command("compare", params=made, callback=callback, help=text, short_help="Several knobs on one page.")

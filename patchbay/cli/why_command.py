"""`patchbay why MODEL PROMPT`: the sections as they are made, then the page, the folder or the JSON document that were asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from patchbay.cli import complete, options, outputs
from patchbay.cli.commands import json_option, load_model, model_options


@contextmanager
def _streaming(quiet: bool) -> Iterator[None]:
    """Within the block each section is printed as it is made; the cost goes to stderr."""
    from patchbay.draw import screen
    from patchbay.results.arrays import with_values
    from patchbay.stories._why_told import Section, listening

    def hear(section: Section) -> None:
        if quiet:
            return
        if section.title == "cost":
            click.echo("\n".join(section.said), err=True)
        else:
            screen.say(*screen.shown(section.title, with_values(section.rows), section.said))

    with listening(hear):
        yield


def why_command() -> click.Command:
    """The command, with the story's own docstring as its help."""

    def callback(
        model: str, prompt: str, answer: str | None, against: str | None, draws: int, seed: int, **given: Any
    ) -> None:
        given["rows"] = None
        outputs.refuse_to_replace(given)
        quiet = given["as_json"]
        loaded = load_model(model, given, quiet=quiet)
        from patchbay.stories.why import why

        with _streaming(quiet):
            result = why(loaded, prompt, answer=_answer(answer), against=_answer(against), draws=draws, seed=seed)
        if quiet:
            outputs.show(result, given)
            return
        click.echo(f"\n{result.origin()}")
        for path in outputs.save(result, given):
            click.echo(f"saved {path}")

    text = "\n\n".join(f"\b\n{paragraph}" for paragraph in options.doc("stories/why").split("\n\n"))
    made: list[click.Parameter] = [
        click.Argument(["model"], shell_complete=complete.models),
        click.Argument(["prompt"]),
        click.Option(
            ["--answer"],
            metavar="TEXT",
            help="The token that is explained; #ID for an id. Without it the most likely one.",
        ),
        click.Option(
            ["--against"],
            metavar="TEXT",
            help="The token that it is held against. Without it the most likely other one.",
        ),
        click.Option(
            ["--draws"],
            type=click.IntRange(1),
            default=39,
            show_default=True,
            help="Random sets of parts in the causal check.",
        ),
        click.Option(["--seed"], type=int, default=0, show_default=True, help="Of random sets and shuffles."),
        *model_options(),
        json_option(),
        *(option for option in outputs.output_options() if option.name != "rows"),  # each section has its own
    ]
    return click.Command(
        "why", params=made, callback=callback, help=text, short_help="Why a model continues a prompt as it does."
    )


def _answer(text: str | None) -> str | int | None:
    """An answer as text, or #ID as an id."""
    return int(text[1:]) if text is not None and text[:1] == "#" and text[1:].isdecimal() else text

"""Knobs and edits of a command: what `--knob`, `--edit` and `--each` say, in force while it runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from patchbay.cli import reading
from patchbay.signal.port import PatchbayError

if TYPE_CHECKING:
    from patchbay import Knob, Model

OTHER = click.Option(
    ["--other-weights"], is_flag=True, help="Use a knob that was made on other weights; both are named."
)


def under_options() -> list[click.Parameter]:
    return [
        click.Option(["--knob", "knobs"], multiple=True, metavar="FILE[@S]", help="Turn a knob, to strength S; may be repeated."),
        click.Option(["--edit", "edits"], multiple=True, metavar="EDIT", help='Make an edit, as "scale(L3.H5.z, 0)"; may be repeated.'),
        click.Option(["--each"], is_flag=True, help="The first knob for the first prompt, and so on, as rows of one batch."),
        OTHER,
    ]  # fmt: skip


def fitting(knob: Knob, model: Model, other_weights: bool) -> Knob:
    """The knob for this model: as it is, or, where that was asked, moved from other weights with a note on stderr."""
    if not other_weights:
        knob.check(model)
        knob.fits(model)
        return knob
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        moved = knob.for_model(model)
    for one in said:
        click.echo(f"note: {one.message}", err=True)
    return moved


@contextmanager
def under(model: Model | None, given: Mapping[str, Any], prompts: Any) -> Iterator[None]:
    """The knobs and edits of a command in force; with `--each`, knob i for prompt i alone."""
    written = [*(given.get("knobs") or ()), *(given.get("edits") or ())]
    if given.get("each") and not given.get("knobs"):
        raise PatchbayError("--each is one knob for each prompt, and no --knob was given")
    if not written:
        yield
        return
    assert model is not None
    turned: list[Any] = [fitting(reading.read_knob(text), model, given["other_weights"]) for text in given["knobs"]]
    changes = [reading.read_edit(text, model) for text in given["edits"]]
    if given["each"]:
        from patchbay.knobs.rows import by_row

        n = len(model.encode(prompts))
        if len(turned) != n:
            raise PatchbayError(f"--each: {n} prompts and {len(turned)} knobs; give as many of both")
        turned = by_row(model, turned)
    with model.edited(*turned, *changes):
        yield

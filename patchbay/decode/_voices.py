"""Several laws for the next token of one text: the model's own, other models', and the model's own under knobs.

Another model reads the same tokens with a cache of its own. A knob is the same weights under more edits: one more row of the same
batch for each prompt, so that it costs tokens and no pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from patchbay.decode._loop import Call
from patchbay.edits.edit import Edit
from patchbay.knobs.knob import Knob
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError


def own_edits(call: Call, voice: Model | Knob | Any, name: str) -> list[Edit] | None:
    """The edits of a voice that is the model itself under a knob; None for another model. Raises PatchbayError for what is neither."""
    if isinstance(voice, Knob):
        voice.check(call.model)
        edits = voice.edits_at()
        for edit in edits:
            call.model.require(edit.port)
            if edit.by_row:
                raise PatchbayError(
                    f"{name}: {edit} names rows by itself; a knob that is turned for every prompt is needed"
                )
        return edits
    if not hasattr(voice, "hf"):
        found = type(voice).__name__
        raise PatchbayError(
            f"{name} takes a Model from patchbay.load(...) or a Knob, which is the same model turned; got {found}"
        )
    return [] if voice.hf is call.model.hf else None


class Voices:
    """Prompts of one length, read by the model and by others; a context manager as `Rows` are."""

    def __init__(
        self, call: Call, members: Sequence[int], others: Sequence[Model | Knob], beside: Sequence[Call | None]
    ) -> None:
        self.n = len(members)
        sides = [
            own_edits(call, other, "a voice") or [] for other, one in zip(others, beside, strict=True) if one is None
        ]
        side = [number for number in range(1 + len(sides)) for _ in members]
        self.rows = call.rows(list(members) * (1 + len(sides)), sides=sides, side=side)
        self.apart = [None if one is None else one.rows(members) for one in beside]
        self.n_sides = len(sides)

    def __enter__(self) -> Voices:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for rows in (self.rows, *(one for one in self.apart if one is not None)):
            rows.__exit__(kind, error, trace)

    @property
    def ids(self) -> Tensor:
        """The text so far [row, position]."""
        return self.rows.ids[: self.n]

    @property
    def of(self) -> list[int]:
        return self.rows.of[: self.n]

    def run(self, tokens: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Logits [row, vocab] of the next token by the model, and by each of the others."""
        more = None if tokens is None else tokens.repeat(1 + self.n_sides)
        own, *sides = self.rows.run(more).last.split(self.n)
        turned = iter(sides)
        others = [next(turned) if rows is None else rows.run(tokens).last.to(own.device) for rows in self.apart]
        return own, others

    def take(self, rows: Sequence[int]) -> None:
        """The rows of every voice become copies of these."""
        self.rows.take([side * self.n + row for side in range(1 + self.n_sides) for row in rows])
        for one in self.apart:
            if one is not None:
                one.take(rows)
        self.n = len(rows)


def calls_beside(call: Call, others: Sequence[Model | Knob], names: Sequence[str]) -> list[Call | None]:
    """The call of each voice that is another model, None for those that are the model itself."""
    return [
        call.beside(other) if own_edits(call, other, name) is None else None  # type: ignore[arg-type]
        for other, name in zip(others, names, strict=True)
    ]


def costs(beside: Sequence[Call | None]) -> dict[str, Any]:
    """What the other models cost, as scalars of a Result; nothing where there are none."""
    apart = [one for one in beside if one is not None]
    if not apart:
        return {}
    return {
        "other_calls": (sum(one.calls for one in apart), (), "passes"),
        "other_fed": (sum(one.fed for one in apart), (), "token positions"),
    }


def log_laws(laws: Sequence[Tensor]) -> list[Tensor]:
    return [torch.log_softmax(law, -1) for law in laws]

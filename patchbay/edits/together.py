"""Edits of single rows of a batch, at all of their positions: only what is edited is worked on, and edits that do the same to other parts
of other rows are one operation. Each number is that which one edit after another gives, to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchbay.edits.apply import apply, value_for
from patchbay.edits.edit import Edit

SETS = ("replace", "mean", "zero")  # what stood there before does not matter


@dataclass(eq=False)
class Together:
    """Edits of one operation at one signal, of parts (heads, neurons, experts) of rows, or of whole rows."""

    op: str
    edits: list[Edit]
    known: tuple[Tensor, ...] = field(default=(), repr=False)  # what `places` found
    known_of: tuple[object, ...] = field(default=(), repr=False)  # and of what

    def places(self, signal: Tensor) -> tuple[Tensor, ...]:
        """Rows, parts (none of whole rows), and values [place, 1, ...features] in the signal's dtype."""
        of = (signal.dtype, signal.device, *(_written(edit.value) for edit in self.edits))
        if self.known_of == of:
            return self.known
        rows = torch.tensor([row for edit in self.edits for row in edit.rows or ()], device=signal.device)
        parts = [edit.port.index for edit in self.edits for _ in edit.rows or () if edit.port.index is not None]
        values = []
        for edit in self.edits:
            n = len(edit.rows or ())
            part = signal[:n] if edit.port.index is None else signal[:n, :, edit.port.index]
            value = value_for(edit, part, None, torch.arange(n, device=signal.device))
            values.append(value.expand(n, 1, *part.shape[2:]))
        self.known = (rows, *([torch.tensor(parts, device=signal.device)] if parts else []), torch.cat(values))
        self.known_of = of
        return self.known

    def make(self, signal: Tensor) -> None:
        """Write what becomes of the edited places into `signal` [prompt, position, (part), ...]."""
        rows, *parts, value = self.places(signal)
        at = (rows, slice(None), parts[0]) if parts else (rows,)
        old = signal[at]  # [place, position, ...]
        if self.op == "add":
            signal[at] = old + value
        elif self.op == "scale":
            signal[at] = old * value
        else:
            signal[at] = value.expand_as(old)


def _written(value: object) -> int:
    """How often the numbers of a value have been written into: who lent it may go on changing it."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def plan(edits: Sequence[Edit]) -> list[Together] | None:
    """The edits of a signal, those of one operation together; None where one of them is no edit of rows alone, or two meet in one place."""
    whole = {edit.port.index is None for edit in edits}
    if len(edits) < 2 or len(whole) > 1 or not all(_joins(edit) for edit in edits):
        return None
    places = [(row, edit.port.index) for edit in edits for row in edit.rows or ()]
    if len(set(places)) < len(places):
        return None
    groups: dict[str, list[Edit]] = {}
    for edit in edits:
        groups.setdefault("set" if edit.op in SETS else edit.op, []).append(edit)
    return [Together(op, group) for op, group in groups.items()]


def _joins(edit: Edit) -> bool:
    by_position = edit.spread and not edit.same_everywhere
    return bool(edit.rows) and edit.where is None and edit.op in (*SETS, "add", "scale") and not by_position


def made(together: Sequence[Together], signal: Tensor) -> Tensor:
    """The signal with all of these made; `signal` stays as it is."""
    new = signal.clone()
    for one in together:
        one.make(new)
    return new


def in_rows(edit: Edit, signal: Tensor, row: Tensor, places: Tensor | None) -> Tensor:
    """The signal, edited at all positions of the edit's rows: `row` as from `row_mask`, `places` of these rows in their order, None where they
    are all of the batch."""
    if places is None:
        return apply(edit, signal, None, row.to(signal.device))
    at = places.to(signal.device)
    return signal.index_copy(0, at, apply(edit, signal[at], None, torch.arange(len(at), device=signal.device)))

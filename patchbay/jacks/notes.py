"""Where edits were made, as short notes: told token by token, worked out when somebody asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Note(NamedTuple):
    """That an edit was made at the columns `begin` to `end`; `ordinal` and `row` None: at all of them, in all rows."""

    begin: int
    end: int
    lengths: Tensor
    ordinal: Tensor | None = None
    row: Tensor | None = None
    column_of: Tensor | None = None

    @classmethod
    def of(cls, hit: Tensor) -> Note:
        """The note of positions that are known, bool [prompt, position]."""
        n, end = hit.shape
        return cls(0, end, torch.full((n,), end), hit.long() - 1)

    def repeated(self, n: int) -> Note:
        """Of one prompt, that of `n` copies of it."""

        def wide(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.expand(n, *x.shape[1:])

        lengths = self.lengths.expand(n)
        return self._replace(
            lengths=lengths, ordinal=wide(self.ordinal), row=wide(self.row), column_of=wide(self.column_of)
        )

    def goes_on(self, row: Tensor | None) -> bool:
        """Whether all columns after these, in the same rows, are no other note."""
        return self.ordinal is None and self.row is row and self.column_of is None


def hit(notes: Sequence[Note], n: int) -> Tensor:
    """Where the noted edit was made, bool [prompt, position]; `n` prompts run now, and notes of other batches are no more."""
    found = torch.zeros(n, max((note.end for note in notes), default=0), dtype=torch.bool)
    for note in notes:
        if len(note.lengths) != n:
            continue
        place = torch.arange(note.begin, note.end).expand(n, -1)  # [prompt, column]
        if note.column_of is not None:
            place = note.column_of[:, note.begin : note.end]
        made = (place >= 0) & (place < note.lengths[:, None].cpu())
        if note.ordinal is not None:
            made = made & (note.ordinal[:, : place.shape[1]] >= 0)
        if note.row is not None:
            made = made & (note.row >= 0)[:, None]
        prompt, column = made.nonzero(as_tuple=True)
        found[prompt, place[prompt, column]] = True
    return found

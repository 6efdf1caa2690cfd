"""Many prompts, each with its own knobs, as rows of one batch: the model runs once, and no row touches another.

`by_row` gives the edits: those that do the same at the same port, with other numbers, become one edit with a value for each
row, so that sixteen steering vectors at one layer cost one addition. A row without a knob keeps its logits to the last bit.
Within a row, edits of one signal act in the order in which its knobs and their edits were given.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence, Set
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from patchbay.edits.edit import Edit
from patchbay.model.generate import Asked, groups, returned
from patchbay.model.given import flat_edits
from patchbay.model.model import Model
from patchbay.model.text import read
from patchbay.signal.port import PatchbayError

MERGED = ("add", "scale", "replace", "mean")  # a projector has no row axis, and zero has no value


def by_row(model: Model, knobs: Sequence[Any]) -> list[Edit]:
    """Edits that turn entry i of `knobs` on prompt i alone. An entry is a knob, an edit, several of them, or None for none."""
    groups: dict[tuple[int, Hashable], list[tuple[int, Edit]]] = defaultdict(list)
    for row, entry in enumerate(knobs):
        seen: dict[tuple[str, int | None], int] = defaultdict(int)  # signal -> edits of this row there so far
        for edit in flat_edits([] if entry is None else [entry], model=model):
            if edit.by_row:
                raise PatchbayError(f"{edit} names rows by itself; an edit of one row is given without")
            model.require(edit.port)
            place = seen[edit.port.signal, edit.port.layer]
            seen[edit.port.signal, edit.port.layer] += 1
            groups[place, _kind(edit, row)].append((row, edit))
    return [_together(model, groups[key]) for key in sorted(groups, key=lambda key: key[0])]


def generate_rows(
    model: Model,
    prompts: Any,
    knobs: Sequence[Any],
    max_new_tokens: int | None = None,
    *,
    note: Callable[[int, int], None] | None = None,
    new_only: bool = False,
    **options: Any,
) -> Any:
    """Continue prompt i under entry i of `knobs`, all as rows of one batch; prompts of one length run together.

    Returns what `model.generate` does. `note(row, token)` is told of each new token as it comes; `options` go to
    transformers' generate.
    """
    given = read(model, prompts)
    encoded, asked = given.ids, Asked(model, options)
    if len(encoded) != len(knobs):
        raise PatchbayError(
            f"{len(encoded)} prompts and {len(knobs)} knobs: one for each prompt, None where it has none"
        )
    by_row(model, knobs)  # refuses what does not fit before anything runs
    out: list[list[int]] = [[] for _ in encoded]
    for members in groups(encoded, asked.alone):
        heard: dict[str, Any] = {} if note is None else {"streamer": _Heard(members, note, asked.ends)}
        edits = by_row(model, [knobs[i] for i in members])
        grown = model.generate([encoded[i] for i in members], max_new_tokens, edits=edits, **heard, **options)
        for i, row in zip(members, grown, strict=True):
            out[i] = row
    return returned(model, given, out, new_only)


class _Heard:
    """What transformers' generate tells of tokens, prompt first; passed on row by row."""

    def __init__(self, members: Sequence[int], note: Callable[[int, int], None], ends: Set[int]) -> None:
        self.members, self.note, self.ends, self.begun = members, note, ends, False
        self.going = set(members)  # a row that has ended is padded until the last one has

    def put(self, tokens: Tensor) -> None:
        if self.begun:
            for row, token in zip(self.members, tokens.flatten().tolist(), strict=True):
                if row in self.going:
                    self.note(row, int(token))
                if token in self.ends:
                    self.going.discard(row)
        self.begun = True

    def end(self) -> None:
        self.begun = False


def _kind(edit: Edit, row: int) -> Hashable:
    """Edits of one kind differ by their numbers alone and become one; all others stay apart."""
    masks = any(isinstance(where, Tensor) for where in (edit.positions, edit.keys))
    if edit.op not in MERGED or edit.spread or masks:
        return (row, edit.op, str(edit.port))
    dtype = str(edit.value.dtype) if isinstance(edit.value, Tensor) else "number"
    return (edit.op, edit.port, repr(edit.positions), dtype, edit.where)


def _together(model: Model, group: Sequence[tuple[int, Edit]]) -> Edit:
    """One edit of several rows, its value [row, 1, ...features]."""
    rows = tuple(row for row, _ in group)
    first = group[0][1]
    if len(group) == 1:
        return replace(first, rows=rows)
    n_features = len(first.port.axes) - 2
    values = [torch.as_tensor(edit.value, dtype=None if isinstance(edit.value, Tensor) else torch.float64)
              for _, edit in group]  # fmt: skip
    values = [value.reshape((1,) * (n_features - value.ndim) + value.shape) for value in values]
    return replace(first, value=torch.stack(torch.broadcast_tensors(*values))[:, None], rows=rows)

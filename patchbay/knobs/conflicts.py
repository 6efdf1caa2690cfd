"""Where the order of knobs that are used together matters. Proved on their edits, not on a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from patchbay.edits.edit import Edit
from patchbay.signal.positions import Role


class Turned(Protocol):
    """A knob, as far as it matters here: its name, and the edits that it makes at a strength."""

    @property
    def name(self) -> str: ...

    def edits_at(self, strength: float | None = None) -> list[Edit]: ...


class KnobConflict(UserWarning):
    """Knobs that are used together and whose order matters."""


def conflicts(*knobs: Turned, strengths: Sequence[float | None] | None = None) -> list[str]:
    """Where the order of these knobs matters, in words; nothing where they give the same in every order.

    Knobs add up in the order given: at one port, each edits what those before it left. The order matters where two knobs edit
    one signal, at positions and rows that may be the same, by operations that do not commute, such as adding and then
    scaling. Edits of different signals act in the order of the forward pass whatever the order of the knobs.
    """
    at = list(strengths) if strengths is not None else [None] * len(knobs)
    turned = [(knob.name, knob.edits_at(s)) for knob, s in zip(knobs, at, strict=True)]
    found = []
    for i, (first, before) in enumerate(turned):
        for second, after in turned[i + 1 :]:
            pair = next(((a, b) for a in before for b in after if _meet(a, b) and not _commute(a, b)), None)
            if pair is not None:
                found.append(
                    f"knobs {first!r} and {second!r} do not commute: {pair[0]} acts first, then {pair[1]}, the order in which "
                    "they were given; turned round, they give something else"
                )
    return found


def _meet(a: Edit, b: Edit) -> bool:
    """Whether two edits may touch the same entry of a signal."""
    same = (a.port.signal, a.port.layer) == (b.port.signal, b.port.layer)
    if not same or (None not in (a.port.index, b.port.index) and a.port.index != b.port.index):
        return False
    if a.rows is not None and b.rows is not None and not set(a.rows) & set(b.rows):
        return False
    one, two = a.positions, b.positions
    if isinstance(one, Role) and isinstance(two, Role) and one != two:
        return False
    listed = [_listed(positions) for positions in (one, two)]
    if listed[0] is not None and listed[1] is not None:
        signs = {at < 0 for positions in listed for at in positions or ()}
        return len(signs) > 1 or bool(set(listed[0]) & set(listed[1]))
    for left, right in ((one, listed[1]), (two, listed[0])):  # those listed are in the prompt
        if isinstance(left, str) and left == "generated" and right is not None:
            return False
    return {one, two} != {"last", "generated"} if isinstance(one, str) and isinstance(two, str) else True


def _listed(positions: Any) -> tuple[int, ...] | None:
    """Positions within the prompt one by one, where that can be said without it; "last" is -1."""
    if isinstance(positions, str):
        return (-1,) if positions == "last" else None
    if isinstance(positions, int):
        return (positions,)
    if isinstance(positions, slice) and positions.stop is not None:
        start = positions.start or 0
        return tuple(range(start, positions.stop, positions.step or 1)) if start >= 0 < positions.stop else None
    return positions if isinstance(positions, tuple) else None


def _commute(a: Edit, b: Edit) -> bool:
    """Whether two edits of the same entries give the same in either order: proved on data, not on a run."""
    if "block" in (a.op, b.op) or (a.op == b.op and a.op in ("add", "scale", "zero")):
        return True  # a pattern is cut before it is changed, in any order
    if a.op == b.op and a.op in ("replace", "mean"):
        return a == b
    first, second = sorted((a, b), key=lambda edit: edit.op)  # add mean project replace scale zero
    if first.op == "project" == second.op:
        return _close(_times(first.value, second.value), _times(second.value, first.value))
    if {first.op, second.op} <= {"project", "scale", "zero"}:  # linear; a number or nothing commutes with a matrix
        return first.op != "project" or not isinstance(second.value, Tensor) or not second.value.ndim
    if "project" in (first.op, second.op):  # what is added or set lies in what stays
        matrix, put = (first, second) if first.op == "project" else (second, first)
        return isinstance(put.value, Tensor) and _close(_times(put.value, matrix.value), put.value)
    return False


def _times(value: Any, matrix: Any) -> Tensor:
    return torch.as_tensor(value).double() @ torch.as_tensor(matrix).double()


def _close(a: Any, b: Any) -> bool:
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-6 * b.abs().max().clamp(min=1e-12))

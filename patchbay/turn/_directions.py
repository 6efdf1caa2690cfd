"""Directions given as a tensor, or as a knob whose vectors are meant."""

from __future__ import annotations

import torch
from torch import Tensor

from patchbay import maths
from patchbay.errors import PatchbayError
from patchbay.knobs.knob import Knob


def basis_of(directions: Tensor | Knob) -> Tensor:
    """[direction, feature]: a tensor as it is, or an orthonormal basis of what a knob adds or sets."""
    return _vectors(directions) if isinstance(directions, Knob) else torch.atleast_2d(directions.detach())


def _vectors(knob: Knob) -> Tensor:
    """An orthonormal basis of the vectors that a knob adds or sets, [direction, feature]."""
    found = [
        edit.value.flatten(0, -2) if edit.value.ndim > 1 else edit.value[None]
        for edit in knob.edits
        if edit.op in ("add", "replace", "mean") and isinstance(edit.value, Tensor) and edit.value.ndim
    ]
    if not found or len({rows.shape[1] for rows in found}) > 1:
        widths = ", ".join(str(rows.shape[1]) for rows in found) or "none"
        raise PatchbayError(f"knob {knob.name}: it adds or sets vectors of widths {widths}; one width is needed")
    return maths.orthonormal(torch.cat(found))

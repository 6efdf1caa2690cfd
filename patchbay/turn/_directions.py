"""Directions given as a tensor, or as a knob whose vectors are meant; and edits that let nothing write one."""

from __future__ import annotations

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits import edit
from patchbay.edits.edit import Edit
from patchbay.errors import PatchbayError
from patchbay.knobs.knob import Knob
from patchbay.model.model import Model
from patchbay.signal.port import Port


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


def unwritten(model: Model, basis: Tensor, layers: list[int] | None = None) -> list[Edit]:
    """Edits that take the span of `basis` [direction, d_model] out of what the blocks of these layers write; without layers, out of
    the embedding and what all write."""
    ports = [Port("embed")] if layers is None else []
    for i in range(model.n_layers) if layers is None else layers:
        ports += [Port(signal, i) for signal in ("attn.out", "mlp.out") if signal in model.signals(i)]
    return [edit.project(port, basis) for port in ports]

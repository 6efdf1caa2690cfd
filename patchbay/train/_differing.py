"""Differing: which features of a crosscoder of two models are one model's own.

R_i = |d_2i| / (|d_1i| + |d_2i|)
fitted_si = sum_t z_ti (e_st + z_ti d_si) . d_i / (sum_t z_ti^2 |d_i|^2)       d_i: the longer of its two rows; e_s: what is left of model s

By R alone what is shared can look like one model's own: its row in the other is short where another feature says the same there. Then what
the others leave of that model still has the direction, and `fitted` is near 1 for both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchbay.features.dictionary import Dictionary

OWN = 0.9  # the R from which a feature is one model's own, if the other's fitted length is less than 1 - OWN of it


def compared(it: Dictionary, read: Tensor, written: Tensor) -> dict[str, Any]:
    """R and fitted lengths of features, and their rows, as variables."""
    assert it.decoders is not None
    rows = torch.stack([it.decoders[0], it.W_dec]).double()  # [model, feature, d]
    norms = rows.norm(dim=2)
    relative = norms[1] / norms.sum(0).clamp_min(1e-12)
    longer = torch.where((norms[1] > norms[0])[:, None], rows[1], rows[0])
    z = it.encode(read).double()
    error = (written.double() - it.rebuilt(it.encode(read), read).double()).unflatten(1, (2, -1))  # [token, model, d]
    power = z.pow(2).sum(0) * longer.pow(2).sum(1)
    fitted = [
        (torch.einsum("tf,td,fd->f", z, error[:, s], longer) + z.pow(2).sum(0) * (rows[s] * longer).sum(1)) / power
        for s in (0, 1)
    ]
    seen = torch.where(power > 0, torch.stack(fitted), torch.nan)
    density = (z > 0).double().mean(0)
    return {
        "relative": (relative.cpu(), ("feature",), "share"),
        "fitted": (seen.cpu(), ("condition", "feature"), "ratio"),
        "density": (density.cpu(), ("feature",), "share of tokens"),
        "row": (rows.float().cpu(), ("condition", "feature", "d_model"), "stream"),
    }


def alone(relative: Tensor, fitted: Tensor) -> str:
    """How many features are one model's own by both, and by R alone, as a sentence."""
    told = []
    for s, name in ((0, "the first model"), (1, "the other")):
        by_rows = (relative > OWN) if s else (relative < 1 - OWN)
        both = by_rows & (fitted[1 - s].abs() < (1 - OWN) * fitted[s].abs().clamp_min(1e-12))
        told.append(f"{int(both.sum())} of {name} alone ({int(by_rows.sum())} by their rows only)")
    return "features: " + ", ".join(told)

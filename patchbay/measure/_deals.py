"""p of a rank correlation by dealing one side anew."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from patchbay.maths import mean_ranks

EXACT = 7  # things
DEALS = 2000


def dealt_p(a: Tensor, b: Tensor, seed: int) -> float:
    """Two-sided p of Spearman's correlation, by every order of up to EXACT things, else by DEALS random ones."""
    n = len(a)
    if n <= EXACT:
        order = torch.tensor(list(itertools.permutations(range(n))))  # [deal, thing]
    else:
        order = torch.rand(DEALS, n, generator=torch.Generator().manual_seed(seed)).argsort(1)
    first, second = (ranks - ranks.mean() for ranks in (mean_ranks(a.double()), mean_ranks(b.double())))
    hits = int(((second[order] @ first).abs() >= abs(float(first @ second)) - 1e-9).sum())
    return hits / len(order) if n <= EXACT else (1 + hits) / (1 + len(order))

"""Points put into cells around centres: k-means, started from points that lie apart."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS, ROWS = 30, 4096  # rounds at most; rows that are compared with all centres at a time


def cells(x: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The cell of each row of x [row, d], and the centres [cell, d]. A cell that loses all its rows keeps its centre."""
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    near = (x - x[chosen[0]]).square().sum(1)
    for _ in range(count - 1):  # each next one with chance in proportion to its squared distance
        total = near.double().cumsum(0)
        drawn = torch.rand(1, generator=generator, dtype=torch.float64).to(total.device) * total[-1]
        chosen.append(min(int(torch.searchsorted(total, drawn, right=True)), len(x) - 1))
        near = torch.minimum(near, (x - x[chosen[-1]]).square().sum(1))
    centres, found = x[chosen].clone(), torch.full((len(x),), -1, device=x.device)
    for _ in range(STEPS):
        nearest = nearest_cell(x, centres)
        if torch.equal(nearest, found):
            break
        found = nearest
        sizes = torch.bincount(found, minlength=count)
        means = torch.zeros_like(centres).index_add_(0, found, x) / sizes.clamp(min=1)[:, None]
        centres = torch.where(sizes[:, None] > 0, means, centres)
    return found, centres


def nearest_cell(x: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre of each row, the first of equals."""
    return torch.cat([apart(block, centres).argmin(1) for block in x.split(ROWS)])


def apart(x: Tensor, centres: Tensor) -> Tensor:
    """Distances of rows from centres [row, cell]; what all centres have in common is taken off first, since it would eat the digits."""
    shared = centres.mean(0)
    return torch.cdist(x - shared, centres - shared)

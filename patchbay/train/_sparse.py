"""Sparse AdamW: after every step each matrix keeps its largest entries, and the others are 0.

    share(t) = keep^min(1, t / over)        W <- W on its round(share(t) x entries) largest |W|, 0 elsewhere; at least 1 entry

in the t-th step: from all entries the share falls, by one factor a step, to `keep` after `over` steps. AdamW's moments go on behind the zeros, so that an entry comes back where
its step is larger than what is kept. Of equal entries the first in memory are kept, so that the count is exact. Vectors (biases, norms) stay dense; tied tables are one matrix.

Gao et al. 2025, "Weight-sparse transformers have interpretable circuits", whose largest entries are counted by matrix too. A sparse matrix is stored dense here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patchbay.errors import PatchbayError


@dataclass(frozen=True)
class Sparse:
    """The share of entries that stay, and after how many steps no more do."""

    keep: float = 0.1
    over: int = 100

    def check(self) -> None:
        if not 0 < self.keep <= 1 or self.over < 0:
            raise PatchbayError(f"sparse: keep={self.keep}, over={self.over}: above 0 and up to 1, 0 steps or more")


def share(step: int, keep: float, over: int) -> float:
    """Of the entries of a matrix, how many are kept after a step, counted from 1."""
    return float(keep ** min(1.0, step / over)) if over else keep


def kept(n: int, part: float) -> int:
    """Entries of n that a share leaves, at least one."""
    return max(1, round(part * n))


@torch.no_grad()
def only_largest(weight: Tensor, n: int) -> None:
    """Set all but the n largest entries by size to 0, in place; of equals the first stay."""
    size = weight.abs().flatten()
    order = size.sort(descending=True, stable=True).indices
    weight.view(-1)[order[n:]] = 0.0


def nonzero(model: nn.Module) -> float:
    """The share of entries of all matrices that are not 0; a tied matrix counts once."""
    matrices = [one for one in model.parameters() if one.ndim >= 2]
    return sum(int(one.count_nonzero()) for one in matrices) / sum(one.numel() for one in matrices)


class SparseAdamW(torch.optim.AdamW):
    """AdamW with `keep` of the entries of each matrix, reached in `over` steps."""

    def __init__(self, params: Any, lr: float = 1e-3, keep: float = 0.1, over: int = 100, **options: Any) -> None:
        super().__init__(params, lr=lr, **options)
        for group in self.param_groups:
            group.update(keep=keep, over=over)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = super().step(closure)
        for group in self.param_groups:
            for one in group["params"]:
                if one.ndim >= 2 and one in self.state:
                    at = int(self.state[one]["step"])
                    only_largest(one, kept(one.numel(), share(at, group["keep"], group["over"])))
        return loss  # type: ignore[no-any-return]

"""Chance: how sure a mean and a rank correlation are. Pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from patchbay import maths


def standard_error(values: Tensor) -> Tensor:
    """Of the mean of values [prompt, *cell] over prompts; NaN with fewer than two prompts."""
    return values.std(0) / len(values) ** 0.5 if len(values) > 1 else torch.full_like(values[0], torch.nan)


def rank_agreement(a: Tensor, b: Tensor, *, draws: int = 1000, seed: int = 0) -> dict[str, float]:
    """Spearman of two lists where both have a value: `rho`, its bootstrap `low` and `high`, `p` and `null_high`.

    p (that a random order agrees as well or better) and null_high (the 95th percentile) come from random orders of b;
    all are NaN with fewer than three pairs, or where either list is constant.
    """
    both = a.isfinite() & b.isfinite()
    a, b = a[both].double().cpu(), b[both].double().cpu()
    nan = float("nan")
    rho = maths.spearman(a, b) if len(a) >= 3 else nan
    if rho != rho:
        return {"rho": nan, "low": nan, "high": nan, "p": nan, "null_high": nan}
    generator = torch.Generator().manual_seed(seed)
    orders = torch.rand(draws, len(b), generator=generator).argsort(1)  # [draw, pair]
    null = _rows_correlation(_ranks(a).expand(draws, -1), _ranks(b)[orders])
    picks = torch.randint(len(a), (draws, len(a)), generator=generator)
    boot = _rows_correlation(_ranks(a[picks]), _ranks(b[picks]))
    low, high = torch.nanquantile(boot, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    p = (1 + int((null >= rho - 1e-9).sum())) / (1 + draws)
    return {"rho": rho, "low": low, "high": high, "p": p, "null_high": float(null.quantile(0.95))}


def _ranks(values: Tensor) -> Tensor:
    """Ranks along the last axis, from 0; equal values share their mean rank."""
    below = (values[..., :, None] > values[..., None, :]).double().sum(-1)
    same = (values[..., :, None] == values[..., None, :]).double().sum(-1)
    return below + (same - 1.0) / 2.0


def _rows_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of each row; NaN where one is constant."""
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    scale = a.norm(dim=-1) * b.norm(dim=-1)
    return (a * b).sum(-1) / torch.where(scale > 0, scale, torch.nan)

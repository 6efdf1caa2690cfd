"""Chance: how sure a mean and a rank correlation are. Pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from patchbay import maths


def standard_error(values: Tensor) -> Tensor:
    """Of the mean of values [prompt, *cell] over prompts; NaN with fewer than two prompts."""
    return values.std(0) / len(values) ** 0.5 if len(values) > 1 else torch.full_like(values[0], torch.nan)


def rank_agreement(
    each_a: Tensor, each_b: Tensor, *, sizes: bool = False, draws: int = 1000, seed: int = 0
) -> dict[str, float]:
    """Spearman of two means over the same prompts (`sizes`: of their absolute values), of values [prompt, part].

    `rho`, `low` and `high`, `p` and `null_high`.

    The parts are all there are and are not drawn: the ends come from prompts drawn anew, for both lists together (NaN with one
    prompt). p (that a random order agrees as well or better) and null_high (the 95th percentile) come from random orders of b. All
    are NaN with fewer than three parts that have both, or where either list is constant.
    """
    both = each_a.isfinite().all(0) & each_b.isfinite().all(0)
    each_a, each_b = each_a[:, both].double().cpu(), each_b[:, both].double().cpu()  # [prompt, part]
    a, b = each_a.mean(0), each_b.mean(0)
    a, b = (a.abs(), b.abs()) if sizes else (a, b)
    nan = float("nan")
    rho = maths.spearman(a, b) if len(a) >= 3 else nan
    if rho != rho:
        return {"rho": nan, "low": nan, "high": nan, "p": nan, "null_high": nan}
    generator = torch.Generator().manual_seed(seed)
    orders = torch.rand(draws, len(b), generator=generator).argsort(1)  # [draw, pair]
    null = _rows_correlation(_ranks(a).expand(draws, -1), _ranks(b)[orders])
    count = len(each_a)
    picks = torch.randint(count, (draws, count), generator=generator)
    again = [torch.stack([each[some].mean(0) for some in picks]) for each in (each_a, each_b)]  # [draw, part]
    boot = _rows_correlation(*(_ranks(each.abs() if sizes else each) for each in again))
    low, high = torch.nanquantile(boot, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    low, high = (low, high) if count > 1 else (nan, nan)
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

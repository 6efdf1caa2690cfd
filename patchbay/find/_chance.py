"""Chance: p values of many parts at once, and how sure a rank correlation is. Pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from patchbay import maths

ROOM = 2**22  # numbers held at a time


def sign_flip_p(values: Tensor, *, floor: float = 1e-6, n: int = 2000, seed: int = 0) -> Tensor:
    """Two-sided p [*cell] that the mean of values [prompt, *cell] is 0, by flipping each prompt's sign.

    Values no larger than `floor` are rounding and count as 0. Exact up to `n` patterns of signs, else (1 + hits) / (1
    + n). A cell without any value has p NaN; prompts without one do not count.
    """
    count, shape = len(values), values.shape[1:]
    flat = values.detach().double().cpu().reshape(count, -1)  # [prompt, cell]
    empty = flat.isnan().all(0)
    flat = flat.nan_to_num(0.0)
    flat = torch.where(flat.abs() <= floor, 0.0, flat)
    exact = 2**count <= n
    if exact:
        signs = 1.0 - 2.0 * ((torch.arange(2**count)[:, None] >> torch.arange(count)) & 1).double()
    else:
        generator = torch.Generator().manual_seed(seed)
        signs = 1.0 - 2.0 * torch.randint(2, (n, count), generator=generator).double()  # [draw, prompt]
    seen = flat.sum(0).abs() - 1e-9 * flat.abs().sum(0)  # sums in another order still count as equal
    step = max(1, ROOM // len(signs))
    hits = [((signs @ flat[:, i : i + step]).abs() >= seen[i : i + step]).sum(0) for i in range(0, flat.shape[1], step)]
    found = torch.cat(hits).double() if hits else flat.new_zeros(0)
    p = found / len(signs) if exact else (1.0 + found) / (1.0 + n)
    return p.masked_fill(empty, torch.nan).reshape(shape)


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

"""Which activations are kept while a dictionary is trained, and what it then needs to choose alike without its batch.

A budget of n k activations is shared out over a batch of n tokens: k for each token (topk), the largest of all (batchtopk, which is Mutual
Choice), or a number for each feature (feature_choice), by Zipf's law of its rank, which is that of how often Mutual Choice would keep it: were it of
what the law itself lets a feature keep, the first ranks would stay for ever. Ties go by place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchbay.train import _together

ZIPF = 0.7  # s, where none is given
STEEPEST = 20.0  # that a law is fitted


def kept(form: str, value: Tensor, k: int, density: Tensor, zipf: float = ZIPF) -> Tensor:
    """Of activations [token, feature] those that the form keeps, bool; `density` [feature]: what ranks features; `zipf`: s."""
    n, n_features = value.shape
    if form == "topk":
        return torch.zeros_like(value, dtype=torch.bool).scatter(
            1, value.topk(min(k, n_features), dim=1).indices, True
        ) & (value > 0)
    rank, processes = _together.world()
    if form == "batchtopk":  # of the whole batch, which the processes share; of equal ones the first
        budget = min(n * k, value.numel()) * processes
        least = _together.cut(value, budget)
        above, equal = value > least, value == least
        total, _ = _together.counted(above.sum())
        _, before = _together.counted(equal.sum())
        order = equal.flatten().cumsum(0).view_as(value) + before
        return (above | (equal & (order <= budget - total))) & (value > 0)
    whole = _together.columns(value) if processes > 1 else value
    ranks = whole.argsort(dim=0, descending=True, stable=True).argsort(
        dim=0
    )  # [token, feature]: 0 is the largest of its feature
    found: Tensor = (ranks < shares(density, len(whole), k, zipf)[None].to(value.device))[rank * n :][:n]
    return found & (value > 0)


def law(density: Tensor, zipf: float) -> Tensor:
    """Zipf's law of each feature's rank by density, float64 [feature], of sum 1; the same for all where `zipf` is 0."""
    density = density.cpu()
    weight = torch.empty(len(density), dtype=torch.float64)
    rank = torch.arange(1, len(density) + 1, dtype=torch.float64)
    weight[density.argsort(descending=True, stable=True)] = rank**-zipf
    return weight / weight.sum()


def shares(density: Tensor, n: int, k: int, zipf: float = ZIPF) -> Tensor:
    """How many tokens each feature may keep, int64 [feature]: n k in all, at most n each, by Zipf's law of its rank by density."""
    weight = law(density, zipf)
    budget = min(n * k, n * len(weight))
    counts = (weight * budget).floor().clamp(max=n)
    left = int(budget - counts.sum())
    while left > 0:
        room = (counts < n).nonzero()[:, 0]
        first = room[weight[room].argsort(descending=True, stable=True)][:left]
        counts[first] += 1
        left -= len(first)
    return counts.long()


def shortfall(density: Tensor, k: int, zipf: float, ranks: Tensor) -> Tensor:
    """By how much of it each feature is below its density under the law, by `ranks`, where all are k a token: 0 to 1, [feature]."""
    target = (law(ranks, zipf) * k).clamp(max=1.0).to(density)
    return (1 - density / target).clamp_min(0.0)


def exponent(counts: Tensor) -> float:
    """s of the law r^-s by which features are used `counts` [feature] times, by maximum likelihood: the mean log rank of a use is the law's."""
    ranked = counts.double().sort(descending=True).values
    place = torch.arange(1, len(ranked) + 1, dtype=torch.float64).log()
    seen = float((ranked * place).sum() / ranked.sum())
    low, high = 0.0, STEEPEST
    for _ in range(60):
        s = (low + high) / 2
        said = float(((-s * place).softmax(0) * place).sum())
        low, high = (s, high) if said > seen else (low, s)
    return (low + high) / 2


class Jump(torch.autograd.Function):
    """pre where it is above theta, and whether it is: [token, feature] each. Thresholds learn by pseudo-gradients of width h (Rajamanoharan
    et al. 2024, "Jumping Ahead"): -(theta / h) rect((pre - theta) / h) through the activation, -(1 / h) rect through the count."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor, h: float) -> tuple[Tensor, Tensor]:
        on = pre > theta
        ctx.save_for_backward(pre, theta, on)
        ctx.h = h
        return torch.where(on, pre, 0.0), on.to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor, Tensor, None]:
        through, counted = given
        pre, theta, on = ctx.saved_tensors
        near = ((pre - theta).abs() < ctx.h / 2).to(pre.dtype) / ctx.h
        return through * on, (-(theta * near * through) - near * counted).sum(0), None

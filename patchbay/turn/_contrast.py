"""Contrast pairs: what two groups of prompts differ by at one place of a model, and how well one direction tells them apart.

A direction is fitted on streams of the positive and the negative prompts, [pair, d_model] each, and scaled by the gap between
the group means along it: added once, it takes the negative mean to the positive one, along that direction.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.signal.port import Port

Way = Literal["mean", "pca", "probe"]
WAYS = ("mean", "pca", "probe")


def streams(model: Model, prompts: list[list[int]], ports: list[Port], batch_size: int) -> Tensor:
    """The signals at each prompt's last position, float64 [port, prompt, d_model]."""
    out = torch.zeros(len(ports), len(prompts), model.d_model, dtype=torch.float64)
    for start in range(0, len(prompts), batch_size):
        piece = prompts[start : start + batch_size]
        trace = run(model, piece, taps=ports, logits="last")
        for i, port in enumerate(ports):
            out[i, start : start + len(piece)] = trace.last(port).double().cpu()
    return out


def direction(positive: Tensor, negative: Tensor, way: str) -> Tensor:
    """A vector [d_model] from the negative to the positive group, as long as the gap between their means along it."""
    difference = positive.mean(0) - negative.mean(0)
    if way == "mean":
        return difference
    found = _pca(positive - negative) if way == "pca" else _probe(positive, negative)
    gap = difference @ found
    return found * gap  # the sign of a component or of a probe that fits badly follows the means


def _pca(differences: Tensor) -> Tensor:
    """The unit vector along which paired differences [pair, d_model] are largest; their mean is part of them."""
    return torch.linalg.svd(differences, full_matrices=False).Vh[0]


def _probe(positive: Tensor, negative: Tensor) -> Tensor:
    """The unit normal of a logistic regression with a ridge, fitted with L-BFGS from 0: no chance in it."""
    x, y = torch.cat([positive, negative]), torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).double()
    x = x - x.mean(0)
    x = x / x.pow(2).mean().sqrt().clamp(min=1e-12)
    with torch.enable_grad():
        w = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
        fit = torch.optim.LBFGS([w], max_iter=40, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            fit.zero_grad()
            value = torch.nn.functional.binary_cross_entropy_with_logits(x @ w[:-1] + w[-1], y)
            value = value + 0.5 * w[:-1].pow(2).sum() / len(x)
            value.backward()
            return value

        fit.step(loss)
    normal = w.detach()[:-1]
    return normal / normal.norm().clamp(min=1e-12)


def apart(positive: Tensor, negative: Tensor) -> Tensor:
    """Area under the ROC curve of every pair's projections [..., pair]: the share of positives above negatives, ties half."""
    ranked, asked = negative.sort(-1).values, positive.contiguous()
    below = torch.searchsorted(ranked, asked) + torch.searchsorted(ranked, asked, right=True)  # twice, ties once
    return below.double().mean(-1) / (2 * negative.shape[-1])

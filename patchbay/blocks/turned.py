"""Turned queries and keys: what a head makes of the angles between them, learned for each pair of channels.

With q_c = |q|_c e^(i t_c) the c-th pair of a head's query that rotation turns together, k likewise, and rotation by m g_c at place m,

    s_mn = sum_c |q|_c |k|_c cos(D_c (t^q_c - t^k_c) + b_c + (m - n) g_c) / sqrt(d_head)

As cos(a - b) splits, that is a plain dot product of |q|(cos, sin)(D t^q + b) and |k|(cos, sin)(D t^k), turned by rotation as ever: a map of each token's query and key before rotation, and
the fused kernel, caches and all ports stay. D = 1, b = 0 is the plain model. D and b are two knobs for every pair: D = 0 in one head leaves places alone to decide.

Shao et al. 2025, "ComplexFormer: Disruptively Advancing Transformer Inference Ability via Head-Specific Complex Vector Attention".

The angle jumps where it crosses pi, and with it what D that are no whole numbers make of it; at length 0 it has no gradient, so that a small length is added there. D is one for every query head, so that every head
needs keys of its own. Queries and keys are then no matrix times the stream: weights by head are refused by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LEAST = 1e-12  # squared length under which a pair has no angle: it is given that of (1, 0)


def turned(x: Tensor, D: Tensor, b: Tensor | None) -> Tensor:
    """x [..., head, d_head], channels c and c + d_head / 2 a pair: its length kept, its angle times D [head, d_head / 2], plus b.

    In float32 or better: squares of float16 overflow, and an angle of eight bits is another.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    real, imaginary = x.to(dtype).chunk(2, -1)
    squared = real.square() + imaginary.square()
    none = squared < LEAST
    length = torch.where(none, 0.0, torch.where(none, 1.0, squared).sqrt())
    angle = torch.atan2(torch.where(none, 0.0, imaginary), torch.where(none, 1.0, real)) * D
    angle = angle if b is None else angle + b
    return torch.cat([length * angle.cos(), length * angle.sin()], -1).to(x.dtype)


class Turned(nn.Module):
    """The query map of a layer, its angles turned; the layer's keys are turned by `TurnedKeys`, with the same D."""

    def __init__(self, inner: nn.Module, n_heads: int, d_head: int, *, bend: bool = True) -> None:
        super().__init__()
        self.inner, self.n_heads = inner, n_heads
        self.D: Tensor
        if bend:
            self.D = nn.Parameter(torch.ones(n_heads, d_head // 2))
        else:  # a buffer: nothing that trains parameters moves it
            self.register_buffer("D", torch.ones(n_heads, d_head // 2))
        self.b = nn.Parameter(torch.zeros(n_heads, d_head // 2))

    def forward(self, x: Tensor) -> Tensor:
        return turned(self.inner(x).unflatten(-1, (self.n_heads, -1)), self.D, self.b).flatten(-2)


class TurnedKeys(nn.Module):
    """The key map, turned by the D of the layer's queries."""

    def __init__(self, inner: nn.Module, queries: Turned) -> None:
        super().__init__()
        self.inner = inner
        self.__dict__["queries"] = queries  # no part of this module: its D is saved once

    def forward(self, x: Tensor) -> Tensor:
        queries: Any = self.__dict__["queries"]
        return turned(self.inner(x).unflatten(-1, (queries.n_heads, -1)), queries.D, None).flatten(-2)

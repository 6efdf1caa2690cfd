"""Subspaces that show trees: many probes on the same states at once, each with its own trees, by Adam from one start.

States x [text, leaf, width] go through z = x B, B [width, rank]. Of constituents (Hernandez Lopez et al. 2022)

    d^_i = |z_(i+1) - z_i|^2        c_i ~ softmax((z_(i+1) - z_i) C)        u_i ~ softmax(z_i U)
    loss = mean over texts of the mean of relu(1 - (d^_i - d^_j)) over pairs with d_i > d_j
           + cross-entropy of c + cross-entropy of u + 5 |B^T B - I|^2

and of dependencies (Hewitt and Manning 2019), mean over texts of sum_(i,j) | |z_i - z_j|^2 - edges between i and j | / n^2. What is beyond a
text's own leaves does not count. A frozen problem keeps B as it began, orthonormal and random, and learns C and U.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RATE = 1e-2  # of Adam, falling to 0 in a straight line
ORTHOGONAL = 5.0
TEXTS = 32  # of a step


class Constituents(NamedTuple):
    """Targets of every problem: d and c [problem, text, leaf - 1], u [problem, text, leaf]; -1 for what does not count."""

    d: Tensor
    c: Tensor
    u: Tensor
    n_c: int
    n_u: int


class Fitted(NamedTuple):
    """B [problem, width, rank], C [problem, rank, label], U [problem, rank, label]."""

    B: Tensor
    C: Tensor
    U: Tensor


def start(width: int, rank: int, generator: torch.Generator) -> Tensor:
    """Orthonormal columns, float64 [width, rank]."""
    return torch.linalg.qr(torch.randn(width, rank, generator=generator, dtype=torch.float64))[0]


def fit(x: Tensor, target: Constituents | Tensor, frozen: Tensor, rank: int, steps: int, seed: int) -> Fitted:
    """All problems of one layer: x [text, leaf, width]; target of constituents, or edges between words [problem, text, leaf, leaf]."""
    generator = torch.Generator().manual_seed(seed)
    n = len(frozen)
    n_c, n_u = (target.n_c, target.n_u) if isinstance(target, Constituents) else (0, 0)
    began = start(x.shape[-1], rank, generator)
    B = began.expand(n, -1, -1).clone().requires_grad_()
    C = torch.zeros(n, rank, n_c, dtype=torch.float64, requires_grad=True)
    U = torch.zeros(n, rank, n_u, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([B, C, U], lr=RATE, foreach=False)
    with torch.enable_grad():
        for step in range(steps):
            rows = torch.randperm(len(x), generator=generator)[:TEXTS]
            adam.param_groups[0]["lr"] = RATE * (1.0 - step / steps)
            adam.zero_grad()
            z = projected(x[rows], B)
            if isinstance(target, Constituents):
                some = Constituents(target.d[:, rows], target.c[:, rows], target.u[:, rows], n_c, n_u)
                loss = constituent_loss(z, some, B, C, U)
            else:
                loss = distance_loss(z, target[:, rows])
            loss.sum().backward()  # type: ignore[no-untyped-call]
            if B.grad is not None:
                B.grad[frozen] = 0.0
            adam.step()
    return Fitted(B.detach(), C.detach(), U.detach())


def projected(x: Tensor, B: Tensor) -> Tensor:
    """z [problem, text, leaf, rank] of states [text, leaf, width]."""
    flat = x.reshape(-1, x.shape[-1]) @ B.permute(1, 0, 2).flatten(1)  # [text leaf, problem rank]
    return flat.reshape(*x.shape[:-1], len(B), B.shape[-1]).movedim(-2, 0)


def heights(z: Tensor) -> Tensor:
    """d^ [..., leaf - 1] of z [..., leaf, rank]."""
    return z.diff(dim=-2).square().sum(-1)


def between(z: Tensor) -> Tensor:
    """|z_i - z_j|^2 [..., leaf, leaf]."""
    size = z.square().sum(-1)
    return (size[..., :, None] + size[..., None, :] - 2.0 * z @ z.transpose(-1, -2)).clamp_min(0.0)


def constituent_loss(z: Tensor, target: Constituents, B: Tensor, C: Tensor, U: Tensor) -> Tensor:
    """The loss of every problem, [problem]."""
    d = heights(z)  # [problem, text, leaf - 1]
    real = target.d >= 0
    higher = (target.d[..., :, None] > target.d[..., None, :]) & real[..., :, None] & real[..., None, :]
    hinge = torch.relu(1.0 - (d[..., :, None] - d[..., None, :])) * higher
    order = (hinge.sum((-1, -2)) / higher.sum((-1, -2)).clamp_min(1)).mean(-1)
    eye = torch.eye(B.shape[-1], dtype=B.dtype)
    loose = (B.transpose(-1, -2) @ B - eye).square().sum((-1, -2))
    labels = _cross_entropy(z.diff(dim=-2), C, target.c) + _cross_entropy(z, U, target.u)
    return order + labels + ORTHOGONAL * loose


def _cross_entropy(z: Tensor, W: Tensor, label: Tensor) -> Tensor:
    """Mean -log p of the labels that count, [problem]."""
    likely = (z @ W[:, None]).log_softmax(-1)
    real = label >= 0
    own = likely.gather(-1, label.clamp_min(0)[..., None])[..., 0] * real
    return -own.sum((-1, -2)) / real.sum((-1, -2)).clamp_min(1)


def distance_loss(z: Tensor, target: Tensor) -> Tensor:
    """The loss of every problem, [problem]; pairs beyond a text are negative in the target."""
    real = target >= 0
    wrong = ((between(z) - target).abs() * real).sum((-1, -2))
    return (wrong / real.sum((-1, -2)).clamp_min(1)).mean(-1)

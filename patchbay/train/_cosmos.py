"""COSMOS: Adam in the leading directions of a matrix's gradients, and Newton-Schulz on what is left.

For W [m, n] with gradient G, rank R, e the running step:
    M <- b1 M + G;  N = (G + b1 M) / (1 + b1 c),  c = (1 - b1^t) / (1 - b1)
    P <- QR(b2 P S + (1 - b2) G^T G P), S <- b2 P'^T P S P^T P' + (1 - b2) P'^T G^T G P'   (P, S from the SVD of G^T G at first)
    V <- b2 V + (1 - b2) (G P)^2
    step = (N P / sqrt V^) P^T + .2 sqrt(m n) unit(NS5(N - N P P^T)), scaled to norm sqrt(m n) lr ratio
What is no matrix of a linear map takes Adam (`_optimizers`). State: m n + m R + n R + R^2 numbers against Adam's 2 m n, which is less only where (m + R)(n + R) < 2 m n.

Liu et al. 2025, "COSMOS: A Hybrid Adaptive Optimizer". The residual is taken for 0 where it is below 1e-4 of N: at R = n rounding alone is
left of it, which Newton-Schulz would blow up to a step of full size (cosine to the right step .905 in place of 1).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchbay.errors import PatchbayError
from patchbay.train._states import Resumed, wide

GUARD = 1e-4  # a residual below this share of the momentum is rounding
NS5 = (3.4445, -4.7750, 2.0315)


def newton_schulz(x: Tensor, steps: int = 5) -> Tensor:
    """A matrix with the singular directions of x and singular values near 1: 0.68 to 1.14 where they are 0.0075 of the norm of x or more."""
    a, b, c = NS5
    wide = x.shape[0] <= x.shape[1]
    y = (x if wide else x.T) / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = y @ y.T
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y if wide else y.T


@dataclass(frozen=True)
class Split:
    """How many leading directions of a matrix Adam takes, all where it has no more, and how large the whole step is beside the rate."""

    rank: int = 16
    ratio: float = 0.2

    def check(self) -> None:
        if self.rank < 1 or not 0 < self.ratio < float("inf"):
            raise PatchbayError(f"cosmos: rank={self.rank}, ratio={self.ratio}: 1 or more, above 0")


class Cosmos(Resumed):
    """`rank` leading directions by rotated Adam, the rest by Newton-Schulz; the whole step has norm sqrt(m n) lr `ratio`. Of parameters in `among` (their ids; None: all matrices),
    and Adam on all others."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        rank: int = 16,
        ratio: float = 0.2,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        among: frozenset[int] | None = None,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "rank": rank, "ratio": ratio, "weight_decay": weight_decay, "eps": eps}
        )
        self.among = among

    def move(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                g, whole = wide(p.grad), p.ndim == 2 if self.among is None else id(p) in self.among
                update = direction(g, state, group) if whole else _adam(g, state, group)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(update * group["lr"])


def _adam(g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    b1, b2 = group["betas"]
    for name, value, b in (("m", g, b1), ("v", g.square(), b2)):
        state[name] = torch.zeros_like(g) if name not in state else state[name]
        state[name].mul_(b).add_(value, alpha=1 - b)
    t = state["step"]
    step: Tensor = (state["m"] / (1 - b1**t)) / ((state["v"] / (1 - b2**t)).sqrt() + group["eps"])
    return step


def direction(g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """The step of a matrix before the learning rate, of norm sqrt(m n) ratio."""
    b1, b2 = group["betas"]
    (m, n), t = g.shape, state["step"]
    rank = min(group["rank"], n)
    state["M"] = g.clone() if "M" not in state else state["M"].mul_(b1).add_(g)
    _turned(g, state, b2, rank)
    read = g @ state["P"]  # [m, rank]
    state["V"] = torch.zeros_like(read) if "V" not in state else state["V"]
    state["V"].mul_(b2).add_(read.square(), alpha=1 - b2)
    smooth = (g + b1 * state["M"]) / (1 + b1 * (1 - b1**t) / (1 - b1))
    inside = smooth @ state["P"]
    step = (inside / ((state["V"] / (1 - b2**t)).sqrt() + group["eps"])) @ state["P"].T
    rest = smooth - inside @ state["P"].T
    if rest.norm() > GUARD * smooth.norm():
        whitened = newton_schulz(rest)
        step = step + 0.2 * (m * n) ** 0.5 * whitened / whitened.norm()
    return step * ((m * n) ** 0.5 * group["ratio"] / (step.norm() + group["eps"]))


def _turned(g: Tensor, state: dict[str, Any], b2: float, rank: int) -> None:
    """The leading directions P [n, rank] of gradients so far, and their covariance S [rank, rank] in them."""
    if "P" not in state:
        state["P"] = torch.linalg.svd(g, full_matrices=False).Vh[:rank].T.contiguous()
        if state["P"].shape[1] < rank:  # fewer rows than directions: the rest of an orthonormal basis
            state["P"] = torch.linalg.qr(
                torch.cat([state["P"], torch.eye(len(state["P"]), dtype=g.dtype, device=g.device)], 1)
            ).Q[:, :rank]
        gp = g @ state["P"]
        state["S"] = (1 - b2) * gp.T @ gp
        return
    old = state["P"]
    state["P"] = torch.linalg.qr(b2 * old @ state["S"] + (1 - b2) * g.T @ (g @ old)).Q
    turn, gp = state["P"].T @ old, g @ state["P"]
    state["S"] = b2 * turn @ state["S"] @ turn.T + (1 - b2) * gp.T @ gp

"""A law of losses by size and by the weight of a language in training: how many weights of a model of one language a share of it is worth.

    L_i(N, p) = b_{p,i} N^{-a_i} + c_i,   a and c of a language shared by all mixtures;   f(p) = (b_1 / b_p)^{1/a}

p is the weight of language i, 1 that of a model which reads it alone: a model of N weights in the mixture does what one of f N weights does alone, whatever N. Given a, the law is linear
in the b and c: a alone is searched, by golden section, and the rest is least squares with c at least 0.

Fernandes et al. 2023, "Scaling Laws for Multilingual Neural Machine Translation": a mixture moves the factor b alone. Under five sizes no ends are given: three numbers of
a curve are fitted to as many points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchbay.errors import PatchbayError

FEW = 5  # sizes, under which ends say nothing
EXPONENTS = (0.01, 3.0)  # between which a is sought


@dataclass(frozen=True)
class Law:
    """`a`, `c`, `b` by weight, and `worth` f by weight, with 95 % ends of a and of each f where there are sizes enough (else None)."""

    a: float
    c: float
    b: Mapping[float, float]
    worth: Mapping[float, float]
    a_ends: tuple[float, float] | None
    worth_ends: Mapping[float, tuple[float, float]] | None

    def loss(self, size: float, weight: float) -> float:
        """What the law says of a size and one of the weights that it was fitted to."""
        return self.b[weight] * size**-self.a + self.c


def fit(losses: Mapping[float, Sequence[float]], sizes: Sequence[float], *, draws: int = 200, seed: int = 0) -> Law:
    """The law of one language. `losses`: by its weight in training, nats at each of the `sizes`; the weight 1 has to be among them.

    Ends are of `draws` fits to the law's own values with residuals of the fit drawn anew.
    """
    weights, x = sorted(losses), torch.tensor([float(n) for n in sizes], dtype=torch.float64)
    if (
        1.0 not in losses
        or len(set(sizes)) < 3
        or min(sizes) <= 0
        or any(len(losses[p]) != len(sizes) for p in weights)
    ):
        raise PatchbayError(
            f"a law needs the weight 1 among its weights ({weights}) and, of each, a loss at every one of three sizes or more ({list(sizes)})"
        )
    y = torch.tensor([list(losses[p]) for p in weights], dtype=torch.float64)  # [weight, size]
    if not bool(y.isfinite().all()):
        raise PatchbayError("a law of losses that are no numbers")
    at = weights.index(1.0)
    a, b, c = _fitted(x, y)
    _refuse_flat(b, weights)
    worth = _worth(a, b, at)
    ends = None
    if len(set(sizes)) >= FEW:
        said = b[:, None] * x[None] ** -a + c
        left, draw = (y - said).flatten(), torch.Generator().manual_seed(seed)
        left = (
            left * (left.numel() / max(1, left.numel() - len(weights) - 2)) ** 0.5
        )  # what was fitted took a part of it
        again = [_fitted(x, said + left[torch.randint(left.numel(), said.shape, generator=draw)]) for _ in range(draws)]
        drawn = torch.stack(
            [torch.cat([torch.tensor([one]).double(), _worth(one, other, at)]) for one, other, _ in again]
        )
        ends = [
            (float(low), float(high)) for low, high in torch.quantile(drawn, torch.tensor([0.025, 0.975]).double(), 0).T
        ]
    return Law(
        a, c, dict(zip(weights, b.tolist(), strict=True)), dict(zip(weights, worth.tolist(), strict=True)),
        ends[0] if ends else None, dict(zip(weights, ends[1:], strict=True)) if ends else None,
    )  # fmt: skip


def _fitted(x: Tensor, y: Tensor) -> tuple[float, Tensor, float]:
    """a, b [weight] and c of least squared error."""
    low, high = (torch.tensor(e).log() for e in EXPONENTS)
    grid = torch.linspace(float(low), float(high), 32, dtype=torch.float64).exp().tolist()
    errors = [_linear(x, y, a)[2] for a in grid]
    best = min(range(len(grid)), key=errors.__getitem__)
    left, right = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
    ratio = (5**0.5 - 1) / 2
    for _ in range(36):
        one, two = right - ratio * (right - left), left + ratio * (right - left)
        left, right = (left, two) if _linear(x, y, one)[2] < _linear(x, y, two)[2] else (one, right)
    a = (left + right) / 2
    b, c, _ = _linear(x, y, a)
    return a, b, c


def _linear(x: Tensor, y: Tensor, a: float) -> tuple[Tensor, float, float]:
    """b, c and the squared error of the least squares at one a; c = 0 where it would fall below."""
    power = (x / x[0]) ** -a  # of the order of 1
    # minimise over b_p and one c: eliminate b_p = <power, y_p - c> / <power, power>
    square = power.square().sum()
    rest = 1 - power * (power.sum() / square)  # the constant less its part along the power
    c = float(
        ((y - (y @ power / square)[:, None] * power) @ rest).sum() / (len(y) * rest.square().sum()).clamp_min(1e-300)
    )
    c = max(0.0, c)
    b = (y - c) @ power / square
    error = float((y - b[:, None] * power - c).square().sum())
    return b * float(x[0]) ** a, c, error


def _worth(a: float, b: Tensor, at: int) -> Tensor:
    return (b[at] / b) ** (1 / a)


def _refuse_flat(b: Tensor, weights: Sequence[float]) -> None:
    wrong = [p for p, one in zip(weights, b.tolist(), strict=True) if one <= 0]
    if wrong:
        raise PatchbayError(f"losses do not fall with size at weights {wrong}: there is no law of them")

"""The rotation null of composition scores, in closed form, with exact draws to check it by.

A score is X = tr(A O G O^T) / (tr A tr G), A = P^T P the writer's and G = F F^T the reader's d x d matrix and O = 1. Under the
null O is a random orthogonal matrix: both spectra are kept, the alignment is destroyed. Rotations act irreducibly on
symmetric matrices of trace 0, so that with A0 = A - tr A / d and G0 likewise, exactly

    E X = 1 / d,    Var X = 2 |A0|^2 |G0|^2 / ((d - 1)(d + 2)),
    E (X - E X)^3 = 8 d tr(A0^3) tr(G0^3) / ((d - 2)(d - 1)(d + 2)(d + 4)),    all over (tr A tr G)^(its power).

Nothing is sampled and no pair costs more than its three numbers. A p value is the upper tail of the gamma distribution with
these three moments (Pearson's type III). `drawn` draws X itself: with a and g the eigenvalues and B the block of a random
orthogonal matrix between the two subspaces (the first rows of the Q of a Gaussian d x rank matrix, which is Haar), X =
sum a_i g_j B_ij^2. The closed form is exact in its moments and close in its tail; tests hold it against draws.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NARROW = 1e-4  # skewness below which the tail is the normal one
# shapes of the gamma from which its cube root counts as normal (Wilson and Hilferty): its upper tail is then within a sixth
# down to p = 1e-3 and too large beyond, its lower tail, of which a negative skew makes the upper one, within a half to 1e-6
SHARP, ROUND = 1.0, 16.0


def moments(a: Tensor, g: Tensor, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and third central moment of X for every writer and reader: [writer, reader], from the traces [n, 3] of
    their matrices, their squares and cubes."""
    a2, a3 = _traceless(a, d)
    g2, g3 = _traceless(g, d)
    mean = torch.full((len(a), len(g)), 1.0 / d, dtype=torch.float64, device=a.device)
    if d < 3:
        return mean, 2 * torch.outer(a2, g2) / max(1, (d - 1) * (d + 2)), torch.zeros_like(mean)
    variance = 2 * torch.outer(a2, g2) / ((d - 1) * (d + 2))
    third = 8 * d * torch.outer(a3, g3) / ((d - 2) * (d - 1) * (d + 2) * (d + 4))
    return mean, variance, third


def _traceless(traces: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """|A0|^2 and tr A0^3 of A / tr A, from tr A, tr A^2 and tr A^3."""
    one, two, three = traces.double().unbind(-1)
    two, three = two / one**2, three / one**3
    return (two - 1 / d).clamp_min(0), three - 3 * two / d + 2 / d**2


def of_score(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the score sqrt(X), X taken as a gamma with this mean and variance."""
    shape = mean**2 / variance.clamp_min(1e-300)
    few = shape.clamp_max(1e4)
    ratio = torch.exp(torch.lgamma(few + 0.5) - torch.lgamma(few)) / few.sqrt()  # E sqrt(X) / sqrt(E X)
    ratio = torch.where(shape > 1e4, 1 - 1 / (8 * shape), ratio)
    spread = torch.where(shape > 1e4, 1 / (4 * shape), 1 - ratio**2).clamp_min(1e-300)
    return mean.sqrt() * ratio, mean.sqrt() * spread.sqrt()


def upper_tail(x: Tensor, mean: Tensor, variance: Tensor, third: Tensor) -> Tensor:
    """P(X >= x) under the null, in float64."""
    deviation = variance.clamp_min(1e-300).sqrt()
    z = (x.double() - mean) / deviation
    skew = third / deviation**3
    shape = 4 / skew.abs().clamp_min(NARROW) ** 2
    z, skew, shape = torch.broadcast_tensors(z, skew, shape)
    y = (shape + skew.sign() * z * shape.sqrt()).clamp_min(0)  # a gamma of this shape; a negative skew counts downwards
    sign = torch.where(skew < 0, -1.0, 1.0)
    cube = ((y / shape) ** (1 / 3) - (1 - 1 / (9 * shape))) * 3 * shape.sqrt() * sign
    p = _normal_tail(torch.where(skew.abs() < NARROW, z, cube))
    above, below = (skew >= NARROW) & (shape < SHARP), (skew <= -NARROW) & (shape < ROUND)
    if bool(above.any()):
        p[above] = torch.special.gammaincc(shape[above], y[above])
    if bool(below.any()):
        p[below] = torch.special.gammainc(shape[below], y[below])
    return p


def _normal_tail(z: Tensor) -> Tensor:
    return 0.5 * torch.special.erfc(z / math.sqrt(2.0))


def drawn(a: Tensor, g: Tensor, d: int, n: int, generator: torch.Generator) -> Tensor:
    """X at `n` random rotations, from the eigenvalues of A and G that are not 0: [n], in float64."""
    a, g = (a, g) if len(a) <= len(g) else (g, a)
    out = torch.empty(n, dtype=torch.float64)
    weights = torch.outer(g, a).cpu() / (a.sum() * g.sum()).cpu()
    for i in range(n):
        gaussian = torch.randn(d, len(a), generator=generator, dtype=torch.float64)
        block = torch.linalg.qr(gaussian)[0][: len(g)]  # [g, a]: rows of an orthonormal frame, signs do not matter
        out[i] = (weights * block.square()).sum()
    return out

"""What finders of neurons share in statistics: average precision over ties, Welch's t, Student's two-sided p."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-6  # of the values' size: a spread below this is rounding of float32 runs, not variance
STEPS = 400  # of the continued fraction; it converges in about the square root of the degrees of freedom


def average_precision(scores: Tensor, positive: Tensor) -> Tensor:
    """Expected average precision of each row of `scores` [row, item] for the positive items [item], over orders of ties.

    Items are taken from the highest score down; AP is the mean over positives of the share of positives at and before
    them. Where scores are equal every order is as good, and the expectation over all of them is exact: in a group of n
    items with p positives that begins after N items with P positives, the j-th is positive with probability p / n, and
    P + 1 + (j - 1) (p - 1) / (n - 1) positives stand there if it is.
    """
    ranked, order = scores.double().sort(dim=1, descending=True)  # [row, item]
    hits = positive.double().to(scores.device)[order].cumsum(1)
    n = scores.shape[1]
    place = torch.arange(n, device=scores.device).expand_as(order)
    changes = torch.ones_like(order, dtype=torch.bool)
    changes[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    first = torch.where(changes, place, 0).cummax(1).values  # of each item's group of equals
    ends = torch.ones_like(changes)
    ends[:, :-1] = changes[:, 1:]
    last = torch.where(ends, place, n).flip(1).cummin(1).values.flip(1)
    before = torch.where(first > 0, hits.gather(1, (first - 1).clamp_min(0)), 0.0)
    inside, size = hits.gather(1, last) - before, (last - first + 1).double()
    expected = before + 1.0 + (place - first) * (inside - 1.0) / (size - 1.0).clamp_min(1.0)
    return (inside / size * expected / (place + 1)).sum(1) / positive.sum()


def random_average_precision(n: int, n_positive: int, draws: int, seed: int) -> Tensor:
    """Average precision of `draws` random orders of n items of which n_positive are positive, sorted upwards."""
    generator = torch.Generator().manual_seed(seed)
    block, found = max(1, 2**22 // n), []
    for done in range(0, draws, block):
        order = torch.rand(min(block, draws - done), n, generator=generator).argsort(1)
        positive = (order < n_positive).double()  # [draw, item]
        precision = positive.cumsum(1) / torch.arange(1, n + 1)
        found.append((precision * positive).sum(1) / n_positive)
    return torch.cat(found).sort().values


def welch(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Welch's t of mean(a) - mean(b) and its degrees of freedom, by column of a and b [sample, ...].

    A spread that is no more than rounding is taken as that, so that columns which hardly vary give a finite t; two
    equal constants give 0.
    """
    mean_a, mean_b = a.double().mean(0), b.double().mean(0)
    share_a, share_b = a.double().var(0) / len(a), b.double().var(0) / len(b)
    least = (ROUNDING * torch.maximum(mean_a.abs(), mean_b.abs())).square() / (len(a) + len(b))
    square = torch.maximum(share_a + share_b, least)
    t = torch.where(mean_a == mean_b, 0.0, (mean_a - mean_b) / square.sqrt())
    parts = share_a.square() / (len(a) - 1) + share_b.square() / (len(b) - 1)
    df = (share_a + share_b).square() / parts
    return t, torch.where(parts > 0, df, float(len(a) + len(b) - 2)).where(t.isfinite(), torch.nan)


def student_p(t: Tensor, df: Tensor) -> Tensor:
    """Two-sided p of Student's t: the regularised incomplete beta function I_x(df / 2, 1 / 2) at x = df / (df + t^2)."""
    t, df = torch.broadcast_tensors(t.double(), df.double())
    a, b, x = df / 2, torch.full_like(df, 0.5), df / (df + t.square())
    turned = x > (a + 1) / (a + b + 2)  # where the fraction converges slowly, 1 - I_(1 - x)(b, a)
    a, b = torch.where(turned, b, a), torch.where(turned, a, b)
    rest = t.square() / (df + t.square())  # 1 - x without its rounding
    x, rest = torch.where(turned, rest, x), torch.where(turned, x, rest)
    front = torch.exp(torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b) + a * x.log() + b * rest.log()) / a
    value = (front * _fraction(a, b, x)).where(x > 0, 0.0)
    return torch.where(turned, 1.0 - value, value).clamp(0.0, 1.0).where(t.isfinite() & df.isfinite(), torch.nan)


def _fraction(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """The continued fraction of the incomplete beta function, by Lentz's method."""
    tiny = 1e-300

    def away(value: Tensor) -> Tensor:  # from zero
        return torch.where(value.abs() < tiny, tiny, value)

    c = torch.ones_like(x)
    d = 1.0 / away(1.0 - (a + b) * x / (a + 1.0))
    out = d
    for m in range(1, STEPS):
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1.0) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1.0)),
        ):
            d = 1.0 / away(1.0 + step * d)
            c = away(1.0 + step / c)
            factor = c * d
            out = out * factor
        if bool(((factor - 1.0).abs() < 1e-15).all()):
            break
    return out

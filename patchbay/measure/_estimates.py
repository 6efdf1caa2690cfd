"""Estimates that meters make of their items: ranking, calibration, maxima of samples, agreement, and how sure any of them is.

Pure functions of tensors, in float64. One number per item goes in (a confidence, a score, a label of 0 or 1), one number comes
out; NaN where there is none to give (labels of one class, constant scores). `resampled` gives the interval of any of them, over items
or over groups of items that belong together, and `exchanged` the p that two readings of the same items are alike. Every draw
comes from a generator of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from patchbay.errors import PatchbayError
from patchbay.maths import Interval, mean_ranks

Estimate = Callable[[Tensor], float]  # of [item, ingredient]
NAN = float("nan")


# --- ranking ----------------------------------------------------------------------------------------


def auroc(scores: Tensor, labels: Tensor) -> float:
    """Area under the receiver operating characteristic: the share of (1, 0) pairs in which the 1 scores higher, ties half."""
    scores, labels = _pair(scores, labels)
    ones = int(labels.sum())
    zeros = len(labels) - ones
    if not ones or not zeros:
        return NAN
    return (float(mean_ranks(scores)[labels == 1].sum()) - ones * (ones - 1) / 2) / (ones * zeros)


def partial_auroc(scores: Tensor, labels: Tensor, most: float = 0.01) -> float:
    """The area up to a false positive rate of `most`, standardised (McClish 1989): 1 at best, 0.5 by chance."""
    scores, labels = _pair(scores, labels)
    ones, zeros = float(labels.sum()), float((1 - labels).sum())
    if not ones or not zeros or not 0 < most <= 1:
        return NAN
    cuts = scores.unique().flip(0)  # highest first: tied items enter together
    found = [(scores >= cut).double() for cut in cuts]
    rates = [(0.0, 0.0), *((float(x @ (1 - labels)) / zeros, float(x @ labels) / ones) for x in found)]
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(rates):
        if x0 >= most or x1 == x0:
            continue
        end = min(x1, most)
        area += (end - x0) * (y0 + (y0 + (y1 - y0) * (end - x0) / (x1 - x0))) / 2
    least = most * most / 2
    return 0.5 * (1 + (area - least) / (most - least))


def matthews(labels: Tensor, said: Tensor) -> float:
    """Matthews correlation of labels of 0 and 1 with what was said of them, in [-1, 1]; NaN where either is constant."""
    labels, said = _pair(labels, said)
    a, b = labels - labels.mean(), said - said.mean()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale else NAN


# --- calibration ------------------------------------------------------------------------------------


def calibration_error(confidence: Tensor, right: Tensor, bins: int = 10) -> float:
    """Expected calibration error: the mean gap of accuracy and confidence over `bins` bins of equally many items. Equal
    confidences share a bin, that of their middle rank."""
    confidence, right = _pair(confidence, right)
    _unit(confidence, "confidences")
    n = len(confidence)
    of = (mean_ranks(confidence) * bins / n).floor().long().clamp(max=bins - 1)  # [item]
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, of, right - confidence)
    return float(gaps.abs().sum()) / n


def selective_area(confidence: Tensor, right: Tensor) -> float:
    """Mean over i of the accuracy among the i most confident items; those of equal confidence stay in their order."""
    confidence, right = _pair(confidence, right)
    order = confidence.argsort(descending=True, stable=True)
    return float((right[order].cumsum(0) / torch.arange(1, len(right) + 1)).mean())


def selective_accuracy(confidence: Tensor, right: Tensor, share: float = 0.1) -> float:
    """Accuracy among the int(share n) + 1 most confident items."""
    confidence, right = _pair(confidence, right)
    order = confidence.argsort(descending=True, stable=True)
    return float(right[order[: int(share * len(right)) + 1]].mean())


# --- maxima of samples ------------------------------------------------------------------------------


def expected_maximum(values: Tensor, k: int) -> float:
    """Mean over all subsets of `k` of the values of their maximum: unbiased for the expected maximum of k draws."""
    ordered = torch.as_tensor(values).double().flatten().sort().values
    return float(ordered @ _weights(len(ordered), k))


def any_of(n_hits: int, n: int, k: int) -> float:
    """Share of the subsets of k of n samples that hold at least one of the hits: unbiased for 1 - (1 - p)^k."""
    _subset(n, k)
    return 1.0 - math.comb(n - n_hits, k) / math.comb(n, k)


@cache
def _weights(n: int, k: int) -> Tensor:
    """Share of the subsets of k whose maximum is the i-th smallest value, [n]."""
    _subset(n, k)
    whole = math.comb(n, k)
    return torch.tensor([math.comb(i, k - 1) / whole for i in range(n)], dtype=torch.float64)


def _subset(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise PatchbayError(f"the best of k={k} of n={n} samples: k lies in 1 to n")


# --- agreement and fits -----------------------------------------------------------------------------


def kappa(table: Sequence[Sequence[float]]) -> float:
    """Cohen's kappa of a table of counts [first rater's class, second rater's class]: agreement beyond that of the margins."""
    counts = torch.as_tensor(table, dtype=torch.float64)
    total = counts.sum()
    seen = counts.diagonal().sum() / total
    chance = float((counts.sum(0) * counts.sum(1)).sum() / total**2)
    return float((seen - chance) / (1 - chance)) if chance < 1 else NAN


def logistic(inputs: Tensor, labels: Tensor, ridge: float = 1e-3) -> Tensor:
    """Coefficients [..., 1 + input], the intercept first, of logistic fits of labels of 0 and 1 [..., item] to inputs [..., item, input];
    `ridge` times half their squares (not the intercept's) is added to the mean loss. Newton's steps until they no longer move them."""
    x = torch.cat([torch.ones(*inputs.shape[:-1], 1, dtype=torch.float64), inputs.double()], -1)
    y, n = labels.double(), inputs.shape[-2]
    penalty = ridge * torch.eye(x.shape[-1], dtype=torch.float64)
    penalty[0, 0] = 0.0
    fit = torch.zeros(*x.shape[:-2], x.shape[-1], dtype=torch.float64)
    for _ in range(100):
        p = (x @ fit[..., None])[..., 0].sigmoid()  # [..., item]
        slope = (x.mT @ (p - y)[..., None])[..., 0] / n + fit @ penalty
        curve = (
            x.mT @ (x * (p * (1 - p))[..., None]) / n + penalty + 1e-12 * torch.eye(x.shape[-1], dtype=torch.float64)
        )
        step = torch.linalg.solve(curve, slope[..., None])[..., 0]
        longest = step.abs().amax(-1, keepdim=True).clamp_min(1e-300)
        fit = fit - step * (10.0 / longest).clamp_max(1.0)
        if float(longest.max()) < 1e-10:
            break
    return fit


def standardised_logistic(items: Tensor) -> Tensor:
    """`logistic` of the first column of items [..., item, 1 + input] on the others, each with mean 0 and spread 1; an input that is
    constant has no part in it (0), and of labels of one class all are NaN."""
    labels, inputs = items[..., 0], items[..., 1:]
    spread = inputs.std(-2, correction=0, keepdim=True)
    fit = logistic((inputs - inputs.mean(-2, keepdim=True)) / torch.where(spread > 0, spread, 1.0), labels)
    return fit.masked_fill((labels.amin(-1) == labels.amax(-1))[..., None], NAN)


def coefficient(items: Tensor) -> float:
    """The coefficient of the first input in that fit of items [item, 1 + input]."""
    return float(standardised_logistic(items)[1])


# --- how sure ---------------------------------------------------------------------------------------

AT_ONCE: dict[Estimate, Callable[[Tensor], Tensor]] = {coefficient: lambda items: standardised_logistic(items)[..., 1]}
ROOM = 2**20  # numbers of items that are estimated at once


def each(estimate: Estimate, sets: Iterable[Tensor]) -> Iterator[float]:
    """The estimate of each of many sets of items [item, ingredient]: of many at once, to rounding, where there is a way (`AT_ONCE`) and they are of one size."""
    many = AT_ONCE.get(estimate)
    if many is None:
        yield from map(estimate, sets)
        return
    some: list[Tensor] = []
    for items in sets:
        if some and (items.shape != some[0].shape or (1 + len(some)) * items.numel() > ROOM):
            yield from many(torch.stack(some)).tolist()
            some = []
        some.append(items)
    if some:
        yield from many(torch.stack(some)).tolist()


def resampled(
    estimate: Estimate,
    items: Tensor,
    *,
    less: Tensor | None = None,
    groups: Sequence[Hashable] | None = None,
    n: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """An estimate of items [item, ingredient] and its percentile bootstrap interval: items drawn with replacement, or whole groups. With `less`, another
    reading of the same items: the estimate of items less that of the other's, of which the same are drawn.

    Draws on which there is no estimate are left out. One unit alone has no interval: NaN ends."""
    items = torch.as_tensor(items).double()
    value = estimate(items) - (0.0 if less is None else estimate(less))
    units = _units(len(items), groups)
    if len(units) < 2 or value != value:
        return Interval(value, NAN, NAN)
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> Tensor:
        which = torch.randint(len(units), (len(units),), generator=generator)
        return which if groups is None else torch.cat([units[i] for i in which.tolist()])

    one, other = itertools.tee(drawn() for _ in range(n))
    found = each(estimate, (items[at] for at in one))
    if less is not None:
        found = (x - y for x, y in zip(found, each(estimate, (less[at] for at in other)), strict=True))
    kept = torch.tensor([x for x in found if x == x], dtype=torch.float64)
    if len(kept) < 2:
        return Interval(value, NAN, NAN)
    tail = (1.0 - level) / 2.0
    return Interval(value, *torch.quantile(kept, torch.tensor([tail, 1.0 - tail], dtype=torch.float64)).tolist())


def exchanged(
    estimate: Estimate, first: Tensor, second: Tensor, *, n: int = 1000, seed: int = 0, floor: float = 0.0
) -> float:
    """Two-sided p that two readings [item, ingredient] of the same items are alike: items swapped between them at random,
    p = (1 + hits) / (1 + n). Differences of the estimates no larger than `floor` are rounding, and p is 1."""
    first, second = torch.as_tensor(first).double(), torch.as_tensor(second).double()
    seen = abs(estimate(first) - estimate(second))
    if seen != seen or len(first) < 2:
        return NAN
    if seen <= floor:
        return 1.0
    generator, hits, made = torch.Generator().manual_seed(seed), 0, 0
    coins = itertools.tee(torch.randint(2, (len(first), 1), generator=generator).bool() for _ in range(n))
    there = each(estimate, (torch.where(coin, first, second) for coin in coins[0]))
    back = each(estimate, (torch.where(coin, second, first) for coin in coins[1]))
    for one, other in zip(there, back, strict=True):
        gap = abs(one - other)
        hits += gap >= seen - 1e-9 * max(1.0, seen)
        made += gap == gap
    return (1 + hits) / (1 + made)


def holm(p: Tensor) -> Tensor:
    """p values adjusted so that with those <= q there is a false find among them with a probability of at most q. NaN stays."""
    p = torch.as_tensor(p).double()
    tested = ~p.isnan()
    ordered, order = p[tested].sort()
    count = len(ordered)
    scaled = (ordered * torch.arange(count, 0, -1)).cummax(0).values.clamp_max(1.0) if count else ordered
    held = torch.empty_like(ordered)
    held[order] = scaled
    result = p.clone()
    result[tested] = held
    return result


# --- shared checks ----------------------------------------------------------------------------------


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a, b = (torch.as_tensor(x).detach().double().cpu() for x in (a, b))
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise PatchbayError(
            f"one number of each kind for every item is needed, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    return a, b


def _unit(values: Tensor, what: str) -> None:
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise PatchbayError(f"{what} lie in [0, 1], got {float(values.min()):.3g} to {float(values.max()):.3g}")


def _units(n: int, groups: Sequence[Hashable] | None) -> list[Tensor]:
    if groups is None:
        return [torch.tensor([i]) for i in range(n)]
    if len(groups) != n:
        raise PatchbayError(f"{n} items and {len(groups)} groups: one for each")
    of: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        of.setdefault(group, []).append(i)
    return [torch.tensor(members) for members in of.values()]

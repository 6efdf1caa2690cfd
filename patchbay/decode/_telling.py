"""What texts are like: how much they repeat, how alike they are, and how far two sets of texts lie apart.

rep-n       the share of a text's n-grams that were there before
diversity   (1 - rep-2)(1 - rep-3)(1 - rep-4)
self-BLEU   BLEU of a text with the other texts as its references: geometric mean of its clipped n-gram precisions, n = 1 to 4, the
            first as it is and the others with one added above and below, times the brevity penalty exp(1 - r / c) where the text
            of c tokens is shorter than the reference of nearest length r
frontier    the area under the curve (exp(-5 KL(Q, R)), exp(-5 KL(P, R))), R = l P + (1 - l) Q for l between 0 and 1, of two laws over cells
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from patchbay.decode._cells import cells

SCALE, COMPONENTS, CELLS, STARTS, STEPS = 5.0, 8, 16, 3, 25


def grams(text: Sequence[int], n: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(text[at : at + n]) for at in range(len(text) - n + 1))


def repeated(text: Sequence[int], n: int) -> float:
    """rep-n; 0 for a text that is shorter than n."""
    found = grams(text, n)
    return 1.0 - len(found) / found.total() if found else 0.0


def diversity(text: Sequence[int]) -> float:
    return math.prod(1.0 - repeated(text, n) for n in (2, 3, 4))


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """The share of different n-grams among all n-grams of several texts; 0 where there are none."""
    found: Counter[tuple[int, ...]] = sum((grams(text, n) for text in texts), Counter())
    return len(found) / found.total() if found else 0.0


def bleu(text: Sequence[int], others: Sequence[Sequence[int]]) -> float:
    """BLEU-4 of one text with others as its references; 0 for an empty text or where no token occurs there."""
    return self_bleu([text, *others], 1)[0]


def self_bleu(texts: Sequence[Sequence[int]], first: int | None = None) -> list[float]:
    """BLEU of each text, or of the first few, against all others; NaN for one text alone."""
    if len(texts) < 2:
        return [math.nan] * len(texts)
    counted = [[grams(text, n) for text in texts] for n in range(1, 5)]
    most = [_two_most(found) for found in counted]
    lengths = [len(text) for text in texts]
    scores = []
    for at, length in enumerate(lengths[:first]):
        logs = []
        for n in range(4):
            own = counted[n][at]
            hits = sum(min(times, most[n][gram][own[gram] == most[n][gram][0]]) for gram, times in own.items())
            logs.append((hits + (n > 0)) / (own.total() + (n > 0)) if own or n else 0.0)
        nearest = min(lengths[:at] + lengths[at + 1 :], key=lambda other: (abs(other - length), other))
        short = min(0.0, 1.0 - nearest / length) if length else 0.0
        scores.append(math.exp(sum(map(math.log, logs)) / 4 + short) if logs[0] > 0 else 0.0)
    return scores


def _two_most(found: Sequence[Counter[tuple[int, ...]]]) -> dict[tuple[int, ...], tuple[int, int]]:
    """How often each n-gram comes in the text that has most of it, and in the next one: what the others of the first hold."""
    most: dict[tuple[int, ...], tuple[int, int]] = {}
    for own in found:
        for gram, times in own.items():
            first, second = most.get(gram, (0, 0))
            most[gram] = (times, first) if times > first else (first, max(second, times))
    return most


def frontier(p: Tensor, q: Tensor) -> float:
    """The area of two laws [cell]: 1 where they are the same, towards 0 where they share nothing."""
    p, q = p.double(), q.double()
    points = [(1.0, 0.0)]
    for share in torch.linspace(0, 1, STEPS + 2, dtype=torch.float64)[1:-1].tolist():
        r = share * p + (1 - share) * q
        points.append((math.exp(-SCALE * _kl(q, r)), math.exp(-SCALE * _kl(p, r))))
    points.append((0.0, 1.0))
    points.sort(key=lambda point: (point[0], -point[1]))
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points))


def _kl(p: Tensor, q: Tensor) -> float:
    on = p > 0
    return float((p[on] * (p[on] / q[on]).log()).sum())


def likeness(ours: Tensor, theirs: Tensor, seed: int) -> float:
    """The area for two sets of points [text, d], in cells that both together make, the mean over starts of the cells."""
    both = torch.cat([ours, theirs]).double()
    both = both - both.mean(0)
    width = min(COMPONENTS, *both.shape)
    flat = both @ torch.linalg.svd(both, full_matrices=False).Vh[:width].T  # [text, component]
    count = max(2, min(CELLS, len(both) // 4))
    areas = []
    for start in range(STARTS):
        found, _ = cells(flat, count, torch.Generator().manual_seed(seed * STARTS + start))
        laws = [torch.bincount(part, minlength=count) / len(part) for part in (found[: len(ours)], found[len(ours) :])]
        areas.append(frontier(*laws))
    return sum(areas) / STARTS


def halves(ours: Tensor, theirs: Tensor, splits: int, seed: int) -> list[float]:
    """Likeness of one half of our points to the OTHER half of theirs, for several ways to halve the prompts. With `theirs` both times it
    is what the same source scores: the null, of sets as large."""
    generator, found = torch.Generator().manual_seed(seed), []
    for split in range(splits):
        order = torch.randperm(len(theirs), generator=generator)
        one, other = order[: len(order) // 2], order[len(order) // 2 :]
        found.append(likeness(ours[one], theirs[other], seed + split))
    return found

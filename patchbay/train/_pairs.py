"""Pairs of runs by seed: a difference with its interval over documents inside a seed, and the count of signs over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from patchbay import maths


@dataclass(frozen=True)
class OverSeeds:
    """The mean over seeds, how many of them have its sign, and the two-sided p of so many signs alike."""

    mean: float
    same: int
    p: float


def paired(one: Tensor, other: Tensor) -> tuple[float, float, float]:
    """The mean difference over documents, with the ends of its bootstrap interval."""
    found = maths.paired_interval(one, other)
    return found.mean, found.low, found.high


def over_seeds(differences: Sequence[float]) -> OverSeeds:
    """Exact signs: under no difference each seed's sign is a fair coin; seeds without any difference are left out."""
    mean = sum(differences) / len(differences)
    told = [value for value in differences if value != 0.0]
    same = sum((value > 0) == (mean > 0) for value in told)
    n, most = len(told), max(same, len(told) - same)
    tail = sum(math.comb(n, k) for k in range(most, n + 1)) / 2**n
    return OverSeeds(mean, same, min(1.0, 2 * tail))

"""Interleaved timing of two ways to do the same work, made for machines that others use too.

The two ways run in turn, the order swapped every time, so that a busy minute hits both. Two estimates of the ratio follow:
`best`, the fastest run of each against the other (other processes can only add time), and `median`, the median over the pairs of
neighbouring runs. On a quiet machine they agree; where they stand on different sides of a target, the verdict says so.
The `cpu` clock counts the processor time of this process, on one thread a steady measure however busy the machine is.
Results are freed outside the timed stretch, for both ways alike.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Work = Callable[[], Any]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
now = CLOCKS["wall"]


def use(clock: str) -> None:
    """Time with this clock from here on."""
    global now
    now = CLOCKS[clock]


@dataclass(frozen=True)
class Comparison:
    """Seconds of each run of the two ways, in the order they were made."""

    base: tuple[float, ...]
    ours: tuple[float, ...]

    @property
    def best(self) -> float:
        return min(self.ours) / min(self.base)

    @property
    def paired(self) -> list[float]:
        return sorted(ours / base for base, ours in zip(self.base, self.ours, strict=True))

    @property
    def median(self) -> float:
        return statistics.median(self.paired)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.paired) == 1:
            return self.paired[0], self.paired[0]
        low, _, high = statistics.quantiles(self.paired, n=4)
        return low, high

    def verdict(self, target: float) -> str:
        met = self.best <= target, self.median <= target
        return "met" if all(met) else "unsure" if any(met) else "missed"


def compare(base: Work, ours: Work, *, seconds: float, least: int = 9, most: int = 101, warm: int = 2) -> Comparison:
    """Run both ways in turn for about `seconds`, at least `least` and at most `most` times each, after `warm` runs of each."""
    for _ in range(warm):
        each = _time(base) + _time(ours)
    n = max(least, min(most, round(seconds / each)))
    gc.collect()
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(n):
        for which in (0, 1) if i % 2 else (1, 0):
            times[which].append(_time((base, ours)[which]))
    return Comparison(tuple(times[0]), tuple(times[1]))


def _time(work: Work) -> float:
    synchronize()
    begin = now()
    result = work()
    synchronize()
    end = now()
    del result
    return end - begin


def synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()

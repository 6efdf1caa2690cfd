"""Counts of what follows what in texts: p(v | the last i tokens) for i from 1 to 5, mixed with fixed weights that sum to a half.

    g(v) = sum over i of l_i count(context_i, v) / count(context_i),   l = .01 .04 .15 .18 .12

A context that never occurred adds nothing, and the weights are not made to sum to 1: the published code's mixture.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

WEIGHTS = (0.01, 0.04, 0.15, 0.18, 0.12)


class NGrams:
    """What follows each context of one to five tokens in some texts."""

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self.after: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for ids in map(list, texts):
            for at in range(1, len(ids)):
                for length in range(1, min(at, len(WEIGHTS)) + 1):
                    self.after[tuple(ids[at - length : at])][ids[at]] += 1

    def weight(self, text: Sequence[int], token: int) -> float:
        """g of a token after a text."""
        total = 0.0
        for length, weight in enumerate(WEIGHTS, start=1):
            seen = self.after.get(tuple(text[-length:])) if length <= len(text) else None
            if seen:
                total += weight * seen[token] / seen.total()
        return total

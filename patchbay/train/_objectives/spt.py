"""spt: semantic-aware permutation training; the units of a document kept in order, reversed or shuffled, tokens inside a unit in order.

Which of the three is drawn anew each time a document is met, with shares `kept`, `reversed` and the rest. Units come with the data (the paper
asks a language model for them); with `kept` 1 it is next-token prediction. Held-out documents are scored in their own order.

Guo et al. 2024, "Mitigating Reversal Curse in Large Language Models via Semantic-aware Permutation Training". Its null here is `tokens`,
which reverses whole documents token by token as often.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from patchbay.signal.port import PatchbayError
from patchbay.train._objectives._objective import Document, Objective, joined


def permuted(document: Document, way: str, draw: random.Random) -> list[list[int]]:
    """The units in another order: `kept`, `reversed`, `shuffled`, or `tokens`, the whole document backwards as one unit."""
    units = [list(unit) for unit in document]
    if way == "reversed":
        units.reverse()
    elif way == "shuffled":
        draw.shuffle(units)
    elif way == "tokens":
        units = [joined(units)[::-1]]
    return units


@dataclass(frozen=True)
class Permuted(Objective):
    kept: float = 1 / 3
    reversed: float = 1 / 3
    tokens: bool = False

    def check(self) -> None:
        if not (0 <= self.kept <= 1 and 0 <= self.reversed <= 1 and self.kept + self.reversed <= 1 + 1e-9):
            raise PatchbayError(
                f"spt: shares kept={self.kept}, reversed={self.reversed}; each 0 or more, together at most 1"
            )

    @property
    def null(self) -> str | None:
        return None if self.tokens else f"spt:kept={self.kept},reversed={1 - self.kept},tokens=1"

    def row(self, document: Document, draw: random.Random) -> tuple[list[int], list[int]]:
        share = draw.random()
        way = "kept" if share < self.kept else "reversed" if share < self.kept + self.reversed else "shuffled"
        if self.tokens and way != "kept":
            way = "tokens"
        ids = joined(permuted(document, way, draw))
        return ids, list(ids)


OBJECTIVE = Permuted

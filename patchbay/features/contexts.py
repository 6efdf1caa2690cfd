"""Contexts: where in texts some numbers of tokens are high. One pass over texts that come as they come, memory that does not grow with them.

For each column (a feature, a neuron, or the one number that a part card looks at): the highest tokens, each context once; a fair sample of the
tokens at which it is not 0, for quantiles; how many these are; and a histogram, of 64 bins around 0 whose reach is doubled when a number lies
beyond it, two neighbours to one bin, so that it is the one that a second pass would have drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

BEFORE, AFTER = 10, 4  # tokens shown around the one that is marked
BINS = 32  # of a histogram, on each side of 0
MIX, PRIME = 6364136223846793005, 1442695040888963407


@dataclass
class Kept:
    """What is kept of one column: the highest contexts, best first, and the sampled ones."""

    highest: list[dict[str, Any]] = field(default_factory=list)
    sampled: list[dict[str, Any]] = field(default_factory=list)

    def offer(self, made: dict[str, Any], n: int) -> None:
        """A context among the highest `n`; of two alike the higher one."""
        alike = (made["span"], made["at"])
        same = next((held for held in self.highest if (held["span"], held["at"]) == alike), None)
        if same is None:
            self.highest.append(made)
        elif made["value"] > same["value"]:
            same.update(made)
        self.highest = sorted(self.highest, key=_first)[:n]

    def sample(self, made: dict[str, Any], n: int) -> None:
        """A context among the `n` of the lowest lot."""
        self.sampled = sorted([*self.sampled, made], key=lambda held: (held["lot"], held["text"], held["position"]))[:n]


def _first(held: dict[str, Any]) -> tuple[float, int, int]:
    return -held["value"], held["text"], held["position"]


class Seen:
    """The contexts of `n_columns` numbers at each token: `n` highest and `n_sampled` others of each."""

    def __init__(self, n_columns: int, n: int, n_sampled: int = 0, seed: int = 0) -> None:
        self.n, self.n_sampled, self.seed = n, n_sampled, seed
        self.kept = [Kept() for _ in range(n_columns)]
        self.n_tokens = 0
        self.total = torch.zeros(n_columns, dtype=torch.float64)
        self.lowest = torch.full((n_columns,), torch.inf, dtype=torch.float64)
        self.active = torch.zeros(n_columns, dtype=torch.long)
        self.reach = torch.zeros(n_columns, dtype=torch.float64)  # of the histogram: a power of two
        self.counts = torch.zeros(n_columns, 2 * BINS, dtype=torch.long)

    def add(self, ids: Sequence[Sequence[int]], numbers: Tensor, texts: Sequence[tuple[int, int]]) -> None:
        """A batch's numbers [prompt, position, column], NaN at padding; `texts` says of each prompt its text and where in it it begins."""
        real = ~numbers[..., 0].isnan()
        values = numbers[real].double()  # [token, column]
        self.n_tokens += len(values)
        self.total += values.sum(0)
        self.lowest = torch.minimum(self.lowest, values.amin(0))
        self.active += (values != 0).sum(0)
        self._bins(values)
        places = real.nonzero()  # [token, (prompt, position)]
        self._highest(ids, numbers, values, places, texts)
        if self.n_sampled:
            self._sample(ids, numbers, values, places, texts)

    def _highest(
        self, ids: Sequence[Sequence[int]], numbers: Tensor, values: Tensor, places: Tensor, texts: Any
    ) -> None:
        top = values.topk(min(4 * self.n, len(values)), dim=0)  # more than are kept: some are one context
        for column, kept in enumerate(self.kept):
            for value, at in zip(top.values[:, column].tolist(), top.indices[:, column].tolist(), strict=True):
                if len(kept.highest) == self.n and value < kept.highest[-1]["value"]:
                    break
                kept.offer(self._made(ids, numbers, places[at].tolist(), texts, column), self.n)

    def _sample(
        self, ids: Sequence[Sequence[int]], numbers: Tensor, values: Tensor, places: Tensor, texts: Any
    ) -> None:
        """The tokens of the lowest lots among those that are not 0; a token's lot follows from its text and place, however they come."""
        where = torch.tensor([[texts[row][0], texts[row][1] + at] for row, at in places.tolist()]).view(-1, 2)
        column = torch.arange(values.shape[1])
        lots = (
            where[:, :1] * 1_000_003 + where[:, 1:] * 7919 + column * 104_729 + self.seed * 15_485_863
        ) * MIX + PRIME
        lots = ((lots ^ (lots >> 29)) * MIX).remainder(2**40)  # [token, column]
        lots = lots.masked_fill(values == 0, 2**41)
        low = lots.topk(min(self.n_sampled, len(lots)), dim=0, largest=False)
        for i, kept in enumerate(self.kept):
            for lot, at in zip(low.values[:, i].tolist(), low.indices[:, i].tolist(), strict=True):
                if lot > 2**40 or (len(kept.sampled) == self.n_sampled and lot >= kept.sampled[-1]["lot"]):
                    break
                kept.sample({**self._made(ids, numbers, places[at].tolist(), texts, i), "lot": lot}, self.n_sampled)

    def _made(
        self, ids: Sequence[Sequence[int]], numbers: Tensor, place: list[int], texts: Any, column: int
    ) -> dict[str, Any]:
        """One context: the tokens around a place, and the numbers at them."""
        row, at = place
        text, start = texts[row]
        begin, end = max(0, at - BEFORE), min(at + AFTER + 1, len(ids[row]))
        return {
            "value": float(numbers[row, at, column]),
            "text": text,
            "position": start + at,
            "at": at - begin,
            "span": tuple(ids[row][begin:end]),
            "values": [float(value) for value in numbers[row, begin:end, column]],
        }

    def _bins(self, values: Tensor) -> None:
        """Count values that are not 0; a reach that is too short is doubled, its bins two by two."""
        most = values.abs().amax(0)
        wanted = torch.where(most > 0, 2.0 ** torch.ceil(torch.log2(most.clamp_min(1e-300))), 0.0)
        wanted = torch.where(wanted < most, 2 * wanted, wanted)
        fresh = self.reach == 0
        self.reach = torch.where(fresh, wanted, self.reach)
        while bool((short := self.reach < wanted).any()):
            self.counts[short] = merged(self.counts[short])
            self.reach = torch.where(short, 2 * self.reach, self.reach)
        place = ((values / self.reach.clamp_min(1e-300) + 1) * BINS).floor().clamp(0, 2 * BINS - 1).long()
        place = place + 2 * BINS * torch.arange(values.shape[1])
        self.counts += torch.bincount(place[values != 0], minlength=self.counts.numel()).view_as(self.counts)

    # --- what is told -------------------------------------------------------------------------------

    def density(self, column: int) -> float:
        """The share of tokens at which a column is not 0."""
        return int(self.active[column]) / max(self.n_tokens, 1)

    def histogram(self, column: int) -> dict[str, list[float]]:
        """Bins that hold something, by their lower ends, with their width and counts."""
        width, counts = float(self.reach[column]) / BINS, self.counts[column]
        held = counts.nonzero()[:, 0].tolist()
        return {
            "low": [(i - BINS) * width for i in held],
            "count": [int(counts[i]) for i in held],
            "width": [width] if held else [],
        }

    def quantiles(self, column: int, n: int, each: int) -> list[dict[str, Any]]:
        """`n` parts of the sampled tokens by rank, highest first: their ends, their share of the tokens that are not 0, and `each` of their contexts."""
        ranked = sorted(self.kept[column].sampled, key=_first)
        found = []
        for i in range(n):
            part = ranked[i * len(ranked) // n : (i + 1) * len(ranked) // n]
            if part:
                chosen = sorted(part, key=lambda held: held["lot"])[:each]
                found.append(
                    {
                        "high": part[0]["value"],
                        "low": part[-1]["value"],
                        "share": len(part) / len(ranked),
                        "contexts": sorted(chosen, key=_first),
                    }
                )
        return found


def merged(counts: Tensor) -> Tensor:
    """Bins [column, bin] of twice the width: neighbours from 0 outwards two by two."""
    half = counts.unflatten(1, (BINS, 2)).sum(2)
    out = torch.zeros_like(counts)
    out[:, BINS // 2 : BINS // 2 + BINS] = half
    return out

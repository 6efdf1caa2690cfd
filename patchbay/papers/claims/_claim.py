"""A claim: a number with its interval, and the bound that decides. The checks of all papers are registered here by key."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from patchbay.signal.port import PatchbayError, suggest

Kind = Literal["identity", "mechanism", "comparison", "made"]
KINDS: dict[Kind, str] = {
    "identity": "holds of every model, trained or not, to rounding",
    "mechanism": "is learned: beyond matched controls, and beyond untrained networks of the same form",
    "comparison": "two measures of one model agree or differ; an untrained network may show it too",
    "made": "is of networks, texts or functions that the check makes itself, with what stands against them; the model at hand has no part in it",
}
WIDE = "tiny-wide"  # the built-in model with the most heads: claims about few heads against random ones are made on it
UNTESTABLE = "not testable here"
SEEDS = 3  # with which a claim is checked
TRAINED = 5  # where networks are trained for it: signs of five seeds can reach p = .0625
Interval = tuple[float, float, float]  # a number and the ends of its 95 % interval


@dataclass(frozen=True)
class Claim:
    """What was claimed, the number measured with its 95 % interval, and the bound that decides."""

    text: str
    value: float
    low: float
    high: float
    bound: float
    unit: str
    above: bool = True  # the claim is that the number is above the bound
    untestable: str = ""  # why this model cannot show it, whatever its numbers

    @property
    def excess(self) -> Interval:
        """How far beyond the bound, on the side that is claimed, with the ends of the interval."""
        value, low, high = (end - self.bound for end in (self.value, self.low, self.high))
        return (value, low, high) if self.above else (-value, -high, -low)

    @property
    def verdict(self) -> str:
        return self.beyond(0.0)

    def beyond(self, limit: float) -> str:
        """The verdict where the whole interval has to lie more than `limit` beyond the bound."""
        if self.untestable:
            return UNTESTABLE
        value, low, high = self.excess
        if not all(map(math.isfinite, (value, low, high, limit))):
            return "inconclusive"
        return "confirmed" if low > limit else "not confirmed" if high <= limit else "inconclusive"

    def numbers(self) -> str:
        side = "above" if self.above else "below"
        return f"{self.value:.3g} {self.unit} (95 % {self.low:.3g} to {self.high:.3g}); claimed {side} {self.bound:.3g}"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


Check = Callable[[Any, int], Claim]


@dataclass(frozen=True)
class Entry:
    """How a paper's claim is checked: a function of a model and a seed, what kind of claim it is, on which model, and with how many seeds."""

    measure: Check
    kind: Kind
    on: str
    seeds: int = SEEDS


CLAIMS: dict[str, Entry] = {}  # by the key of the paper


def claim(key: str, kind: Kind, on: str = "tiny", seeds: int = SEEDS) -> Callable[[Check], Check]:
    """Register a function as the check of the claim of the paper `key`: of what kind it is, the model it is made on, and its seeds."""

    def keep(function: Check) -> Check:
        CLAIMS[key] = Entry(function, kind, on, seeds)
        return function

    return keep


def known(key: str) -> Entry:
    """How a paper's claim is checked. Raises PatchbayError where no check is written."""
    if key not in CLAIMS:
        raise PatchbayError(
            f"no claim of {key!r} can be run; those that can are {', '.join(sorted(CLAIMS))}{suggest(key, list(CLAIMS))}"
        )
    return CLAIMS[key]

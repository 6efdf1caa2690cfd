"""A claim: a number with its interval, and the bound that decides. The checks of all papers are registered here by key."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from patchbay.signal.port import PatchbayError, suggest


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

    @property
    def verdict(self) -> str:
        if not all(map(math.isfinite, (self.value, self.low, self.high, self.bound))):
            return "inconclusive"
        inside, outside = (self.low > self.bound, self.high <= self.bound)
        if not self.above:
            inside, outside = (self.high < self.bound, self.low >= self.bound)
        return "confirmed" if inside else "not confirmed" if outside else "inconclusive"

    def numbers(self) -> str:
        side = "above" if self.above else "below"
        return f"{self.value:.3g} {self.unit} (95 % {self.low:.3g} to {self.high:.3g}); claimed {side} {self.bound:.3g}"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


Check = Callable[[Any, int], Claim]
CLAIMS: dict[str, Check] = {}  # key of the paper -> its check(model, seed)


def claim(key: str) -> Callable[[Check], Check]:
    """Register a function as the check of the claim of the paper `key`."""

    def keep(function: Check) -> Check:
        CLAIMS[key] = function
        return function

    return keep


def known(key: str) -> Check:
    """The check of a paper's claim. Raises PatchbayError where none is written."""
    if key not in CLAIMS:
        raise PatchbayError(
            f"no claim of {key!r} can be run; those that can are {', '.join(sorted(CLAIMS))}{suggest(key, list(CLAIMS))}"
        )
    return CLAIMS[key]

"""A claim checked: on the model and on untrained networks of its form, with three seeds each (five where networks are
trained), and the verdict of all.

A seed draws the prompts and the random controls; the untrained network of a seed has the weights that training would have
started from. With e the excess of a number over its bound on the side that is claimed, and [low, high] its 95 % interval:

    limit      = mean of e over the untrained networks + MULTIPLE * half, at least 0
    half       = sqrt(mean squared half-width of their intervals + (1.96 * spread of e over them)^2)

A mechanism is confirmed when the whole interval of every seed lies beyond the limit, an identity when every seed and every
untrained network lies within its bound, a comparison and what the check makes itself when every seed lies beyond its bound; not confirmed when no seed does
at all; else inconclusive. An untrained network of which the claim cannot even be asked shows nothing, and says why.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patchbay.papers.claims._claim import UNTESTABLE, Claim, Entry, Kind, known
from patchbay.papers.claims._shared import untrained
from patchbay.signal.port import PatchbayError

if TYPE_CHECKING:
    from patchbay.model.model import Model

STEP = 10  # how far apart seeds are: some claims take the prompts of the next one to test
MULTIPLE = 2.0  # of the half-width of what untrained networks give
Seen = Claim | str  # what came of one run, or why it could not be made


@dataclass(frozen=True)
class Checked:
    """What came of a claim: on the model by seed, and on the untrained network of each seed (none where the model has no part)."""

    key: str
    kind: Kind
    seeds: tuple[int, ...]
    runs: tuple[Seen, ...]
    twins: tuple[Seen, ...]

    @property
    def first(self) -> Claim:
        """The claim at the first seed, which was not refused."""
        assert isinstance(self.runs[0], Claim)
        return self.runs[0]

    @property
    def limit(self) -> float:
        """How far beyond its bound a mechanism has to be, as untrained networks are too; 0 of the other kinds."""
        shown = [seen.excess for seen in self.twins if isinstance(seen, Claim) and math.isfinite(seen.excess[0])]
        if self.kind != "mechanism" or not shown:
            return 0.0
        mean = sum(value for value, _, _ in shown) / len(shown)
        halves = [(high - low) / 2.0 for _, low, high in shown if math.isfinite(high - low)]
        square = sum(half**2 for half in halves) / max(1, len(halves))
        spread = sum((value - mean) ** 2 for value, _, _ in shown) / max(1, len(shown) - 1)
        return max(0.0, mean + MULTIPLE * math.sqrt(square + 1.96**2 * spread))

    @property
    def verdict(self) -> str:
        claims = [seen for seen in self.runs if isinstance(seen, Claim)]
        judged = [seen.beyond(self.limit) for seen in claims]
        if UNTESTABLE in judged:
            return UNTESTABLE
        if self.kind == "identity":
            judged += [seen.verdict for seen in self.twins if isinstance(seen, Claim)]
        if len(claims) < len(self.runs):
            judged.append("inconclusive")
        same = set(judged)
        return judged[0] if len(same) == 1 else "inconclusive"

    def numbers(self) -> str:
        """The first seed's numbers, the values of the others, and those of untrained networks."""
        one = self.first
        more = ", ".join(_value(seen) for seen in self.runs[1:])
        side = "above" if one.above else "below"
        told = f"{one.value:.3g} {one.unit} (95 % {one.low:.3g} to {one.high:.3g}); other seeds {more}; claimed {side} {one.bound:.3g}"
        if self.kind == "mechanism":
            told += f" by {self.limit:.3g}" if self.limit else ""
        if self.twins:
            told += f"; untrained {_together([_value(seen) for seen in self.twins])}"
        return told + (f"; {one.untestable}" if one.untestable else "")

    def told(self) -> list[str]:
        """Every run in a line, and what else the verdict stands on."""
        lines = [f"  {self.first.untestable}"] if self.first.untestable else []
        for name, seen in (("model" if self.twins else "made", self.runs), ("untrained", self.twins)):
            told = [one if isinstance(one, str) else one.numbers() for one in seen]
            lines += [f"  {name}, seed {seed}: {one}" for seed, one in zip(self.seeds, told, strict=bool(told))]
        limit = f"  as untrained networks are, it has to be more than {self.limit:.3g} beyond the bound"
        return [*lines, limit] if self.limit else lines

    def to_json(self) -> dict[str, Any]:
        runs, twins = ([s if isinstance(s, str) else s.to_json() for s in seen] for seen in (self.runs, self.twins))
        told = {"key": self.key, "kind": self.kind, "verdict": self.verdict, "text": self.first.text}
        return {**told, "limit": self.limit, "seeds": list(self.seeds), "runs": runs, "untrained": twins}


def _value(seen: Seen) -> str:
    return f"{seen.value:.3g}" if isinstance(seen, Claim) else f"none ({seen})"


def _together(values: list[str]) -> str:
    """Values with what is said of all of them said once."""
    return values[0] if len(set(values)) == 1 else ", ".join(values)


def check(key: str, model: Model, *, seed: int = 0) -> Checked:
    """Check the claim of one paper on a model, with its seeds, and on an untrained network of its form for each, but where the check makes all itself.

    Raises PatchbayError where the claim cannot be asked of the model, and for a mechanism where no untrained network can be made.
    """
    entry = known(key)
    seeds = tuple(seed + STEP * at for at in range(entry.seeds))
    first = entry.measure(model, seeds[0])
    runs = (first, *(_seen(entry, model, at) for at in seeds[1:]))
    twins = () if entry.kind == "made" else tuple(_twin(entry, model, at) for at in seeds)
    return Checked(key, entry.kind, seeds, runs, twins)


def _seen(entry: Entry, model: Model, seed: int) -> Seen:
    try:
        return entry.measure(model, seed)
    except PatchbayError as error:
        return str(error)


def _twin(entry: Entry, model: Model, seed: int) -> Seen:
    try:
        fresh = untrained(model, seed)
    except PatchbayError as error:
        if entry.kind == "mechanism":  # nothing to be beyond
            raise
        return str(error)
    return _seen(entry, fresh, seed)

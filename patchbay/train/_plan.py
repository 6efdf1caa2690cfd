"""A run of training as data: what is trained on what, how, and in which order. Batches follow from the seed and the step alone."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from patchbay.signal.port import PatchbayError, suggest
from patchbay.train._objectives import objective
from patchbay.train._objectives._objective import Document
from patchbay.train._stream import shuffled


@dataclass(frozen=True)
class Plan:
    """How long and how: `steps` updates of `batch_size` rows at a constant `rate`, weight decay `decay` on matrices; rows of at most `length`
    tokens; `held` of the documents are scored and never trained on (0: the same are trained on and scored); a checkpoint `every` so many steps (0: four in all); `fresh`: from
    weights drawn by seed in place of the lent ones; `redraw`: the rows of
    tokens, in the embedding and the unembedding, drawn anew by seed, all else as it is; `panel`: held-out documents that the panel reads in each run (0: none); `curve`: the panel and the held-out loss are read every so many steps too (0: at the end alone); `equal`: beside
    them a plain arm of as many weights as the variant has, or of as many operations; `window`: tokens of a row whose activations are held at a time (0: all); `seed`: the first of
    the seeds."""

    steps: int = 200
    rate: float = 3e-3
    decay: float = 0.1
    batch_size: int = 16
    length: int = 128
    held: float = 0.1
    every: int = 0
    fresh: bool = False
    redraw: bool = False
    panel: int = 0
    curve: int = 0
    equal: bool = False
    window: int = 0
    seed: int = 0

    def check(self) -> None:
        positive = self.steps >= 0 and self.batch_size >= 1 and self.length >= 2 and self.every >= 0
        if not (
            positive
            and 0 < self.rate < float("inf")
            and 0 <= self.decay < float("inf")
            and 0 <= self.held < 1
            and self.panel >= 0
            and self.curve >= 0
            and self.window >= 0
        ):
            raise PatchbayError(
                f"plan {asdict(self)}: 0 or more steps, 1 or more rows, rows of 2 or more tokens, a rate above 0, a decay of 0 or more, "
                "a held-out share from 0 to below 1, and 0 or more documents for the panel, steps between readings and tokens for a window"
            )


def plan_of(given: dict[str, Any] | None) -> Plan:
    """A plan from its settings, each of its kind, or a PatchbayError that names what there is."""
    kinds: dict[str, Any] = {field.name: type(field.default) for field in fields(Plan)}
    for key, value in (given or {}).items():
        if key not in kinds:
            raise PatchbayError(f"plan has no {key!r}; it has {', '.join(kinds)}{suggest(key, list(kinds))}")
        if not _is(value, kinds[key]):
            raise PatchbayError(f"plan: {key} is written as {kinds[key].__name__}, got {value!r:.40}")
    found = Plan(**{key: kinds[key](value) for key, value in (given or {}).items()})
    found.check()
    return found


def _is(value: Any, kind: type) -> bool:
    """Whether a number can be told as one of this kind; True and False are no numbers, 1 and 0 are also true and false."""
    if not isinstance(value, int | float) or (kind is not bool and isinstance(value, bool)):
        return False
    try:
        told = kind(value)
        return kind is float or bool(told == value)
    except (OverflowError, ValueError):  # infinite, no number, or beyond what a float holds
        return False


@dataclass(frozen=True)
class Arm:
    """What is trained: how it differs from the plain twin, and whose batches it sees; `mlp`: another width of the MLPs; `longer`: times the steps."""

    objective: str = "ntp"
    blocks: str = ""
    optimizer: str = "adamw"
    other_batches: bool = False
    mlp: int = 0
    longer: float = 1.0


class Rows:
    """The rows of a run, by place: row i is of step i // batch_size. A map-style data set, so that a run goes on from any step."""

    def __init__(self, documents: Sequence[Document], arm: Arm, plan: Plan, seed: int) -> None:
        self.documents, self.plan = documents, plan
        self.seed = seed + 100_003 * arm.other_batches
        self.objective = objective(arm.objective)
        self._order = functools.lru_cache(maxsize=2)(lambda epoch: shuffled(len(documents), self.seed, "rows", epoch))

    def __len__(self) -> int:
        return self.plan.steps * self.plan.batch_size

    def __getitem__(self, place: int) -> tuple[list[int], list[int]]:
        epoch, at = divmod(place, len(self.documents))
        aim = self.objective.of_batch(random.Random(f"{self.seed} step {place // self.plan.batch_size}"))
        return aim.row(self.documents[self._order(epoch)[at]], random.Random(f"{self.seed} {place}"))


def split(n: int, held: float, whose: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
    """Places of the documents that are trained on and of those that are held out, the same for every run; with `held` 0 all are both.

    `whose`: of which document each of the n is a piece. Pieces of one document stay on one side, unless it is the only one.
    """
    if n < 2:
        raise PatchbayError(f"{n} documents: two or more, so that one is held out")
    if held == 0:
        return list(range(n)), list(range(n))
    of = list(range(n)) if whose is None or len(set(whose)) < 2 else list(whose)
    names = sorted(set(of))
    order = shuffled(len(names), "held out")
    out = {names[i] for i in order[: min(len(names) - 1, max(1, round(len(names) * held)))]}
    return [i for i in range(n) if of[i] not in out], [i for i in range(n) if of[i] in out]

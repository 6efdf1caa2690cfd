"""How sweeps are run that were not told, also those inside methods; and what one will cost."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass
class Turn:
    """Which share of a method's sweeps the one at hand is: `before` and `share` of them all, as fractions of 1."""

    before: float = 0.0
    share: float = 1.0
    announced: bool = False  # the cost of all of them

    def far(self, done: int, total: int) -> tuple[int, int]:
        """How far all sweeps are, from how far this one is: in cells, as though all were made of cells like these."""
        everything = max(total, round(total / self.share))
        ended = done == total and self.before + self.share > 1 - 1e-9
        return everything if ended else min(everything, round(self.before * everything) + done), everything


@dataclass(frozen=True)
class Settings:
    """How sweeps are run that were not told: see `using`."""

    progress: Callable[[int, int], None] | None = None
    announce: Callable[[Estimate], None] | None = None
    folder: str | Path | None = None
    memory: int = 2_000_000_000
    executor: str = "local"
    workers: int = 2
    partial: Callable[[Sequence[Any], Any, str], None] | None = None
    pieces: int = 1
    turn: Turn | None = None  # of the block of `using`, which `in_turn` changes

    def far(self, done: int, total: int) -> None:
        """Tell how far a sweep is, of several how far they are together."""
        if self.progress is not None:
            self.progress(*(self.turn or Turn()).far(done, total))

    def cost(self, estimate: Callable[[], Estimate]) -> None:
        """Tell what a sweep costs, before the first of several what they cost together."""
        turn = self.turn or Turn()
        if self.announce is not None and not (turn.announced and turn.share < 1):
            self.announce(estimate().times(1 / turn.share))
            turn.announced = True


AFTER = 2.0  # seconds: what is done sooner shows no progress


def in_notebook() -> Callable[[int, int], None] | None:
    """What tells a notebook how far a sweep is, or several in turn, once two seconds have gone: one line, written over itself. None elsewhere."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if not hasattr(shell, "kernel"):
        return None
    start = time.perf_counter()
    told = False

    def tell(done: int, total: int) -> None:
        nonlocal told
        seconds = time.perf_counter() - start
        if seconds < AFTER or not total or not (told or done < total):
            return
        told = True
        left = f", about {seconds * (total - done) / done:.0f} s left" if 0 < done < total else ""
        sys.stderr.write(f"\rsweep: {done:,} of {total:,} cells, {seconds:.0f} s{left}      " + "\n" * (done >= total))
        sys.stderr.flush()

    return tell


SETTINGS: ContextVar[Settings] = ContextVar("sweep settings", default=Settings())  # noqa: B039


@contextmanager
def using(**given: Any) -> Iterator[None]:
    """Within the block, how every sweep is run that is not told otherwise, also those inside methods: `progress(done, total)` and
    `announce(estimate)` before each, of all sweeps together where a method says how many it makes (`in_turn`), `folder` (each sweep in a folder of its own below it), `memory`, `executor`, `workers`;
    `partial(entries, effects, unit)` after each batch: the mean effect of each entry so far [edit], NaN of those that have not run;
    `pieces`: batches that a sweep is split into at least, where it has as many entries.
    """
    if {"progress", "announce"} & given.keys():
        given = {"turn": Turn()} | given
    token = SETTINGS.set(replace(SETTINGS.get(), **given))
    try:
        yield
    finally:
        SETTINGS.reset(token)


def in_turn(parts: Sequence[T], sizes: Sequence[float] | None = None) -> Iterator[T]:
    """The parts of a method's work, one after another, each with a sweep of its own (or loops of them): what is told of progress and cost
    meanwhile is of all parts, in a notebook too. `sizes`: how much work each is beside the others; without, all are alike."""
    tell = None if SETTINGS.get().progress else in_notebook()
    if tell is not None:  # one line for all of the parts
        with using(progress=tell, turn=SETTINGS.get().turn or Turn()):
            yield from in_turn(parts, sizes)
        return
    turn, sizes = SETTINGS.get().turn, [1.0] * len(parts) if sizes is None else sizes
    if turn is None:
        yield from parts
        return
    before, share, whole = turn.before, turn.share, sum(sizes)
    turn.announced = turn.announced and share < 1  # a loop of its own tells its own cost
    try:
        for i, part in enumerate(parts):
            turn.before, turn.share = before + share * sum(sizes[:i]) / whole, share * sizes[i] / whole
            yield part
    finally:
        turn.before, turn.share = before, share


@dataclass(frozen=True)
class Estimate:
    """What a sweep will cost: rows of the batch, floating-point operations, peak bytes beside the model, seconds."""

    rows: int
    flops: float
    peak_bytes: int
    seconds: float

    def times(self, n: float) -> Estimate:
        """That of `n` times as much work, one piece after another."""
        return Estimate(round(self.rows * n), self.flops * n, self.peak_bytes, self.seconds * n)

    def __str__(self) -> str:
        return f"{self.rows:,} rows, {self.flops / 1e9:,.0f} GFLOP, about {self.peak_bytes / 1e6:,.0f} MB, {self.seconds:,.1f} s"

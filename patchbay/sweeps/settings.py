"""How sweeps are run that were not told, also those inside methods; and what one will cost."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


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


AFTER = 2.0  # seconds: what is done sooner shows no progress


def in_notebook() -> Callable[[int, int], None] | None:
    """What tells a notebook how far a sweep is, once it has run for two seconds: one line, written over itself. None elsewhere."""
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
    """Within the block, how every sweep is run that is not told otherwise, also those inside methods: `progress(done, total)`,
    `announce(estimate)` before each, `folder` (each sweep in a folder of its own below it), `memory`, `executor`, `workers`;
    `partial(entries, effects, unit)` after each batch: the mean effect of each entry so far [edit], NaN of those that have not run;
    `pieces`: batches that a sweep is split into at least, where it has as many entries.
    """
    token = SETTINGS.set(replace(SETTINGS.get(), **given))
    try:
        yield
    finally:
        SETTINGS.reset(token)


@dataclass(frozen=True)
class Estimate:
    """What a sweep will cost: rows of the batch, floating-point operations, peak bytes beside the model, seconds."""

    rows: int
    flops: float
    peak_bytes: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.rows:,} rows, {self.flops / 1e9:,.0f} GFLOP, about {self.peak_bytes / 1e6:,.0f} MB, {self.seconds:,.1f} s"

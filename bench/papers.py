"""The store of papers, against budgets and not against another program.

"sync" takes 10,000 papers of made-up text into a new file, a hundred at a time. "search" is one look-up in 100,000 of them, of three
words of which the last is begun, the dearest of those that are tried.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from datetime import date, timedelta
from itertools import accumulate
from pathlib import Path

import torch

from bench.report import Row
from patchbay.papers.feed import views
from patchbay.papers.feed.listed import Listed
from patchbay.papers.feed.store import Store

PARTS = ("sync", "search")
METHOD = (__doc__ or "").split("\n\n", 1)[1].replace("\n", " ").strip()
BUDGET = {"sync": 10.0, "search": 0.050}  # seconds
ASKED = ("language model", "attention heads comp", "w12 w7 w", "a", "w3 mod", "language w40")


def rows(folder: Path, parts: tuple[str, ...], device: str, dtype: torch.dtype, seconds: float) -> Iterator[Row]:
    """The section's rows."""
    draw = random.Random(0)
    with Store(folder / "papers.sqlite") as store:
        taken = _fill(store, 10_000, draw)
        if "sync" in parts:
            yield _row("sync of 10,000 papers", [taken], BUDGET["sync"], "")
        if "search" in parts:
            _fill(store, 90_000, draw, size=5_000)
            for words in ASKED:
                times = []
                for _ in range(20):
                    began = time.perf_counter()
                    found = views.search(store, words, limit=20)
                    times.append(time.perf_counter() - began)
                yield _row(f"search for {words!r} in 100,000", times, BUDGET["search"], f"{len(found)} shown")


def _fill(store: Store, n: int, draw: random.Random, size: int = 100) -> float:
    """Take in papers whose words follow Zipf's law, as those of a language do; the seconds that the store took."""
    vocabulary = ["language", "model", "attention", "heads", "compute", *(f"w{i}" for i in range(20_000))]
    weights = list(accumulate(1 / (1 + i) for i in range(len(vocabulary))))
    made, taken = 0, 0.0
    have = views.count(store)
    while made < n:
        page = []
        for _ in range(min(size, n - made)):
            text = draw.choices(vocabulary, cum_weights=weights, k=160)
            number = have + made + len(page)
            day = date(2020, 1, 1) + timedelta(number % 2000)
            page.append(Listed(f"{' '.join(text[:9])} {number}", " ".join(text), f"{2000 + number // 90000}.{number % 90000:05d}", published=day, likes=number % 50))  # fmt: skip
        began = time.perf_counter()
        store.add(page, "bench", str(made))
        taken += time.perf_counter() - began
        made += len(page)
    return taken


def _row(what: str, times: Sequence[float], budget: float, note: str) -> Row:
    best, median = min(times), sorted(times)[len(times) // 2]
    verdict = "met" if median <= budget else "missed"
    return Row(what, "", "", "", f"{best * 1e3:.1f} ms", f"{best / budget:.3f}", f"{median / budget:.3f}", str(len(times)), f"{budget * 1e3:.0f} ms", f"{verdict}{'; ' + note if note else ''}")  # fmt: skip

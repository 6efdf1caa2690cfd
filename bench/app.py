"""The page and its papers: first paint, interactions, search, sync, and what an idle page costs.

"first paint" is from the address to the first contentful paint of `patchbay ui` in headless Chromium, on loopback; "a step of the pointer" is from a key to the
second frame after it, on a map of 1,024 by 1,024 cells and one of 32 by 32 heads; "search" is one keystroke's request for 60 papers in a store of 100,000 (made of
words drawn by Zipf's law), the median and the 95th of 100 over begun and whole words, most of them of titles and so among the commonest; "sync" is 10,000 papers in pages of 100 into an empty store, without the
network; both in time of the processor, for nothing else is waited for but the disk; "idle" is the processor's time of server and worker together over ten seconds with one page open. Targets are absolute and of a quiet machine; what stands in place of "Hugging Face" is the target.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import torch

import patchbay as pb
from bench.report import Row
from patchbay.app import feed
from patchbay.papers.feed.listed import Listed
from patchbay.papers.feed.store import Store
from patchbay.results.result import Result

PARTS = ("search", "sync", "paint", "idle")
PAPERS, SYNCED, WORDS = 100_000, 10_000, 20_000
METHOD = __doc__.split("\n\n", 1)[1].replace("\n", " ").strip()
STEP = """async () => { const view = document.querySelector('.heat-scroll'), times = [];
  for (let i = 0; i < 20; i++) { const start = performance.now();
    view.dispatchEvent(new KeyboardEvent('keydown', {key: i % 2 ? 'ArrowDown' : 'ArrowRight', bubbles: true}));
    await new Promise(requestAnimationFrame); await new Promise(requestAnimationFrame); times.push(performance.now() - start); }
  return times.sort((a, b) => a - b)[10]; }"""
PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"


def rows(folder: Path, parts: tuple[str, ...], device: str, dtype: torch.dtype, seconds: float) -> Iterator[Row]:
    """The section's rows."""
    if "sync" in parts:
        yield _sync(folder)
    if "search" in parts:
        yield from _search(folder)
    if {"paint", "idle"} & set(parts):
        yield from _page(folder, parts)


def _row(what: str, on: str, size: str, target: float, found: float, unit: str, more: str = "", n: int = 1) -> Row:
    verdict = "met" if found <= target else "missed"
    return Row(
        what,
        on,
        size,
        f"{target:g} {unit}",
        f"{found:.3g} {unit}",
        f"{found / target:.2f}",
        more,
        str(n),
        "1.00",
        verdict,
    )


def papers(n: int, seed: int = 0) -> Iterator[Listed]:
    """Papers of invented words, the k-th word as frequent as 1 / k."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnoprstuvw"
    words = ["".join(rng.choices(letters, k=rng.randint(3, 10))) for _ in range(WORDS)]
    cumulative = list(itertools.accumulate(1 / (k + 1) for k in range(WORDS)))
    for i in range(n):
        drawn = rng.choices(words, cum_weights=cumulative, k=88)
        published = date(2024, 1, 1) + timedelta(i * 700 // n)
        yield Listed(
            " ".join(drawn[:8]) + f" {i}",
            " ".join(drawn[8:]),
            f"{2401 + i % 12}.{i:05d}",
            published=published,
            likes=i % 40,
        )


def _filled(path: Path, made: list[Listed]) -> float:
    """Seconds to take in all of them, in pages of 100."""
    with Store(path) as store:
        begun = time.process_time()
        for at in range(0, len(made), 100):
            store.add(made[at : at + 100], "bench", str(at))
        return time.process_time() - begun


def _sync(folder: Path) -> Row:
    made = list(papers(SYNCED))
    return _row("sync", "store of papers", f"{SYNCED:,} papers", 10.0, _filled(folder / "sync.sqlite", made), "s")


def _search(folder: Path) -> Iterator[Row]:
    made = list(papers(PAPERS))
    _filled(folder / "search.sqlite", made)
    asked = [one.title.split()[k % 8] for k, one in enumerate(made[:: PAPERS // 40])]
    typed = [word[:n] for word in asked for n in (2, 4, len(word))] + [
        f"{a} {b[:3]}" for a, b in itertools.pairwise(asked)
    ]
    taken = []
    with Store(folder / "search.sqlite") as store:
        for words in typed:
            begun = time.process_time()
            feed.listed(store, {"words": words})
            taken.append(1e3 * (time.process_time() - begun))
    for name, found in (("median", statistics.median(taken)), ("95 % of them", sorted(taken)[int(0.95 * len(taken))])):
        yield _row(f"search, {name}", "store of papers", f"{PAPERS:,} papers", 50.0, found, "ms", f"slowest {max(taken):.0f} ms", len(taken))  # fmt: skip


@contextmanager
def _server(folder: Path) -> Iterator[tuple[str, int]]:
    """`patchbay ui tiny` on a folder with two maps: its start address and its process."""
    g = torch.Generator().manual_seed(0)
    Result(torch.rand(1024, 1024, generator=g).tril(), ("query", "key"), "attention").save(folder / "results" / "long")
    Result(torch.randn(32, 32, generator=g), ("layer", "head"), "logits").save(folder / "results" / "grid")
    words = [sys.executable, "-m", "patchbay", "ui", "tiny", "--results", str(folder / "results"), "--no-browser"]
    env = os.environ | {"PYTHONPATH": str(Path(pb.__file__).parents[1])}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env) as run:
        assert run.stdout is not None
        yield next(found[1] for line in run.stdout if (found := re.match(r"open (\S+)", line))), run.pid
        run.send_signal(signal.SIGINT)


def _page(folder: Path, parts: tuple[str, ...]) -> Iterator[Row]:
    from playwright.sync_api import sync_playwright

    with _server(folder) as (start, pid), sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(start)
        page.wait_for_selector(".lamp.ready", timeout=300_000)
        if "paint" in parts:
            yield from _painted(page, start.partition("?")[0])
        if "idle" in parts:
            time.sleep(20)  # what is read once the model is there
            before = _processor(pid)
            time.sleep(10)
            yield _row(
                "idle, with a page open", "tiny", "10 s", 1.0, 10 * (_processor(pid) - before), "% of one processor"
            )
        browser.close()


def _painted(page: Any, base: str) -> Iterator[Row]:
    painted = []
    for _ in range(9):
        page.goto("about:blank")
        page.goto(f"{base}#/papers")
        page.wait_for_selector(".paper")
        painted.append(float(page.evaluate(PAINT)))
    yield _row(
        "first paint, median",
        "tiny",
        "front page",
        1000.0,
        statistics.median(painted),
        "ms",
        f"{min(painted):.0f} to {max(painted):.0f} ms",
        9,
    )
    for name, size in (("long", "1,024 x 1,024"), ("grid", "32 x 32")):
        page.goto(f"{base}#/results/{name}")
        page.wait_for_selector(".heat canvas", timeout=120_000)
        page.wait_for_timeout(800)
        page.focus(".heat-scroll")
        yield _row("a step of the pointer, median", "a map", size, 100.0, float(page.evaluate(STEP)), "ms", n=20)


def _processor(pid: int) -> float:
    """Seconds of processor of a process and of those that it started."""
    ticks = os.sysconf("SC_CLK_TCK")
    total = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid or stat.parent.name == str(pid):
            total += (int(fields[11]) + int(fields[12])) / ticks
    return total

"""The papers' pages: what the store of papers answers, as data. One thread holds the store, as SQLite's connections want it.

Where this user has no store the catalogue's papers are there all the same; one that `patchbay papers sync` makes meanwhile is taken.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, TypeVar

from patchbay.errors import PatchbayError
from patchbay.papers import catalogue
from patchbay.papers.feed import opened, views
from patchbay.papers.feed.store import Store

T = TypeVar("T")
ROWS = 60  # papers of one page
FEW = 8  # authors, and similar papers, that are named
ASKED = ("words", "view", "day", "kind", "state", "method", "model", "marked", "rows")
log = logging.getLogger("patchbay.app")
VIEWS = ("all", "trending", *views.PERIODS)


class Papers:
    """The store at `path`, or this user's; read, and marked, from any task."""

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = path
        self._held: Store | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="papers")

    async def ask(self, what: Callable[..., T], *given: Any) -> T:
        """`what(store, *given)`, in the thread that holds the store."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: what(self._store(), *given))

    def _store(self, *, make: bool = False) -> Store:
        held = self._held
        if held is not None and held.path is None and (make or (self.path is None and opened.usual_path().exists())):
            held.db.close()
            held = None
        if held is None:
            held = self._held = opened.opened(self.path, make=make)
        return held

    async def mark(self, name: str, marked: bool) -> dict[str, Any]:
        """Mark a paper, or take the mark away; where there was no store there is one now."""

        def do() -> dict[str, Any]:
            store = self._store(make=True)
            store.mark(views.one(store, name)["id"], marked)
            return {"name": name, "marked": marked}

        return await asyncio.get_running_loop().run_in_executor(self._thread, do)

    def judge(self, *found: str) -> None:
        """Keep a verdict (`Store.judged`); asked later, it is there."""

        def do() -> None:
            try:
                self._store(make=True).judged(*found)
            except (PatchbayError, sqlite3.Error) as error:
                log.warning("the verdict of %s was not kept: %s", found[0], error)

        self._thread.submit(do)

    def close(self) -> None:
        def do() -> None:
            if self._held is not None:
                self._held.db.close()

        self._thread.submit(do)
        self._thread.shutdown()


def listed(store: Store, asked: Mapping[str, str]) -> dict[str, Any]:
    """One page of a view: with `words` what has them, else all, trending, or a day, week or month; and where the ones beside it are.
    Without a view what trends, or all where nothing was liked."""
    other = next((name for name in asked if name not in ASKED), None)
    if other is not None:
        raise PatchbayError(f"papers are asked by {', '.join(ASKED)}; got {other!r}")
    view = asked.get("view") or ("trending" if _liked(store) else "all")
    if view not in VIEWS:
        raise PatchbayError(f"no view {view!r} of papers; there are {', '.join(VIEWS)}")
    kind, state, method, model = (asked.get(name) or None for name in ("kind", "state", "method", "model"))
    wanted = views.Filters(kind, state, method, model, bool(asked.get("marked")))
    n = min(500, int(asked["rows"])) if asked.get("rows", "").isdecimal() else ROWS
    made: dict[str, Any] = {"view": view, "first": None, "last": None, "before": None, "after": None}
    if asked.get("words", "").strip() or view == "all":
        found = views.search(store, asked.get("words", ""), wanted, limit=n + 1)
    elif view == "trending":
        found = views.trending(store, wanted, limit=n + 1)
    else:
        first, last = views.period(_day(store, asked.get("day", "")), view)
        found = views.between(store, first, last, wanted)
        made |= dict(
            zip(("first", "last", "before", "after"), (first, last, *views.beside(store, first, last)), strict=True)
        )
    kinds = sorted(
        {str(entry["kind"]) for entry in catalogue.papers() if entry.get("kind")}
    )  # a listing has none of its own
    (of, dated), judged = store.totals(), store.verdicts()
    made |= {
        "papers": [_short(paper) | _said(judged, paper) for paper in found[:n]],
        "more": max(0, len(found) - n),
        "of": of,
    }
    return made | {"kinds": kinds, "dated": dated, "kept": str(store.path) if store.path else None}


def one(store: Store, name: str) -> dict[str, Any]:
    """A paper whole: what of it runs here, its claim and what was measured, its likes by day, and papers like it."""
    paper = views.one(store, name)
    entry = dict(catalogue.paper(paper["key"])) if paper["key"] else {}
    kept = {key: entry.get(key, "") for key in ("claim", "measured", "command")}
    likes = [{"day": day, "likes": n, "comments": comments} for day, n, comments in views.liked(store, paper)]
    near = views.similar(store, paper, limit=FEW)
    return _short(paper) | kept | {"verdicts": store.verdicts(paper["key"] or "-").get(paper["key"], [])} | {
        "abstract": paper["abstract"], "authors": paper["authors"], "likes_by_day": likes, "similar": [_short(one) for one in near],
    }  # fmt: skip


def _said(judged: Mapping[str, list[dict[str, Any]]], paper: Mapping[str, Any]) -> dict[str, Any]:
    """What the last check of a paper's claim gave, in a line's words."""
    last = judged.get(paper["key"] or "", [{}])[0]
    return {"verdict": f"{last['verdict']} on {last['model']}" if last else ""}


def _liked(store: Store) -> bool:
    return (
        store.db.execute("SELECT 1 FROM papers WHERE published IS NOT NULL AND likes > 0 LIMIT 1").fetchone()
        is not None
    )


def _day(store: Store, text: str) -> date:
    """The day that is asked for; without one the last that has papers."""
    if not text:
        text = (
            store.db.execute("SELECT max(published) FROM papers").fetchone()[0] or datetime.now(UTC).date().isoformat()
        )
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise PatchbayError(f"{text!r} is no day; one is like 2025-10-29") from error


PLAIN = ("key", "arxiv", "title", "marked_title", "year", "published", "likes", "comments", "organization", "n_authors", "code", "kind",
         "does", "headline", "methods", "state", "model", "marked", "heat")  # fmt: skip


def _short(paper: Mapping[str, Any]) -> dict[str, Any]:
    """A paper as a line of a list."""
    snippet = paper.get("snippet") or paper["does"] or paper["abstract"]
    named = paper["key"] or paper["arxiv"] or paper["title"]
    return {key: paper.get(key) for key in PLAIN} | {
        "name": named,
        "authors": paper["authors"][:FEW],
        "snippet": snippet[:400],
    }

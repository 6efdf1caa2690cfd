"""What is asked of a store: papers by words, by day, week or month, by what is liked now, and like another paper.

A paper is a row of the store as a dict: `title`, `abstract`, `arxiv`, `authors`, `published`, `likes`, `marked`, and of those in the
catalogue `key`, `methods`, `state` and the others; `key` is None where the catalogue does not have it. Searching is by BM25 (SQLite's
FTS5), a word of the title counting most; word endings do not matter, and the last word may be begun only.
"""

from __future__ import annotations

import json
import math
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from patchbay.errors import PatchbayError
from patchbay.papers.feed.listed import arxiv_id, title_key
from patchbay.papers.feed.store import TOKENS, Store
from patchbay.signal.port import suggest

WEIGHTS = (8.0, 1.0, 1.0, 2.0, 6.0, 3.0, 1.0, 3.0, 1.0)  # of the index's columns, in their order
NAMING = "title key headline methods"  # columns that say what a paper is
MANY = 1000  # papers that are ranked for one page
OPEN, CLOSE = "\x02", "\x03"  # around words that were searched for
STATES = ("works", "partly", "unmeasured", "not yet", "not a system")
PERIODS = ("day", "week", "month")
Paper = dict[str, Any]


@dataclass(frozen=True)
class Filters:
    """Only papers of this kind, state ("runs here" is works or partly), method ("find.induction_heads") or model, or marked."""

    kind: str | None = None
    state: str | None = None
    method: str | None = None
    model: str | None = None
    marked: bool = False

    def where(self) -> tuple[str, list[Any]]:
        """As SQL: a condition that starts with AND, and its values."""
        parts: list[str] = []
        values: list[Any] = []
        if self.state == "runs here":
            parts.append("papers.state IN ('works', 'partly')")
        elif self.state is not None:
            if self.state not in STATES:
                known = ("runs here", *STATES)
                raise PatchbayError(
                    f"no state {self.state!r}; there are {', '.join(known)}{suggest(self.state, known)}"
                )
            parts, values = [*parts, "papers.state = ?"], [*values, self.state]
        for name, value in (("kind", self.kind), ("model", self.model)):
            if value is not None:
                parts, values = [*parts, f"papers.{name} = ?"], [*values, value]
        if self.method is not None:
            parts.append("' ' || papers.methods || ' ' LIKE ? ESCAPE '\\'")
            values.append("% " + re.sub(r"([%_\\])", r"\\\1", self.method) + " %")
        if parts:
            parts.insert(0, "papers.key >= ''")  # only the catalogue's have these; found by the index of its keys
        if self.marked:
            parts.append("papers.id IN (SELECT paper FROM marks)")
        return "".join(f" AND {part}" for part in parts), values


def search(store: Store, words: str = "", filters: Filters = Filters(), *, limit: int | None = None) -> list[Paper]:
    """Papers in which every word occurs, best first, with the words marked in `title` and `snippet` by OPEN and CLOSE; without
    words all papers, those of the catalogue first.

    With a `limit`, of words that more than MANY papers have, only those count whose NAMING columns have all of them, where these are
    enough, and of these the MANY that were taken in last: ranking all of them is what takes long."""
    terms = re.findall(r"\w+", words)
    where, values = filters.where()
    count = -1 if limit is None else limit
    if not terms:
        order = f"CASE papers.state {' '.join(f'WHEN {state!r} THEN {n}' for n, state in enumerate(STATES))} ELSE 9 END"
        return _papers(
            store,
            f"SELECT papers.* FROM papers WHERE 1 {where} ORDER BY {order}, key, published DESC, id LIMIT ?",
            (*values, count),
        )
    match = " AND ".join(f'"{term}"' if len(term) < 3 else f'"{term}"*' for term in terms)
    ranked = match
    only = f"AND +words.rowid IN (SELECT id FROM papers WHERE 1 {where})" if where else ""
    if limit is not None and _hits(store, match, MANY + 1, only, values) > MANY:
        named = f"{{{NAMING}}} : ({match})"
        if _hits(store, named, limit, only, values) == limit:
            ranked = named
    found = store.db.execute(
        f"""WITH taken AS MATERIALIZED (
            SELECT words.rowid AS found, bm25(words, {", ".join(map(str, WEIGHTS))}) AS rank FROM words
            WHERE words MATCH ? {only} ORDER BY words.rowid DESC LIMIT ?)
        SELECT found FROM taken ORDER BY rank, found LIMIT ?""",
        (ranked, *values, -1 if limit is None else MANY, count),
    )
    return _marked(store, [int(row[0]) for row in found], match.replace(" AND ", " OR "))


def _marked(store: Store, found: Sequence[int], match: str) -> list[Paper]:
    """Papers by their rows, in this order, with the words that match marked: in an index of these alone, since the whole one
    would look through all that has the words, once for each paper."""
    listed = json.dumps(list(found))
    store.db.execute(f"CREATE VIRTUAL TABLE IF NOT EXISTS temp.shown USING fts5(title, abstract, tokenize='{TOKENS}')")
    store.db.execute("DELETE FROM temp.shown")
    store.db.execute("INSERT INTO temp.shown(rowid, title, abstract) SELECT id, title, abstract FROM papers WHERE id IN (SELECT value FROM json_each(?))", (listed,))  # fmt: skip
    asked = f"""
        SELECT papers.*, coalesce(marked.title, papers.title) AS marked_title, coalesce(marked.snippet, '') AS snippet
        FROM json_each(?) AS hits JOIN papers ON papers.id = hits.value LEFT JOIN (
            SELECT rowid AS found, highlight(shown, 0, '{OPEN}', '{CLOSE}') AS title,
                snippet(shown, 1, '{OPEN}', '{CLOSE}', '…', 24) AS snippet FROM temp.shown WHERE shown MATCH ?) AS marked
        ON marked.found = papers.id ORDER BY hits.key"""
    return _papers(store, asked, (listed, match))


def _hits(store: Store, match: str, most: int, only: str, values: Iterable[Any]) -> int:
    """How many papers match, counted up to `most`."""
    asked = f"SELECT count(*) FROM (SELECT 1 FROM words WHERE words MATCH ? {only} LIMIT ?)"
    return int(store.db.execute(asked, (match, *values, most)).fetchone()[0])


def between(store: Store, first: date, last: date, filters: Filters = Filters()) -> list[Paper]:
    """Papers that were published from one day to another, both in it: the newest first, of a day the most liked first."""
    where, values = filters.where()
    return _papers(
        store,
        f"SELECT papers.* FROM papers WHERE published BETWEEN ? AND ? {where} ORDER BY published DESC, likes DESC, id",
        (first.isoformat(), last.isoformat(), *values),
    )


def period(day: date, of: str = "day") -> tuple[date, date]:
    """The first and last day of the day, week (Monday to Sunday) or month that holds a day."""
    if of == "day":
        return day, day
    if of == "week":
        first = day - timedelta(day.weekday())
        return first, first + timedelta(6)
    if of == "month":
        first = day.replace(day=1)
        return first, (first + timedelta(32)).replace(day=1) - timedelta(1)
    raise PatchbayError(f"no period {of!r}; there are {', '.join(PERIODS)}")


def beside(store: Store, first: date, last: date) -> tuple[date | None, date | None]:
    """The nearest days before and after with papers: where "previous" and "next" lead."""
    before = store.db.execute("SELECT max(published) FROM papers WHERE published < ?", (first.isoformat(),)).fetchone()[
        0
    ]
    after = store.db.execute("SELECT min(published) FROM papers WHERE published > ?", (last.isoformat(),)).fetchone()[0]
    return tuple(None if text is None else date.fromisoformat(text) for text in (before, after))  # type: ignore[return-value]


def trending(store: Store, filters: Filters = Filters(), *, limit: int = 20, today: date | None = None) -> list[Paper]:
    """Papers by likes a day: likes / (1 + days since publication), as `heat`. Papers without a date or likes are not in it."""
    where, values = filters.where()
    now = today or datetime.now(UTC).date()
    return _papers(
        store,
        f"""SELECT papers.*, likes / (1.0 + max(0, julianday(?) - julianday(published))) AS heat FROM papers
        WHERE published IS NOT NULL AND likes > 0 {where} ORDER BY heat DESC, id LIMIT ?""",
        (now.isoformat(), *values, limit),
    )


def similar(store: Store, paper: Paper, *, limit: int = 10, words: int = 12) -> list[Paper]:
    """Papers that share the words that mark this one: those of its title and abstract with the largest tf-idf in the store, any of
    them, by BM25."""
    counted = Counter(re.findall(r"[^\W\d_]{3,}", f"{paper['title']} {paper['abstract']} {paper['does']} {paper['headline']}".casefold()))  # fmt: skip
    total = store.db.execute("SELECT count(*) FROM papers").fetchone()[0]
    weighed = []
    for word, times in counted.items():
        holding = store.db.execute("SELECT count(*) FROM words WHERE words MATCH ?", (f'"{word}"',)).fetchone()[0]
        if holding > 1:
            weighed.append((times * math.log(total / holding), word))
    best = [word for _, word in sorted(weighed, key=lambda pair: (-pair[0], pair[1]))[:words]]
    if not best:
        return []
    match = " OR ".join(f'"{word}"' for word in best)
    return _papers(
        store,
        f"""SELECT papers.* FROM (SELECT rowid AS found, bm25(words, {", ".join(map(str, WEIGHTS))}) AS rank FROM words
        WHERE words MATCH ?) AS hits JOIN papers ON papers.id = hits.found WHERE papers.id != ? ORDER BY hits.rank, papers.id LIMIT ?""",
        (match, paper["id"], limit),
    )


def one(store: Store, name: str) -> Paper:
    """The paper of a catalogue's key, an arXiv id or address, or a whole title. Raises PatchbayError with the nearest."""
    by: list[tuple[str, Any]] = [("key", name.strip()), ("title_key", title_key(name))]
    with suppress(PatchbayError):
        by.insert(1, ("arxiv", arxiv_id(name)[0]))
    for column, value in by:
        found = _papers(store, f"SELECT papers.* FROM papers WHERE {column} = ? ORDER BY id", (value,)) if value else []
        if found:
            return found[0]
    keys = [key for (key,) in store.db.execute("SELECT key FROM papers WHERE key IS NOT NULL")]
    raise PatchbayError(
        f"no paper {name!r} among {count(store)}{suggest(name, keys)}; `patchbay papers WORDS` searches them by their words"
    )


def one_by_id(store: Store, paper: int) -> Paper:
    """The paper of a row."""
    return _papers(store, "SELECT papers.* FROM papers WHERE id = ?", (paper,))[0]


def count(store: Store) -> int:
    return int(store.db.execute("SELECT count(*) FROM papers").fetchone()[0])


def liked(store: Store, paper: Paper) -> list[tuple[str, int | None, int | None]]:
    """A paper's likes and comments on the days that they were read."""
    rows = store.db.execute("SELECT day, likes, comments FROM likes WHERE paper = ? ORDER BY day", (paper["id"],))
    return [tuple(row) for row in rows]


def _papers(store: Store, asked: str, values: Iterable[Any]) -> list[Paper]:
    try:
        rows = store.db.execute(asked, tuple(values)).fetchall()
    except sqlite3.Error as error:
        raise PatchbayError(f"the store of papers cannot be read: {error}") from error
    marked = {paper for (paper,) in store.db.execute("SELECT paper FROM marks")}
    return [_paper(row) | {"marked": row["id"] in marked} for row in rows]


def _paper(row: sqlite3.Row) -> Paper:
    paper = dict(row)
    paper["authors"] = json.loads(paper["authors"]) if paper["authors"] else []
    paper["methods"] = paper["methods"].split()
    paper["year"] = paper["year"] or (int(paper["published"][:4]) if paper["published"] else None)
    return paper

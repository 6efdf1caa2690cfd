"""The store of papers: one SQLite file, one row a paper, its likes over time, and an index of its words.

A paper is known by its arXiv id, and by its title (`title_key`) where a listing has none; a listing that brings the id of a paper
known by title gives it to that row. What a listing does not say stays as it was. Each page of a source and the place after it are
written in one transaction, so that a sync that is killed goes on where it was, and loses and repeats nothing; several processes
may write (a write-ahead log; who comes second waits).
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from patchbay.errors import PatchbayError
from patchbay.papers.feed.listed import Listed, title_key

WAIT = 30.0  # seconds for another process to end its write
WORDS = "title, abstract, authors, keywords, key, does, headline, methods, kind"
TOKENS = "porter unicode61 remove_diacritics 2"
# One script a version of the file; a file of version n gets those from the n-th on. A script that was released is not changed.
VERSIONS = (
    f"""
    CREATE TABLE papers(
        id INTEGER PRIMARY KEY, arxiv TEXT UNIQUE, title_key TEXT NOT NULL, title TEXT NOT NULL, abstract TEXT NOT NULL DEFAULT '',
        version INTEGER, authors TEXT NOT NULL DEFAULT '', n_authors INTEGER, organization TEXT NOT NULL DEFAULT '',
        published TEXT, keywords TEXT NOT NULL DEFAULT '', code TEXT NOT NULL DEFAULT '', likes INTEGER, comments INTEGER,
        added TEXT NOT NULL, key TEXT UNIQUE, year INTEGER, kind TEXT NOT NULL DEFAULT '', does TEXT NOT NULL DEFAULT '',
        headline TEXT NOT NULL DEFAULT '', methods TEXT NOT NULL DEFAULT '', state TEXT NOT NULL DEFAULT '',
        model TEXT NOT NULL DEFAULT '');
    CREATE INDEX by_title ON papers(title_key);
    CREATE INDEX by_day ON papers(published);
    CREATE TABLE likes(paper INTEGER REFERENCES papers(id), day TEXT, likes INTEGER, comments INTEGER, PRIMARY KEY (paper, day));
    CREATE TABLE marks(paper INTEGER PRIMARY KEY REFERENCES papers(id), at TEXT NOT NULL);
    CREATE TABLE places(source TEXT PRIMARY KEY, place TEXT NOT NULL, at TEXT NOT NULL);
    CREATE TABLE readers(
        id INTEGER PRIMARY KEY, address TEXT UNIQUE NOT NULL, every TEXT NOT NULL, words TEXT NOT NULL, token TEXT UNIQUE NOT NULL,
        since TEXT NOT NULL);
    CREATE TABLE outbox(
        reader INTEGER REFERENCES readers(id) ON DELETE CASCADE, paper INTEGER REFERENCES papers(id), letter TEXT NOT NULL,
        sent TEXT, PRIMARY KEY (reader, paper));
    CREATE VIRTUAL TABLE words USING fts5(
        {WORDS}, content='papers', content_rowid='id', tokenize='{TOKENS}', prefix='2 3');
    CREATE TRIGGER words_in AFTER INSERT ON papers BEGIN
        INSERT INTO words(rowid, {WORDS}) VALUES (new.id, {", ".join(f"new.{name}" for name in WORDS.split(", "))});
    END;
    CREATE TRIGGER words_out AFTER DELETE ON papers BEGIN
        INSERT INTO words(words, rowid, {WORDS}) VALUES ('delete', old.id, {", ".join(f"old.{name}" for name in WORDS.split(", "))});
    END;
    CREATE TRIGGER words_anew AFTER UPDATE OF {WORDS} ON papers BEGIN
        INSERT INTO words(words, rowid, {WORDS}) VALUES ('delete', old.id, {", ".join(f"old.{name}" for name in WORDS.split(", "))});
        INSERT INTO words(rowid, {WORDS}) VALUES (new.id, {", ".join(f"new.{name}" for name in WORDS.split(", "))});
    END;
    """,
    """
    CREATE TABLE verdicts(
        key TEXT NOT NULL, model TEXT NOT NULL, weights TEXT NOT NULL, verdict TEXT NOT NULL, told TEXT NOT NULL, at TEXT NOT NULL,
        PRIMARY KEY (key, model));
    """,
)


@dataclass(frozen=True)
class Added:
    """What a sync did to the store, in papers."""

    new: int = 0
    changed: int = 0
    same: int = 0

    def __add__(self, other: Added) -> Added:
        return Added(self.new + other.new, self.changed + other.changed, self.same + other.same)

    def __str__(self) -> str:
        return f"{self.new} new, {self.changed} changed, {self.same} as they were"


class Store:
    """An open store: a file, made where there is none, or without a path one in memory. Use it in a `with`."""

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path).expanduser()
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                if self.path.is_dir():
                    raise IsADirectoryError(0, "it is a folder")
            except OSError as error:
                raise PatchbayError(f"no store of papers can be at {self.path}: {error.strerror}") from error
        self.db = sqlite3.connect(self.path or ":memory:", timeout=WAIT, isolation_level=None)
        self.db.row_factory = sqlite3.Row
        self._written = 0  # transactions of this connection
        self._totals: tuple[tuple[int, int], tuple[int, int]] = ((-1, -1), (0, 0))
        try:
            self.db.execute("PRAGMA foreign_keys = ON")
            self.db.execute("PRAGMA journal_mode = WAL")
            self._upgrade()
        except BaseException as error:
            self.db.close()
            if isinstance(error, sqlite3.Error):
                raise PatchbayError(
                    f"{self.path} is no store of papers: {error}; name another file with --store"
                ) from error
            raise

    def _upgrade(self) -> None:
        with self.writing():
            version = self.db.execute("PRAGMA user_version").fetchone()[0]
            if version > len(VERSIONS):
                raise PatchbayError(
                    f"{self.path} is a store of version {version}, newer than this Patchbay reads ({len(VERSIONS)}): upgrade it"
                )
            for script in VERSIONS[version:]:
                for statement in _statements(script):
                    self.db.execute(statement)
            self.db.execute(f"PRAGMA user_version = {len(VERSIONS)}")

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.db.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One transaction: all of what is written in it, or nothing."""
        self.db.execute("BEGIN IMMEDIATE")
        self._written += 1
        try:
            yield
        except BaseException:
            self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")

    def totals(self) -> tuple[int, int]:
        """How many papers there are, and how many with a date; counted again once anybody has written."""
        state = (self.db.execute("PRAGMA data_version").fetchone()[0], self._written)
        if self._totals[0] != state:
            self._totals = state, tuple(self.db.execute("SELECT count(*), count(published) FROM papers").fetchone())
        return self._totals[1]

    # ---- what sources bring ----

    def add(
        self, listed: Iterable[Listed], source: str, place: str | None = None, *, today: date | None = None
    ) -> Added:
        """Take in one page of a source, and with it the place to go on from; in one transaction. Likes are of `today`."""
        counted = Added()
        with self.writing():
            for paper in listed:
                counted += self._take(paper, today or datetime.now(UTC).date())
            if place is not None:
                self.db.execute(
                    "INSERT INTO places VALUES (?, ?, ?) ON CONFLICT(source) DO UPDATE SET place = excluded.place, at = excluded.at",
                    (source, place, now()),
                )
        return counted

    def place(self, source: str) -> str | None:
        """Where the last sync of a source ended."""
        row = self.db.execute("SELECT place FROM places WHERE source = ?", (source,)).fetchone()
        return None if row is None else str(row[0])

    def _take(self, paper: Listed, today: date) -> Added:
        row = self.known(paper)
        told = _told(paper)
        if row is None:
            told |= {"added": now(), "title_key": title_key(paper.title)}
            names = ", ".join(told)
            made = self.db.execute(
                f"INSERT INTO papers({names}) VALUES ({', '.join('?' * len(told))})", tuple(told.values())
            )
            self._like(int(made.lastrowid or 0), paper, today)
            return Added(new=1)
        if (row["version"] or 0) > (paper.version or row["version"] or 0):  # an older version says nothing new
            told = {}
        fresh = {name: value for name, value in told.items() if row[name] != value}
        first = (
            bool(told.get("abstract")) and not row["abstract"]
        )  # known so far from the catalogue, or by its title alone
        if first:
            fresh["added"] = now()
        if "title" in fresh:
            fresh["title_key"] = title_key(paper.title)
        if fresh:
            settings = ", ".join(f"{name} = ?" for name in fresh)
            self.db.execute(f"UPDATE papers SET {settings} WHERE id = ?", (*fresh.values(), row["id"]))
        self._like(row["id"], paper, today)
        return Added(new=1) if first else Added(changed=1) if fresh else Added(same=1)

    def known(self, paper: Listed) -> sqlite3.Row | None:
        """The row of a listed paper: of its id; without one, of its title. An id that is new is of the row with that title and none."""
        if paper.arxiv is not None:
            row = self.db.execute("SELECT * FROM papers WHERE arxiv = ?", (paper.arxiv,)).fetchone()
            if row is not None:
                return row  # type: ignore[no-any-return]
        without = "AND arxiv IS NULL" if paper.arxiv is not None else ""
        return self.db.execute(  # type: ignore[no-any-return]
            f"SELECT * FROM papers WHERE title_key = ? {without} ORDER BY id", (title_key(paper.title),)
        ).fetchone()

    def _like(self, paper: int, listed: Listed, today: date) -> None:
        if listed.likes is not None or listed.comments is not None:
            self.db.execute(
                "INSERT INTO likes VALUES (?, ?, ?, ?) ON CONFLICT(paper, day) DO UPDATE SET likes = excluded.likes, comments = excluded.comments",
                (paper, today.isoformat(), listed.likes, listed.comments),
            )

    # ---- what readers do ----

    def mark(self, paper: int, marked: bool = True) -> None:
        """Mark a paper, or take the mark away."""
        with self.writing():
            if marked:
                self.db.execute("INSERT OR IGNORE INTO marks VALUES (?, ?)", (paper, now()))
            else:
                self.db.execute("DELETE FROM marks WHERE paper = ?", (paper,))

    def judged(self, key: str, model: str, weights: str, verdict: str, told: str) -> None:
        """Keep what the check of a claim gave on a model (its source, and the fingerprint of its weights); the last one stands."""
        with self.writing():
            self.db.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?, ?, ?, ?)", (key, model, weights, verdict, told, now()))  # fmt: skip

    def verdicts(self, key: str | None = None) -> dict[str, list[dict[str, Any]]]:
        """Verdicts by the paper's key, of each the newest first; of one paper, or of all."""
        rows = self.db.execute(f"SELECT * FROM verdicts {'WHERE key = ?' if key else ''} ORDER BY at DESC, model", (key,) if key else ())  # fmt: skip
        found: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            found.setdefault(row["key"], []).append(dict(row))
        return found

    def catalogue(self, entries: Iterable[Mapping[str, Any]], place: str) -> None:
        """Put the catalogue's entries beside their papers, by title; those without a listing get a row. `place` names their state:
        nothing is done where the store has these very entries."""
        if self.place("catalogue") == place:
            return
        names = ("key", "year", "kind", "does", "headline", "methods", "state", "model")
        with self.writing():
            self.db.execute(
                "UPDATE papers SET key = NULL, year = NULL, kind = '', does = '', headline = '', methods = '', state = '', model = ''"
            )
            for entry in entries:
                listed = Listed(entry["title"])
                row = self.known(listed)
                if row is None:
                    self._take(listed, date.today())
                    row = self.known(listed)
                assert row is not None
                told = {**entry, "methods": " ".join(entry["methods"]), "model": entry.get("model", "")}
                self.db.execute(
                    f"UPDATE papers SET {', '.join(f'{name} = ?' for name in names)} WHERE id = ?",
                    (*(told[name] for name in names), row["id"]),
                )
            self.db.execute("INSERT OR REPLACE INTO places VALUES ('catalogue', ?, ?)", (place, now()))


def now() -> str:
    """The moment, UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _told(paper: Listed) -> dict[str, Any]:
    """The columns that a listing says something of."""
    told = {
        "arxiv": paper.arxiv,
        "version": paper.version,
        "title": paper.title,
        "abstract": paper.abstract,
        "authors": json.dumps(paper.authors, ensure_ascii=False) if paper.authors else "",
        "n_authors": len(paper.authors) or paper.n_authors,
        "organization": paper.organization,
        "published": None if paper.published is None else paper.published.isoformat(),
        "keywords": ", ".join(paper.keywords),
        "code": paper.code,
        "likes": paper.likes,
        "comments": paper.comments,
    }
    counts = ("likes", "comments")  # of which 0 says something
    return {
        name: value for name, value in told.items() if value not in (None, "", 0) or (value == 0 and name in counts)
    }


def _statements(script: str) -> Iterator[str]:
    """The statements of a script, for one transaction (`executescript` ends the one that it finds)."""
    held = ""
    for line in script.splitlines(keepends=True):
        held += line
        if sqlite3.complete_statement(held):
            yield held
            held = ""

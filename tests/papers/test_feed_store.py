"""The store: one row a paper, whatever says it and how often; whole after a kill, and beside another process."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from datetime import date
from pathlib import Path

import pytest

from patchbay.errors import PatchbayError
from patchbay.papers.feed import views
from patchbay.papers.feed.listed import Listed
from patchbay.papers.feed.store import Added, Store


def paper(n: int, **given: object) -> Listed:
    return Listed(**{"title": f"Paper number {n}", "abstract": f"About thing{n} and others.", **given})  # type: ignore[arg-type]


def test_the_same_page_twice_adds_nothing_and_what_is_not_said_stays() -> None:
    with Store() as store:
        assert store.add([paper(1, likes=3), paper(2)], "a") == Added(new=2)
        assert store.add([paper(1, likes=3), paper(2)], "a") == Added(same=2)
        assert store.add([Listed("PAPER NUMBER 1")], "b") == Added(changed=1)  # its title, as the other writes it
        found = views.one(store, "paper number 1")
        assert (found["abstract"], found["likes"]) == ("About thing1 and others.", 3)


def test_an_id_that_comes_later_is_given_to_the_paper_of_that_title_and_two_ids_are_two_papers() -> None:
    with Store() as store:
        store.add([paper(1)], "page")
        assert store.add([paper(1, arxiv="2401.00001")], "hub") == Added(changed=1)
        assert store.add([paper(1, arxiv="2402.00002")], "hub") == Added(new=1)
        assert views.count(store) == 2
        assert store.add([paper(1, arxiv="2401.00001", title="Paper one, renamed")], "hub") == Added(changed=1)
        assert views.one(store, "2401.00001")["title"] == "Paper one, renamed"
        assert views.one(store, "Paper one, renamed")["arxiv"] == "2401.00001"


def test_an_older_version_changes_nothing_and_a_newer_one_does() -> None:
    with Store() as store:
        store.add([paper(1, arxiv="2401.00001", version=2)], "a")
        assert store.add([paper(1, arxiv="2401.00001", version=1, abstract="old")], "a") == Added(same=1)
        assert store.add([paper(1, arxiv="2401.00001", version=3, abstract="newer words")], "a") == Added(changed=1)
        assert [row["abstract"] for row in views.search(store, "newer")] == ["newer words"]
        assert views.search(store, "thing1") == []  # the index follows


def test_likes_are_kept_by_day() -> None:
    with Store() as store:
        for day, likes in ((1, 3), (2, 8), (2, 9)):
            store.add([paper(1, likes=likes, comments=1)], "a", today=date(2025, 5, day))
        found = views.one(store, "Paper number 1")
        assert views.liked(store, found) == [("2025-05-01", 3, 1), ("2025-05-02", 9, 1)]
        assert found["likes"] == 9


def test_a_page_and_its_place_are_written_together_or_not_at_all() -> None:
    def breaking() -> object:
        yield paper(1)
        raise RuntimeError("the connection broke")

    with Store() as store:
        with pytest.raises(RuntimeError):
            store.add(breaking(), "a", "7")  # type: ignore[arg-type]
        assert (views.count(store), store.place("a")) == (0, None)
        store.add([paper(1)], "a", "7")
        assert (views.count(store), store.place("a")) == (1, "7")


WRITER = """
import sys, time
from patchbay.papers.feed.store import Store
from patchbay.papers.feed.listed import Listed
with Store(sys.argv[1]) as store:
    start = int(store.place("s") or 0)
    for n in range(start, 60):
        store.add([Listed(f"Paper {n} {m}", "words") for m in range(20)], sys.argv[2], str(n + 1))
        print(n, flush=True)
        time.sleep(0.01)
"""


def test_a_sync_that_is_killed_goes_on_where_it_was_and_two_may_write_at_once(tmp_path: Path) -> None:
    file, environment = tmp_path / "papers.sqlite", {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    first = subprocess.Popen([sys.executable, "-c", WRITER, str(file), "s"], env=environment, stdout=subprocess.PIPE)
    assert first.stdout is not None
    while int(first.stdout.readline()) < 8:
        pass
    beside = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(file), "other"], env=environment, stdout=subprocess.DEVNULL
    )
    first.send_signal(signal.SIGKILL)
    first.wait()
    first.stdout.close()
    with Store(file) as store:
        reached = int(store.place("s") or 0)
        assert reached >= 8
    again = subprocess.run(
        [sys.executable, "-c", WRITER, str(file), "s"], env=environment, capture_output=True, check=True
    )
    assert int(again.stdout.split()[0]) == reached  # nothing repeated
    assert beside.wait(timeout=60) == 0
    with Store(file) as store:
        assert views.count(store) == 60 * 20  # nothing lost, nothing twice


def test_files_that_are_no_store_or_a_newer_one_are_refused_and_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("not a database, and long enough to be looked at as one " * 20)
    with pytest.raises(PatchbayError, match="no store of papers"):
        Store(other)
    assert other.read_text().startswith("not a database")
    newer = tmp_path / "newer.sqlite"
    with closing(sqlite3.connect(newer)) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(PatchbayError, match="version 99, newer than this Patchbay reads"):
        Store(newer)
    with pytest.raises(PatchbayError, match="no store of papers can be at"):
        Store(other / "below" / "papers.sqlite")


def test_the_catalogue_stands_beside_its_papers_and_follows_its_changes() -> None:
    entry = {"key": "one2024", "title": "Paper Number 1", "year": 2024, "kind": "mechanism", "does": "does it", "headline": "", "methods": ["find.x"], "state": "works"}  # fmt: skip
    with Store() as store:
        store.add([paper(1), paper(2)], "a")
        store.catalogue([entry, {**entry, "key": "three2024", "title": "Only in the catalogue"}], "first")
        assert views.count(store) == 3
        assert views.one(store, "one2024")["abstract"].startswith("About thing1")
        store.catalogue([{**entry, "state": "partly"}], "first")  # the same state: nothing is read
        assert views.one(store, "one2024")["state"] == "works"
        store.catalogue([{**entry, "state": "partly"}], "second")
        assert views.one(store, "one2024")["state"] == "partly"
        assert views.one(store, "Only in the catalogue")["key"] is None
        before = views.one(store, "Only in the catalogue")["added"]
        time.sleep(1.01)
        assert store.add([Listed("Only in the catalogue", "its abstract")], "a") == Added(
            new=1
        )  # first seen in a source
        assert views.one(store, "Only in the catalogue")["added"] > before


def test_verdicts_are_kept_by_model_and_the_last_one_stands(tmp_path: Path) -> None:
    file = tmp_path / "a.sqlite"
    with Store(file) as store:
        store.judged("olsson2022", "tiny", "aa", "inconclusive", "first")
        store.judged("olsson2022", "tiny", "bb", "confirmed", "then")
        store.judged("olsson2022", "gpt2", "cc", "not confirmed", "there")
    with Store(file) as store:
        found = store.verdicts("olsson2022")["olsson2022"]
        assert {(one["model"], one["weights"], one["verdict"], one["told"]) for one in found} == {
            ("tiny", "bb", "confirmed", "then"),
            ("gpt2", "cc", "not confirmed", "there"),
        }
        assert store.verdicts("other2022") == {}
        assert list(store.verdicts()) == ["olsson2022"]


def test_a_store_of_the_first_version_is_upgraded_with_all_that_is_in_it(tmp_path: Path) -> None:
    file = tmp_path / "a.sqlite"
    with Store(file) as store:
        store.add([paper(1, likes=3)], "a", "7")
        store.db.execute("DROP TABLE verdicts")
        store.db.execute("PRAGMA user_version = 1")
    with Store(file) as store:
        assert (views.count(store), store.place("a"), store.verdicts()) == (1, "7", {})
        store.judged("olsson2022", "tiny", "aa", "confirmed", "told")

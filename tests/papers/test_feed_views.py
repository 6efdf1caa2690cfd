"""What is asked of a store: words, days, what is liked, what is alike."""

from __future__ import annotations

import math
import re
from collections import Counter
from datetime import date
from pathlib import Path

import pytest

from patchbay.errors import PatchbayError
from patchbay.papers import catalogue
from patchbay.papers.feed import views
from patchbay.papers.feed.listed import Listed
from patchbay.papers.feed.opened import opened
from patchbay.papers.feed.store import Store
from patchbay.papers.feed.views import CLOSE, OPEN, Filters


def test_search_ranks_titles_first_and_needs_every_word() -> None:
    with opened() as store:
        assert views.search(store, "attention sink")[0]["key"] == "gu2024"
        assert views.search(store, "induction heads")[0]["title"] == "In-context Learning and Induction Heads"
        assert views.search(store, "knob zebra") == []
        assert {paper["key"] for paper in views.search(store)} == {entry["key"] for entry in catalogue.papers()}
        assert views.search(store)[0]["state"] == "works"
        marked = views.search(store, "induction head")[0]["marked_title"]
        assert f"{OPEN}Induction{CLOSE} {OPEN}Heads{CLOSE}" in marked
        assert views.search(store, "induc")[0]["key"] == "olsson2022"  # a word that is begun


def test_search_takes_anything_that_is_typed() -> None:
    with opened() as store:
        for words in ('"', "AND OR NOT", "a*b(c", "NEAR(", "'; DROP TABLE papers", "é", "-", "\x00", "title:x"):
            assert len(views.search(store, words)) <= views.count(store)


def test_filters_keep_what_they_say() -> None:
    with opened() as store:
        here = views.search(store, "", Filters(state="runs here"))
        assert {paper["state"] for paper in here} == {"works", "partly"}
        found = views.search(store, "", Filters(method="find.induction_heads"))
        assert {paper["key"] for paper in found} == {
            e["key"] for e in catalogue.papers() if "find.induction_heads" in e["methods"]
        }
        assert views.search(store, "", Filters(method="find.induction%")) == []
        store.mark(found[0]["id"])
        assert [paper["key"] for paper in views.search(store, "", Filters(marked=True))] == [found[0]["key"]]
        assert views.search(store, "heads", Filters(marked=True, kind="no kind")) == []
        store.mark(found[0]["id"], False)
        assert views.search(store, "", Filters(marked=True)) == []
        with pytest.raises(PatchbayError, match="no state 'work'; .*works"):
            views.search(store, "", Filters(state="work"))


def days() -> Store:
    store = Store()
    on = {1: date(2024, 2, 28), 2: date(2024, 2, 29), 3: date(2024, 3, 1), 4: date(2024, 3, 11)}
    store.add(
        [Listed(f"Paper {n}", published=day, likes=n) for n, day in on.items()] + [Listed("No day", likes=99)], "a"
    )
    return store


def test_days_weeks_and_months_with_what_lies_beside() -> None:
    assert views.period(date(2024, 2, 10), "month") == (date(2024, 2, 1), date(2024, 2, 29))
    assert views.period(date(2024, 12, 31), "month") == (date(2024, 12, 1), date(2024, 12, 31))
    assert views.period(date(2024, 3, 1), "week") == (date(2024, 2, 26), date(2024, 3, 3))
    with days() as store:
        week = views.period(date(2024, 3, 1), "week")
        assert [paper["title"] for paper in views.between(store, *week)] == ["Paper 3", "Paper 2", "Paper 1"]
        assert views.beside(store, *week) == (None, date(2024, 3, 11))
        assert views.beside(store, date(2024, 3, 1), date(2024, 3, 1)) == (date(2024, 2, 29), date(2024, 3, 11))
    with pytest.raises(PatchbayError, match="no period 'year'"):
        views.period(date(2024, 3, 1), "year")


def test_trending_is_likes_by_age_as_stated() -> None:
    with days() as store:
        today = date(2024, 3, 12)
        found = views.trending(store, today=today)
        stated = {n: n / (1 + (today - day).days) for n, day in ((1, date(2024, 2, 28)), (2, date(2024, 2, 29)), (3, date(2024, 3, 1)), (4, date(2024, 3, 11)))}  # fmt: skip
        assert [paper["title"] for paper in found] == [f"Paper {n}" for n in sorted(stated, key=lambda n: -stated[n])]
        assert [paper["heat"] for paper in found] == pytest.approx(sorted(stated.values(), reverse=True))


def test_similar_papers_share_the_words_with_the_largest_tf_idf() -> None:
    with opened() as store:
        paper = views.one(store, "elhage2021")
        found = views.similar(store, paper, limit=5)
        assert paper["id"] not in {one["id"] for one in found}
        texts = {entry["key"]: f"{entry['title']} {entry['does']} {entry['headline']} {' '.join(entry['methods'])}".casefold() for entry in catalogue.papers()}  # fmt: skip
        counted = Counter(re.findall(r"[^\W\d_]{3,}", texts["elhage2021"]))
        rare = sorted(
            counted,
            key=lambda word: (
                -counted[word] * math.log(len(texts) / max(1, sum(word in text for text in texts.values())))
            ),
        )
        assert all(any(word[:4] in texts[one["key"]] for word in rare[:16]) for one in found)
    with Store() as empty:
        assert views.similar(empty, {"id": 1, "title": "x", "abstract": "", "does": "", "headline": ""}) == []


def test_a_paper_is_named_by_key_id_or_title() -> None:
    with opened() as store:
        store.add([Listed("In-context learning and induction heads", arxiv="2209.11895")], "hub")
        names = (
            "olsson2022",
            "2209.11895",
            "https://arxiv.org/abs/2209.11895v1",
            "In-context Learning and Induction Heads",
        )
        assert {views.one(store, name)["id"] for name in names} == {views.one(store, "olsson2022")["id"]}
        with pytest.raises(PatchbayError, match="olsson2022"):
            views.one(store, "olson2022")
        with pytest.raises(PatchbayError, match="no paper"):
            views.one(store, "")


def test_the_first_of_many_hits_are_those_of_all_with_their_words_marked() -> None:
    with Store() as store:
        store.add(
            [Listed(f"Zebra {'stripes ' * (i % 7)}{i}", f"A zebra, the {i}-th.", likes=i % 3) for i in range(60)], "a"
        )
        everything = views.search(store, "zebra")
        first = views.search(store, "zebra", limit=7)
        assert [one["id"] for one in first] == [one["id"] for one in everything][:7]
        assert [one["marked_title"] for one in first] == [one["marked_title"] for one in everything][:7]
        assert all(views.OPEN in one["snippet"] for one in first)
        store.mark(everything[50]["id"])
        (marked,) = views.search(store, "zebra", views.Filters(marked=True), limit=7)
        assert marked["id"] == everything[50]["id"], "what is filtered is filtered before the first are taken"


def test_of_very_many_hits_those_that_name_it_are_ranked_and_the_last_ones_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where few papers have the words nothing is left out; where many have, the page is of those that carry them in the title."""
    with Store() as store:
        rows = [Listed(f"{'Zebra' if i % 4 == 0 else 'Horse'} {i}", f"A zebra, the {i}-th.") for i in range(80)]
        store.add(rows, "a")
        everything = [one["title"] for one in views.search(store, "zebra")]
        assert len(everything) == 80
        assert [one["title"] for one in views.search(store, "zebra", limit=30)] == everything[:30]
        monkeypatch.setattr(views, "MANY", 12)
        some = [one["title"] for one in views.search(store, "zebra", limit=10)]
        last = [f"Zebra {i}" for i in range(80) if i % 4 == 0][-12:]
        assert some == [title for title in everything if title in last][:10]
        mixed = [one["title"] for one in views.search(store, "zebra", limit=30)]  # 20 titles are not enough for a page
        assert mixed == [title for title in everything if title in [row.title for row in rows[-12:]]]
        assert [one["title"] for one in views.search(store, "zeb horse 79", limit=5)] == ["Horse 79"]


def test_words_are_marked_wherever_they_stand_and_what_stands_elsewhere_is_found_too() -> None:
    with Store() as store:
        store.add([Listed("Of horses", "Nothing to see.", authors=("Ada Zebra",)), Listed("Zebras", "A horse.")], "a")
        by_author, both = views.search(store, "zebra horse", limit=5)[::-1]
        assert by_author["marked_title"] == f"Of {OPEN}horses{CLOSE}"
        assert by_author["snippet"] == "Nothing to see."
        assert (both["marked_title"], both["snippet"]) == (f"{OPEN}Zebras{CLOSE}", f"A {OPEN}horse{CLOSE}.")


def test_totals_follow_every_write_of_anybody(tmp_path: Path) -> None:
    with Store(tmp_path / "a.sqlite") as store, Store(tmp_path / "a.sqlite") as other:
        assert store.totals() == (0, 0)
        store.add([Listed("One", published=date(2025, 1, 1)), Listed("Two")], "a")
        assert store.totals() == other.totals() == (2, 1)
        other.add([Listed("Three")], "b")
        assert store.totals() == other.totals() == (3, 1)

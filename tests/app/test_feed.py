"""The papers' pages say what the store says: searched, by day, trending, marked, and one whole."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from patchbay.app import feed
from patchbay.app.feed import Papers
from patchbay.errors import PatchbayError
from patchbay.papers import catalogue
from patchbay.papers.feed import opened, views
from patchbay.papers.feed.listed import Listed


@pytest.fixture
def papers(tmp_path: Path) -> Iterator[Papers]:
    with opened.opened(tmp_path / "papers.sqlite", make=True) as store:
        store.add(
            [
                Listed("Induction of zebras", "Zebras <b>run</b>.", "2501.00001", published=date(2025, 1, 1), likes=10, authors=("A One", "B Two")),
                Listed("Zebras again", "More zebras.", "2501.00002", published=date(2025, 1, 2), likes=1),
                Listed("Of whales", "No stripes.", "2502.00003", published=date(2025, 2, 3)),
            ],
            "test",
        )  # fmt: skip
    made = Papers(tmp_path / "papers.sqlite")
    yield made
    made.close()


def ask(papers: Papers, what: Any, *given: Any) -> Any:
    return asyncio.run(papers.ask(what, *given))


def names(made: dict[str, Any]) -> list[str]:
    return [paper["name"] for paper in made["papers"]]


def test_views_are_those_of_the_store(papers: Papers) -> None:
    found = ask(papers, feed.listed, {"words": "zebra"})
    assert set(names(found)) == {"2501.00001", "2501.00002"}
    assert "\x02Zebras\x03" in "".join(paper["marked_title"] for paper in found["papers"])
    assert names(ask(papers, feed.listed, {"view": "month", "day": "2025-01-20"})) == ["2501.00002", "2501.00001"]
    day = ask(papers, feed.listed, {"view": "day"})
    assert (names(day), str(day["first"]), str(day["before"]), day["after"]) == (
        ["2502.00003"],
        "2025-02-03",
        "2025-01-02",
        None,
    )
    front = ask(papers, feed.listed, {})
    assert (front["view"], names(front)) == ("trending", ["2501.00001", "2501.00002"])
    assert front["of"] == len(catalogue.papers()) + 3
    runs = ask(papers, feed.listed, {"view": "all", "state": "runs here", "rows": "500"})
    assert {paper["state"] for paper in runs["papers"]} == {"works", "partly"}
    assert len(runs["papers"]) == sum(entry["state"] in ("works", "partly") for entry in catalogue.papers())
    assert ask(papers, feed.listed, {"view": "all", "rows": "5"})["more"] == 1


def test_a_paper_is_told_with_its_claim_what_was_measured_and_its_neighbours(papers: Papers) -> None:
    made, entry = ask(papers, feed.one, "olsson2022"), catalogue.paper("olsson2022")
    assert [made[key] for key in ("claim", "measured", "command", "state")] == [
        entry[key] for key in ("claim", "measured", "command", "state")
    ]
    assert made["similar"]
    one = ask(papers, feed.one, "2501.00001")
    assert one["abstract"] == "Zebras <b>run</b>.", "text, which the page escapes"
    assert (one["claim"], one["key"], one["authors"]) == ("", None, ["A One", "B Two"])
    assert [day["likes"] for day in one["likes_by_day"]] == [10]


def test_marks_are_kept_and_filtered(papers: Papers) -> None:
    asyncio.run(papers.mark("2501.00002", True))
    assert names(ask(papers, feed.listed, {"view": "all", "marked": "1"})) == ["2501.00002"]
    asyncio.run(papers.mark("2501.00002", False))
    assert names(ask(papers, feed.listed, {"view": "all", "marked": "1"})) == []


def test_without_a_store_the_catalogue_is_there_and_a_store_made_meanwhile_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATCHBAY_PAPERS", str(tmp_path / "mine.sqlite"))
    papers = Papers()
    first = ask(papers, feed.listed, {})
    assert (first["of"], first["dated"], first["kept"], first["view"]) == (len(catalogue.papers()), 0, None, "all")
    with opened.opened(make=True) as store:
        store.add([Listed("A new paper", arxiv="2503.00001", published=date(2025, 3, 1))], "test")
    then = ask(papers, feed.listed, {})
    assert (then["of"], then["dated"]) == (len(catalogue.papers()) + 1, 1)
    asyncio.run(papers.mark("2503.00001", True))
    with opened.opened() as store:
        assert views.one(store, "2503.00001")["marked"]
    papers.close()


@pytest.mark.parametrize(
    ("asked", "said"),
    [({"view": "year"}, "no view 'year'"), ({"view": "day", "day": "never"}, "no day"), ({"state": "fine"}, "no state 'fine'"), ({"order": "x"}, "got 'order'")],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_by_name(asked: dict[str, str], said: str, papers: Papers) -> None:
    with pytest.raises(PatchbayError, match=said):
        ask(papers, feed.listed, asked)
    with pytest.raises(PatchbayError, match="no paper 'nothing'"):
        ask(papers, feed.one, "nothing")


def test_a_verdict_is_kept_and_shown_on_its_paper(papers: Papers) -> None:
    assert ask(papers, feed.one, "olsson2022")["verdicts"] == []
    papers.judge("olsson2022", "tiny", "aa", "confirmed", "confirmed: as the paper says")
    (one,) = ask(papers, feed.one, "olsson2022")["verdicts"]
    assert (one["model"], one["weights"], one["verdict"], one["told"]) == ("tiny", "aa", "confirmed", "confirmed: as the paper says")  # fmt: skip
    listed = ask(papers, feed.listed, {"words": "induction"})["papers"]
    assert {paper["name"]: paper["verdict"] for paper in listed}["olsson2022"] == "confirmed on tiny"
    assert {paper["verdict"] for paper in listed if paper["name"] != "olsson2022"} == {""}
    assert ask(papers, feed.one, "2501.00001")["verdicts"] == []

"""Feeds as other programs read them: the same papers in all three forms, whatever their titles hold."""

from __future__ import annotations

import json
from datetime import date

import feedparser
import pytest

from patchbay.errors import PatchbayError
from patchbay.papers.feed import views
from patchbay.papers.feed.listed import Listed
from patchbay.papers.feed.opened import opened
from patchbay.papers.feed.published import FORMS, feed

HOSTILE = 'A <script>alert(1)</script> & "title" \x00\x0b with ]]> ∞'


def papers() -> list[dict[str, object]]:
    with opened() as store:
        store.add(
            [
                Listed(HOSTILE, "An <b>abstract</b>.", "2401.00001", authors=("Ada & Co",), published=date(2024, 1, 2)),
                Listed("In-context Learning and Induction Heads", "About them.", published=date(2022, 9, 24)),
            ],
            "a",
        )
        return [views.one(store, "2401.00001"), views.one(store, "olsson2022")]


@pytest.mark.parametrize("form", ["atom", "rss"])
def test_readers_find_the_papers_in_order(form: str) -> None:
    read = feedparser.parse(feed(papers(), form), sanitize_html=False)
    assert not read.bozo
    assert read.entries[0].link == "https://arxiv.org/abs/2401.00001"
    assert len({entry.id for entry in read.entries}) == 2
    assert "∞" in read.entries[0].title
    assert "alert(1)" in read.entries[0].title  # as text
    assert "find.induction_heads" in read.entries[1].summary
    assert "script>" not in feed(papers(), form).replace("&lt;script&gt;", "").replace("&lt;/script&gt;", "")


def test_the_json_feed_holds_the_same() -> None:
    read = json.loads(feed(papers(), "json"))
    assert read["version"] == "https://jsonfeed.org/version/1.1"
    assert [item["title"] for item in read["items"]] == [HOSTILE, "In-context Learning and Induction Heads"]
    assert read["items"][0]["date_published"].startswith("2024-01-02")


def test_no_papers_make_a_feed_and_other_forms_are_refused() -> None:
    for form in FORMS:
        assert not feedparser.parse(feed([], form)).entries
    with pytest.raises(PatchbayError, match="no form of feed 'xml'"):
        feed([], "xml")

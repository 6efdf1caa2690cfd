"""Saved pages of Daily Papers: both forms, what they lack, and what is refused."""

from __future__ import annotations

from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchbay.errors import PatchbayError
from patchbay.papers import catalogue
from patchbay.papers.feed.listed import title_key
from patchbay.papers.feed.page import read_page
from tests.shared import SHARED

HEAD = "new\n\nGet trending papers in your email inbox!\n\nSubscribe\n\nDaily Papers\n\nbyAK and the research community\n\nFeb 2\n\n"
LONG = (
    HEAD
    + "A first title\n\nIts abstract.\n\nIn two parts.\n\n  • 4 authors\n·\nOct 9, 2018 12\n\nA second\n\nAbout it.\n\ntau Tel Aviv University\n·\nJan 31, 2024\n"
)
SHORT = HEAD + "A first title\n\nIts abstract.\n\nA second\n\nAbout it.\n"


def test_the_long_form_has_authors_days_and_likes() -> None:
    first, second = read_page(LONG)
    assert (first.title, first.abstract) == ("A first title", "Its abstract. In two parts.")
    assert (first.n_authors, first.published, first.likes) == (4, date(2018, 10, 9), 12)
    assert (second.n_authors, second.organization) == (None, "tau Tel Aviv University")
    assert (second.published, second.likes) == (date(2024, 1, 31), None)


def test_the_short_form_is_titles_and_abstracts_in_turn() -> None:
    assert [(paper.title, paper.abstract) for paper in read_page(SHORT)] == [
        ("A first title", "Its abstract."),
        ("A second", "About it."),
    ]
    assert read_page(SHORT)[0].published is None


def test_thousands_of_likes_are_read_as_such() -> None:
    for text, likes in (("1.2k", 1200), ("1,234", 1234), ("0", 0)):
        assert read_page(LONG.replace("2018 12", f"2018 {text}"))[0].likes == likes


@pytest.mark.parametrize("ending", ["\r\n", "\n"])
def test_line_ends_and_marks_of_other_systems_do_not_matter(ending: str) -> None:
    assert read_page("\ufeff" + LONG.replace("\n", ending)) == read_page(LONG)


def test_what_is_no_page_or_is_cut_is_refused_with_the_place() -> None:
    for text in ("", "a text", "<html>", HEAD.replace("Feb 2", "")):
        with pytest.raises(PatchbayError, match="no saved page of Daily Papers"):
            read_page(text)
    with pytest.raises(PatchbayError, match="breaks off after 1 papers, at 'A second'"):
        read_page(SHORT[: SHORT.index("About")])
    with pytest.raises(PatchbayError, match="breaks off after 1 papers, at 'A second'"):
        read_page(LONG[: LONG.index("tau")])
    with pytest.raises(PatchbayError, match="is no date"):
        read_page(LONG.replace("Oct 9", "Oct 39"))


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=300))
def test_any_text_is_read_or_refused(text: str) -> None:
    for whole in (text, HEAD + text, LONG + text):
        try:
            read_page(whole)
        except PatchbayError:
            continue


@pytest.mark.skipif(not (SHARED / "feed").is_dir(), reason=f"no saved pages at {SHARED / 'feed'}")
def test_real_pages_are_read_whole_and_each_paper_is_in_the_catalogue() -> None:
    pages = [read_page(path.read_text(encoding="utf-8")) for path in sorted((SHARED / "feed").glob("*.txt"))]
    assert [len(page) for page in pages] == [31, 41, 52, 48]
    keys = {title_key(paper.title) for page in pages for paper in page}
    assert len(keys) == 157
    assert keys <= {title_key(entry["title"]) for entry in catalogue.papers()}
    assert all(len(paper.abstract) > 300 for page in pages for paper in page)
    assert all(paper.published for page in pages[:2] for paper in page)

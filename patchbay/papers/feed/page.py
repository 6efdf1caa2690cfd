"""A Daily Papers page saved as plain text: titles and abstracts in turn, with or without a line of authors, date and likes.

The text of such a page starts with what stands around the papers (its name, a field for mail, the day that it shows). After
that come paragraphs: a title, an abstract, and in the longer form three lines, `• 4 authors` or the name of an organization, a
dot, and the date of publication with the likes, where there are any.
"""

from __future__ import annotations

import re
from datetime import date, datetime
from itertools import pairwise

from patchbay.errors import PatchbayError
from patchbay.papers.feed.listed import Listed

DAY = re.compile(r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]* \d{1,2}")  # that the page shows
DATED = re.compile(rf"({DAY.pattern}, \d{{4}})(?:\s+([\d.,]+)(k?))?", re.I)
AUTHORS = re.compile(r"•\s*(\d[\d,]*)\s+authors?")


def read_page(text: str, what: str = "this text") -> list[Listed]:
    """The papers of a saved page, in its order. Raises PatchbayError with the place where it is not as such pages are."""
    blocks = [block.strip() for block in re.split(r"\n[^\S\n]*\n", text.replace("\r\n", "\n").lstrip("\ufeff"))]
    blocks = [block for block in blocks if block]
    head = next((i for i, block in enumerate(blocks) if DAY.fullmatch(block)), None)
    if head is None:
        raise PatchbayError(
            f"{what} is no saved page of Daily Papers: no line with the day that it shows, such as 'Mar 17', stands before the papers"
        )
    rest = blocks[head + 1 :]
    ends = [i + 1 for i, block in enumerate(rest) if _is_meta(block)]
    if not ends:  # the short form: title and abstract in turn
        ends = list(range(2, len(rest) + 2, 2))
    papers: list[Listed] = []
    for begin, end in pairwise([0, *ends, *([len(rest)] if ends and ends[-1] < len(rest) else [])]):
        title, *told = rest[begin:end]
        meta = told.pop() if told and _is_meta(told[-1]) else ""
        if not told or (end == len(rest) and ends[-1] < len(rest)):
            raise PatchbayError(
                f"{what} breaks off after {len(papers)} papers, at {' '.join(title.split())[:60]!r}; save the page whole"
            )
        papers.append(_listed(" ".join(title.split()), " ".join(" ".join(told).split()), meta))
    return papers


def _is_meta(block: str) -> bool:
    lines = block.splitlines()
    return len(lines) >= 2 and lines[-2].strip() == "·" and DATED.fullmatch(lines[-1].strip()) is not None


def _listed(title: str, abstract: str, meta: str) -> Listed:
    if not meta:
        return Listed(title, abstract)
    *by, _, last = (line.strip() for line in meta.splitlines())
    dated = DATED.fullmatch(last)
    assert dated is not None
    authors = AUTHORS.fullmatch(" ".join(by))
    return Listed(
        title,
        abstract,
        n_authors=int(authors[1].replace(",", "")) if authors else None,
        organization="" if authors else " ".join(by),
        published=_date(dated[1]),
        likes=round(float(dated[2].replace(",", "")) * (1000 if dated[3] else 1)) if dated[2] else None,
    )


def _date(text: str) -> date:
    """`Oct 9, 2018`, by English names whatever the locale."""
    months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
    month, day, year = re.fullmatch(r"(\w{3})\w* (\d+), (\d+)", text).groups()  # type: ignore[union-attr]
    try:
        return datetime(int(year), months.index(month.title()) + 1, int(day)).date()
    except ValueError as error:
        raise PatchbayError(f"{text!r} is no date") from error

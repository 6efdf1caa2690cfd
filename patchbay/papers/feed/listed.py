"""A paper as a source lists it, and by what two listings are known to be of the same paper."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from datetime import date

from patchbay.errors import PatchbayError

ARXIV = re.compile(r"(?:arxiv:|https?://arxiv\.org/(?:abs|pdf)/)?((?:\d{4}\.\d{4,5})|(?:[a-z-]+(?:\.[A-Z]{2})?/\d{7}))(?:v(\d+))?(?:\.pdf)?", re.I)  # fmt: skip
SYMBOLS = {r"\infty": "∞"}  # what LaTeX writes and titles elsewhere show


@dataclass(frozen=True)
class Listed:
    """One paper as one source shows it. What a source does not say is None or empty."""

    title: str
    abstract: str = ""
    arxiv: str | None = None  # without its version
    version: int | None = None
    authors: tuple[str, ...] = ()
    n_authors: int | None = None
    organization: str = ""
    published: date | None = None
    likes: int | None = None
    comments: int | None = None
    keywords: tuple[str, ...] = ()
    code: str = ""  # address of its repository

    def __post_init__(self) -> None:
        if not title_key(self.title):
            raise PatchbayError(f"a paper needs a title with a letter or digit in it, got {self.title[:80]!r}")


def title_key(title: str) -> str:
    """A title without what differs between listings of it: case, accents, spaces, punctuation, LaTeX's signs."""
    for latex, sign in SYMBOLS.items():
        title = title.replace(latex, sign)
    title = unicodedata.normalize("NFKD", re.sub(r"\\[a-zA-Z]+", " ", title)).casefold()
    kept = "".join(letter for letter in title if not unicodedata.combining(letter))
    return " ".join(re.findall(r"[^\W_]+|∞", kept))


def arxiv_id(text: str) -> tuple[str, int | None]:
    """The identifier and version of an arXiv id or address: `2410.12999v2` is ("2410.12999", 2). Raises PatchbayError."""
    found = ARXIV.fullmatch(text.strip())
    if found is None:
        raise PatchbayError(f"{text!r} is no arXiv id; one is like 2410.12999, 2410.12999v2 or cs/0112017")
    return found[1], int(found[2]) if found[2] else None

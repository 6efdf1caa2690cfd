"""Where papers are listed: saved pages, Hugging Face's Daily Papers, arXiv. Each brings pages of `Listed`, and where to go on.

Hugging Face is asked through its own client, arXiv through its Atom API (https://info.arxiv.org/help/api/user-manual.html), whose
terms allow one request in three seconds. A source's pages come oldest request first, each with a place: given back, the source goes
on behind it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode
from urllib.request import urlopen

from patchbay.errors import PatchbayError
from patchbay.papers.feed.listed import Listed, arxiv_id
from patchbay.papers.feed.page import read_page

HUB = "https://huggingface.co"
ARXIV = "https://export.arxiv.org/api/query"
BETWEEN = 3.0  # seconds between two requests to arXiv
PAGE = 100  # papers a request
LONGEST = 64_000_000  # bytes of one answer or file
TRIES = 3


class Page(NamedTuple):
    """Papers of one request, and where the source goes on after it (None: it does not)."""

    listed: Sequence[Listed]
    place: str | None


def saved(path: str | Path) -> Iterator[Page]:
    """A Daily Papers page saved as plain text."""
    file = Path(path)
    try:
        if file.stat().st_size > LONGEST:
            raise PatchbayError(f"{file} has {file.stat().st_size:,} bytes; a saved page has at most {LONGEST:,}")
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PatchbayError(f"{file} is no plain text in UTF-8 (byte {error.start}); save the page as text") from error
    except OSError as error:
        raise PatchbayError(f"{file} cannot be read: {error.strerror}") from error
    yield Page(read_page(text, str(file)), None)


def hugging_face(
    *, day: str | None = None, week: str | None = None, month: str | None = None, sort: str | None = None,
    place: str | None = None, endpoint: str | None = None, wait: Callable[[float], None] = time.sleep,
) -> Iterator[Page]:  # fmt: skip
    """Daily Papers of a day (2025-10-29), a week (2025-W44) or a month (2025-10), or the latest; `sort` "trending" or "publishedAt".
    Papers without a title are left out. A request that fails is tried again, twice, before PatchbayError."""
    from huggingface_hub import HfApi

    api, page = HfApi(endpoint=endpoint or HUB), int(place or 0)
    while True:
        found = _tried(lambda: list(api.list_daily_papers(date=day, week=week, month=month, sort=sort, p=page, limit=PAGE)), "Hugging Face", wait)  # type: ignore[arg-type]  # noqa: B023  # fmt: skip
        if not found:
            return
        page += 1
        yield Page([_of_hub(paper) for paper in found if paper.title], str(page))
        if len(found) < PAGE:
            return


def _of_hub(paper: Any) -> Listed:
    try:
        identifier, version = arxiv_id(paper.id or "")
    except PatchbayError:
        identifier, version = None, None
    return Listed(
        " ".join(paper.title.split()),
        " ".join((paper.summary or "").split()),
        identifier,
        version,
        tuple(author.name for author in paper.authors or () if author.name),
        organization=(paper.organization.fullname or paper.organization.name or "") if paper.organization else "",
        published=paper.published_at.date() if paper.published_at else None,
        likes=paper.upvotes,
        comments=paper.comments,
        keywords=tuple(paper.ai_keywords or ()),
        code=paper.github_repo or "",
    )


def arxiv(
    query: str, *, place: str | None = None, endpoint: str = ARXIV, wait: Callable[[float], None] = time.sleep
) -> Iterator[Page]:
    """Papers of an arXiv query (`cat:cs.CL AND abs:induction`), by the day they were first submitted, oldest first, so that those
    that come later stand behind the place where a sync ended."""
    start = int(place or 0)
    asked = False
    while True:
        if asked:
            wait(BETWEEN)
        asked = True
        given = {"search_query": query, "start": start, "max_results": PAGE, "sortBy": "submittedDate", "sortOrder": "ascending"}  # fmt: skip

        def ask(address: str = f"{endpoint}?{urlencode(given)}") -> bytes:
            with urlopen(address, timeout=60) as answer:
                return bytes(answer.read(LONGEST + 1))

        listed = read_atom(_tried(ask, "arXiv", wait))
        if not listed:
            return
        start += len(listed)
        yield Page(listed, str(start))
        if len(listed) < PAGE:
            return


def read_atom(content: bytes) -> list[Listed]:
    """The papers of an answer of arXiv. Raises PatchbayError where it is none, is cut, or says that the query is wrong."""
    try:
        import feedparser  # type: ignore[import-untyped]
    except ImportError as error:
        raise PatchbayError("arXiv's answers are read by feedparser: pip install 'patchbay-lm[feed]'") from error
    if len(content) > LONGEST:
        raise PatchbayError(f"arXiv answered {len(content):,} bytes, more than {LONGEST:,}")
    feed = feedparser.parse(content)
    if feed.bozo or "title" not in feed.feed:
        why = feed.get("bozo_exception", "no feed")
        raise PatchbayError(f"arXiv's answer is no whole Atom feed ({why}): ask again later")
    listed = []
    for entry in feed.entries:
        if "/api/errors" in entry.get("id", ""):
            raise PatchbayError(f"arXiv refuses the query: {entry.get('summary', '')}")
        identifier, version = arxiv_id(entry.id)
        listed.append(
            Listed(
                " ".join(entry.title.split()),
                " ".join(entry.get("summary", "").split()),
                identifier,
                version,
                tuple(author.name for author in entry.get("authors", ()) if author.get("name")),
                published=date(*entry.published_parsed[:3]) if entry.get("published_parsed") else None,
                keywords=tuple(tag.term for tag in entry.get("tags", ())),
            )
        )
    return listed


def days(since: date, until: date) -> Iterator[str]:
    """Every day from one to another, both in it, as sources are asked for it."""
    for n in range((until - since).days + 1):
        yield (since + timedelta(n)).isoformat()


def _tried(ask: Callable[[], Any], who: str, wait: Callable[[float], None]) -> Any:
    """What a request answers, asked again after a failure, a little later each time; not after one that says the request is wrong."""
    for n in range(TRIES):
        try:
            return ask()
        except Exception as error:  # clients raise errors of many kinds
            status = getattr(error, "code", None) or getattr(getattr(error, "response", None), "status_code", None)
            wrong = isinstance(status, int) and 400 <= status < 500 and status != 429
            if n == TRIES - 1 or wrong:
                why = (str(error) or type(error).__name__).splitlines()[0]
                raise PatchbayError(
                    f"{who} did not answer: {why}; what was read before is kept, and the same call goes on"
                ) from error
            wait(BETWEEN * 2**n)
    raise AssertionError

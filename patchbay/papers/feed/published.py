"""Papers of a store as feeds that readers take: Atom (RFC 4287), RSS 2.0 and JSON Feed 1.1."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree as Xml

from patchbay.errors import PatchbayError
from patchbay.signal.port import suggest

TITLE = "Papers on language models"
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
FORMS = ("atom", "rss", "json")
ATOM = "http://www.w3.org/2005/Atom"


def feed(papers: Sequence[dict[str, Any]], form: str = "atom", *, title: str = TITLE) -> str:
    """The papers, in their order, as text of one feed. Raises PatchbayError on a form that is not one of FORMS."""
    made = {"atom": _atom, "rss": _rss, "json": _json}
    if form not in made:
        raise PatchbayError(f"no form of feed {form!r}; there are {', '.join(FORMS)}{suggest(form, FORMS)}")
    return made[form](papers, title)


def address(paper: dict[str, Any]) -> str:
    """Where a paper is read: on arXiv; without an id, searched there by its title."""
    if paper["arxiv"]:
        return f"https://arxiv.org/abs/{paper['arxiv']}"
    return f"https://arxiv.org/search/?query={quote(paper['title'])}&searchtype=title"


def runs_here(paper: dict[str, Any]) -> str:
    """What of a paper Patchbay runs, in a line; empty where nothing."""
    if not paper["methods"]:
        return ""
    return f"Runs here ({paper['state']}): {', '.join(paper['methods'])}; patchbay papers show {paper['key']}"


def told(paper: dict[str, Any]) -> str:
    """What a reader is shown under the title."""
    parts = (paper["abstract"] or paper["does"], runs_here(paper))
    return "\n\n".join(part for part in parts if part)


def _when(paper: dict[str, Any]) -> datetime:
    text = paper["published"] or paper["added"][:10]
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def _name(paper: dict[str, Any]) -> str:
    """What names the paper for good, whatever else changes."""
    return address(paper) if paper["arxiv"] else "urn:patchbay:paper:" + quote(paper["title_key"].replace(" ", "-"))


def _text(parent: Xml.Element, name: str, text: str, **given: str) -> Xml.Element:
    made = Xml.SubElement(parent, name, given)
    made.text = NOT_XML.sub("", text)
    return made


def _written(root: Xml.Element) -> str:
    Xml.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + Xml.tostring(root, encoding="unicode") + "\n"


def _latest(papers: Sequence[dict[str, Any]]) -> datetime:
    return max((_when(paper) for paper in papers), default=datetime(1970, 1, 1, tzinfo=UTC))


def _atom(papers: Sequence[dict[str, Any]], title: str) -> str:
    root = Xml.Element("feed", xmlns=ATOM)
    _text(root, "title", title)
    _text(root, "id", "urn:patchbay:papers")
    _text(root, "updated", _latest(papers).isoformat())
    for paper in papers:
        entry = Xml.SubElement(root, "entry")
        _text(entry, "title", paper["title"])
        _text(entry, "id", _name(paper))
        Xml.SubElement(entry, "link", href=address(paper))
        _text(entry, "updated", _when(paper).isoformat())
        for author in paper["authors"] or [paper["organization"] or "unknown"]:
            _text(Xml.SubElement(entry, "author"), "name", author)
        _text(entry, "summary", told(paper))
    return _written(root)


def _rss(papers: Sequence[dict[str, Any]], title: str) -> str:
    root = Xml.Element("rss", version="2.0")
    channel = Xml.SubElement(root, "channel")
    _text(channel, "title", title)
    _text(channel, "link", "https://arxiv.org/list/cs.CL/recent")
    _text(channel, "description", "Each with what of it Patchbay runs.")
    for paper in papers:
        item = Xml.SubElement(channel, "item")
        _text(item, "title", paper["title"])
        _text(item, "link", address(paper))
        _text(item, "guid", _name(paper), isPermaLink="false")
        _text(item, "pubDate", format_datetime(_when(paper)))
        _text(item, "description", told(paper))
    return _written(root)


def _json(papers: Sequence[dict[str, Any]], title: str) -> str:
    items = [
        {
            "id": _name(paper),
            "url": address(paper),
            "title": paper["title"],
            "content_text": told(paper),
            "date_published": _when(paper).isoformat(),
            "authors": [{"name": name} for name in paper["authors"]],
        }
        for paper in papers
    ]
    document = {"version": "https://jsonfeed.org/version/1.1", "title": title, "items": items}
    return json.dumps(document, ensure_ascii=False, indent=1) + "\n"

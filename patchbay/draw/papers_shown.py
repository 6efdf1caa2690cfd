"""Papers on the terminal: a list with what runs here, one paper, and a checked claim run by run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from patchbay.draw.coloured import DIM
from patchbay.draw.screen import ACCENT, BAD, GOOD, escaped, table

if TYPE_CHECKING:
    from rich.table import Table

    from patchbay.papers.claims import Checked

OPEN, CLOSE = "\x02", "\x03"  # around words that were searched for


def papers_table(found: Sequence[Mapping[str, Any]], n: int, *, caption: str = "") -> Table:
    """The first papers of a list; words that were searched for are marked in their titles."""
    cells = [[paper["key"] or paper.get("arxiv") or "", paper["year"] or "", paper["state"] or "not yet", _title(paper), ", ".join(paper["methods"])] for paper in found[:n]]  # fmt: skip
    more = f"{len(found) - n} more; --rows {len(found)} lists them" if len(found) > n else ""
    return table(
        f"{len(found)} paper{'' if len(found) == 1 else 's'}",
        ("key", "year", "state", "title", "methods"),
        cells,
        caption="; ".join(part for part in (more, caption) if part),
    )


def _title(paper: Mapping[str, Any]) -> str:
    text = escaped(paper.get("marked_title") or paper["title"]).replace(OPEN, f"[{ACCENT}]").replace(CLOSE, "[/]")
    return f"{text} [{DIM}]({paper['likes']} likes)[/]" if paper.get("likes") else text


def paper_lines(paper: Mapping[str, Any], entry: Mapping[str, Any] | None = None) -> list[str]:
    """One paper of the store, with its entry of the catalogue where it has one."""
    held = {**paper, **(entry or {})}
    lines = [f"[bold]{escaped(held['title'])}[/] ({held['year'] or 'no year'}) [{DIM}]{held['key'] or held['arxiv'] or ''}{', ' + held['kind'] if held['kind'] else ''}[/]"]  # fmt: skip
    by = ", ".join(paper["authors"][:8]) + (
        f" and {len(paper['authors']) - 8} more" if len(paper["authors"]) > 8 else ""
    )
    count = paper["n_authors"]
    rows = {
        "by": by or paper["organization"] or (f"{count} author{'' if count == 1 else 's'}" if count else ""),
        "published": paper["published"],
        "likes": paper["likes"],
        "code": paper["code"],
        "arxiv": paper["arxiv"],
        "does": held["does"],
        "headline": held["headline"],
        "abstract": paper["abstract"],
        "state": held["state"] or "not yet: the catalogue has no entry; `patchbay papers add` makes one",
        "claim": held.get("claim"),
        "measured": held.get("measured"),
        "methods": ", ".join(held["methods"]) or "none",
        "run": f"patchbay papers run {held['key']} --model {held['model']}" if held.get("claim") else "",
    }
    return lines + [f"{name:>9}  {escaped(str(value))}" for name, value in rows.items() if value]


def claim_lines(found: Checked) -> list[str]:
    """The verdict, what was claimed, and every run: the model by seed, then untrained networks of its form."""
    style = {"confirmed": GOOD, "not confirmed": BAD}.get(found.verdict, "yellow")
    return [f"[{style}]{found.verdict}[/] ({found.kind}): {escaped(found.first.text)}", *map(escaped, found.told())]

"""Requests that cannot be met, and what may have been meant. Imports nothing of the package."""

from __future__ import annotations

from difflib import get_close_matches


class PatchbayError(ValueError):
    """A request that cannot be met. The message says what was asked, what was found and what is possible."""


def suggest(asked: str, known: list[str] | tuple[str, ...]) -> str:
    """`; did you mean ...?` when something near `asked` is known, else the empty string."""
    near = get_close_matches(asked, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ""

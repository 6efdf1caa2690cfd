"""Requests that cannot be met, and what may have been meant. Imports nothing of the package."""

from __future__ import annotations

import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from traceback import extract_tb
from typing import Any

PACKAGE = str(Path(__file__).parent) + os.sep


class PatchbayError(ValueError):
    """A request that cannot be met. The message says what was asked, what was found and what is possible."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the user's line and the message, not the way through the library."""
        own = [frame for frame in extract_tb(self.__traceback__) if not frame.filename.startswith(PACKAGE)]
        asked = [frame for frame in own if "/lib/python" not in frame.filename] or own
        where = [f"line {asked[-1].lineno}: {asked[-1].line}".rstrip(": ")] if asked else []
        return [*where, f"{type(self).__name__}: {self}"]


def suggest(asked: str, known: list[str] | tuple[str, ...]) -> str:
    """`; did you mean ...?` when something near `asked` is known, else the empty string."""
    near = get_close_matches(asked, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ""


def one_of(name: str, value: Any, possible: Iterable[Any]) -> None:
    """Raise PatchbayError where an option has a value that it does not take."""
    known = list(possible)
    if value not in known:
        names = [str(one) for one in known]
        raise PatchbayError(f"{name}={value!r}; possible are {', '.join(names)}" + suggest(str(value), names))


class EditNeverMade(UserWarning):
    """A block of edits ended and the model had not run in it."""

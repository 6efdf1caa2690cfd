"""The text of tokens as they come, and where it ends: letters that take several tokens are waited for, and so is what may be a stop.

What is told piece by piece is, put together, the text of all tokens after their prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BEFORE, MOST = 8, 32  # tokens that are decoded again before the new ones, and at most with them
LETTER = 4  # bytes that a letter takes at most, each of which may be a token
UNFINISHED = "\ufffd"  # what a part of a letter is decoded as


class Words:
    """The text after a prompt, token by token. `stopped`: one of the stops has come, and the text ended before it. `late`: nobody asks
    for it before its end, so that it is decoded once, unless there are stops to look for."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str] = (), *, late: bool = False) -> None:
        self.tokenizer, self.stops, self.stopped = tokenizer, tuple(stops), False
        self.late = late and not self.stops
        self.window = list(prompt[-BEFORE:])
        self.seen = self._decode(self.window)
        self.waited = 0  # tokens since a letter was whole
        self.held = ""  # text that may be the beginning of a stop

    def add(self, token: int) -> str:
        """The text that is certain now."""
        self.window.append(token)
        if self.late:
            return ""
        text = self._decode(self.window)
        self.waited = self.waited + 1 if text.endswith(UNFINISHED) else 0
        if 0 < self.waited < LETTER:
            return ""
        fresh = text[_common(self.seen, text) :]
        self.seen = text
        if len(self.window) >= MOST and not self.waited:
            self.window = self.window[-BEFORE:]
            self.seen = self._decode(self.window)
        return self._checked(fresh)

    def end(self) -> str:
        """What was held back, where no more comes."""
        if self.stopped:
            return ""
        text = self._decode(self.window)
        rest = self._checked(text[_common(self.seen, text) :])
        self.seen = text
        rest, self.held = rest + ("" if self.stopped else self.held), ""
        return rest

    def _checked(self, fresh: str) -> str:
        self.held += fresh
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.stopped, told, self.held = True, self.held[: min(found)], ""
            return told
        kept = max((_begun(self.held, stop) for stop in self.stops), default=0)
        told, self.held = self.held[: len(self.held) - kept], self.held[len(self.held) - kept :]
        return told

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""


def _begun(text: str, stop: str) -> int:
    """How many letters at the end of a text are the beginning of a stop."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _common(one: str, other: str) -> int:
    if other.startswith(one):
        return len(one)
    least = min(len(one), len(other))
    return next((at for at in range(least) if one[at] != other[at]), least)

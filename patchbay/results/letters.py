"""Labels and tokens on one line of a terminal: their spaces shown, how wide they are, padded to a width."""

from __future__ import annotations

import unicodedata
from typing import Any


def padded(text: str, width: int) -> str:
    return text + " " * (width - wide(text))


def right(text: str, width: int) -> str:
    return " " * (width - wide(text)) + text


def wide(text: str) -> int:
    """How many columns of a terminal a text takes."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def visible(label: Any, longest: int = 18) -> str:
    """A label that shows its spaces and line breaks, cut where long."""
    if isinstance(label, float):
        return f"{label:g}"
    text = str(label).replace("\n", "\\n").replace("\t", "\\t")
    text = "".join(character if character.isprintable() else "\ufffd" for character in text)
    if text != text.strip():
        text = text.replace(" ", "\u2423")
    return text if len(text) <= longest else text[: longest - 1] + "\u2026"

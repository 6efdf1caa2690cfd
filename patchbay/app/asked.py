"""What looks share: the prompt that is asked about, and a card as tables. Runs in the worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import patchbay as pb
from patchbay.errors import PatchbayError

MOST_TOKENS = 2048


def checked_text(model: pb.Model, asked: Mapping[str, Any]) -> str:
    """The prompt that is asked about. Raises PatchbayError where it is none, or longer than the page reads."""
    text = asked.get("text")
    if not isinstance(text, str) or not text:
        raise PatchbayError("a prompt is a text of one letter or more")
    n = len(model.encode(text)[0])
    if n > MOST_TOKENS:
        raise PatchbayError(
            f"the page reads prompts of up to {MOST_TOKENS:,} tokens, this one has {n:,}; pb.run reads longer ones"
        )
    return text


def sections(made: Any) -> dict[str, Any]:
    """A card as tables of rows by name."""
    tables = [
        {"title": title, "rows": [dict(zip(columns, row, strict=True)) for row in rows]}
        for title, columns, rows in made.sections()
    ]
    return {"title": made.title, "sections": tables}

"""A map of cells as lines of a terminal, coloured by value."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

    from patchbay.results import maps

DIM = "dim"


def coloured(drawn: maps.Map, width: int) -> Text:
    """A map as lines of coloured cells; plain numbers where the terminal has no colours."""
    from rich.text import Text

    from patchbay.results import letters, maps

    made = Text(no_wrap=True, overflow="ignore")
    for start, end, left, widths in maps.blocks(drawn, width):
        made.append("\n  " + letters.padded(drawn.axes[0], left), DIM)
        for name, one in zip(drawn.columns[start:end], widths, strict=True):
            made.append(letters.right(name, one), DIM)
        for name, values, texts in zip(drawn.rows, drawn.values, drawn.texts, strict=True):
            made.append("\n  " + letters.padded(name, left), DIM)
            for value, text, one in zip(values[start:end], texts[start:end], widths, strict=True):
                ground = drawn.colour(value)
                paint = f"{maps.ink(ground)} on rgb({','.join(map(str, ground))})"
                made.append(letters.right(text, one), paint)
    return made

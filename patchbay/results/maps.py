"""The cells of a two-axis Result as a map: labels, numbers as text, a colour for each; as lines, and as a table of HTML.

The one place where a cell becomes text and colour: the terminal, a pipe, a notebook and a report show the same numbers. A Result
whose cells are named (table "cells": the label on each axis and a `text`, such as a token) shows that name before the number.
Signed values run from red over white (0) to blue, others from white (the lowest, or 0) to blue.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from patchbay.results.arrays import Arrays
from patchbay.results.letters import padded, right, visible, wide

MAX_CELLS = 1500  # above it the strongest cells are listed instead
WIDE = 118
NAMES = {"layer": "L", "head": "H", "neuron": "N", "expert": "E"}
RED, WHITE, BLUE, GREY = (213, 94, 0), (255, 255, 255), (0, 114, 178), (217, 222, 228)


@dataclass(frozen=True)
class Map:
    """Cells [row, column]: their values, what they print, and the limits of the colours."""

    axes: tuple[str, str]
    rows: list[str]
    columns: list[str]
    values: list[list[float]]
    texts: list[list[str]]
    low: float
    high: float

    def colour(self, value: float) -> tuple[int, int, int]:
        """Red, green and blue of a value, 0 to 255; grey where there is none."""
        if not math.isfinite(value):
            return GREY
        if self.low < 0:
            share = value / max(-self.low, self.high)
        else:
            share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.0
        end = BLUE if share >= 0 else RED
        red, green, blue = (round(w + min(1.0, abs(share)) * (e - w)) for w, e in zip(WHITE, end, strict=True))
        return red, green, blue


def map_of(result: Arrays) -> Map | None:
    """The map of a Result's main variable; None where it has not two axes, no cells, or more than are read one by one."""
    if len(result.axes) != 2 or not 0 < result.values.numel() <= MAX_CELLS:
        return None
    values = result.values.double().tolist()
    finite = [value for row in values for value in row if math.isfinite(value)]
    numbers = _formatted(finite)
    names = names_of(result)
    labels = [result.labels_of(axis) for axis in result.axes]
    texts = [
        [
            f"{names.get((str(r), str(c)), '')} {numbers(value)}".strip()
            for c, value in zip(labels[1], line, strict=True)
        ]
        for r, line in zip(labels[0], values, strict=True)
    ]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    shown = [labels_of(result, axis) for axis in result.axes]
    return Map((result.axes[0], result.axes[1]), shown[0], shown[1], values, texts, 0.0 if 0 <= low < high / 2 else low, high)  # fmt: skip


def strongest(result: Arrays, n: int) -> list[tuple[str, float]]:
    """The cells of largest size of a Result of several axes, by their place: `layer L3, key subject`."""
    flat = result.values.double().flatten()
    places = (~flat.isnan()).nonzero()[:, 0]
    order = places[flat[places].abs().argsort(descending=True, stable=True)][:n]
    labels = [labels_of(result, axis) for axis in result.axes]
    found = []
    for place in order.tolist():
        steps, left = [], place
        for axis, names in zip(reversed(result.axes), reversed(labels), strict=True):
            left, step = divmod(left, len(names))
            steps.append(f"{axis} {names[step]}")
        found.append((", ".join(reversed(steps)), float(flat[place])))
    return found


# --- text ---------------------------------------------------------------------------------------------


def blocks(drawn: Map, width: int = WIDE) -> Iterator[tuple[int, int, int, list[int]]]:
    """Runs of columns that fit side by side in `width` letters: first, last + 1, width of the row names, widths of the columns."""
    left = max(wide(text) for text in [drawn.axes[0], *drawn.rows])
    widths = [max(wide(name), *(wide(line[i]) for line in drawn.texts)) + 1 for i, name in enumerate(drawn.columns)]
    start = 0
    while start < len(widths):
        end, used = start + 1, left + 1 + widths[start]
        while end < len(widths) and used + widths[end] <= width:
            used += widths[end]
            end += 1
        yield start, end, left, widths[start:end]
        start = end


def lines(drawn: Map, width: int = WIDE) -> list[str]:
    """The map as plain text: the columns that fit, then the next ones below."""
    found = []
    for start, end, left, widths in blocks(drawn, width):
        found.append(padded(drawn.axes[0], left) + "".join(right(name, w) for name, w in zip(drawn.columns[start:end], widths, strict=True)))  # fmt: skip
        for name, texts in zip(drawn.rows, drawn.texts, strict=True):
            cells = "".join(right(text, w) for text, w in zip(texts[start:end], widths, strict=True))
            found.append((padded(name, left) + cells).rstrip())
    return found


# --- HTML ---------------------------------------------------------------------------------------------


def as_html(drawn: Map) -> str:
    """The map as a table of HTML that needs no style sheet; everything in it is escaped."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in drawn.columns)
    corner = html.escape(f"{drawn.axes[0]} \\ {drawn.axes[1]}")
    body = []
    for name, values, texts in zip(drawn.rows, drawn.values, drawn.texts, strict=True):
        cells = "".join(_cell(drawn.colour(value), text) for value, text in zip(values, texts, strict=True))
        body.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
    return f'<table class="map"><thead><tr><th>{corner}</th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def _cell(colour: tuple[int, int, int], text: str) -> str:
    ground = "#" + "".join(f"{part:02x}" for part in colour)
    return f'<td style="background:{ground};color:{ink(colour)};text-align:right">{html.escape(text)}</td>'


def ink(colour: tuple[int, int, int]) -> str:
    """Black or white, whichever is read on a colour."""
    red, green, blue = colour
    return "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 130 else "#1f2933"


# --- labels and numbers -------------------------------------------------------------------------------


def labels_of(result: Arrays, axis: str) -> list[str]:
    """Names of the steps of an axis: `L3`, `H5`, strengths; positions with their token where the Result knows it."""
    tokens = {str(row.get(axis)): str(row.get("token")) for row in result.tables.get("tokens", []) if axis in row}
    found = []
    for label in result.labels_of(axis):
        text = f"{NAMES[axis]}{label}" if axis in NAMES and isinstance(label, int) else visible(label)
        found.append(f"{text} {visible(tokens[str(label)], 12)}" if tokens.get(str(label)) else text)
    return found


def names_of(result: Arrays) -> dict[tuple[str, str], str]:
    """What the cells are called, by the labels of both axes."""
    rows, columns = result.axes
    return {
        (str(row[rows]), str(row[columns])): visible(row["text"], 12)
        for row in result.tables.get("cells", [])
        if {rows, columns, "text"} <= set(row)
    }


def _formatted(finite: list[float]) -> Any:
    """One format for all cells: three figures of the largest, or powers of ten where all are tiny or huge."""
    most = max((abs(value) for value in finite), default=0.0)
    if most and not 1e-3 <= most < 1e6:
        return lambda value: f"{value:.2g}" if math.isfinite(value) else ""
    decimals = max(0, 2 - math.floor(math.log10(most))) if most else 0
    decimals = 0 if all(float(value).is_integer() for value in finite) else min(decimals, 3)

    def shown(value: float) -> str:
        text = f"{value:.{decimals}f}" if math.isfinite(value) else ""
        return text[1:] if text.startswith("-") and not float(text) else text

    return shown

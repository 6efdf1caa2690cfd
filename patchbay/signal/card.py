"""Small tables of HTML for notebooks: a title and rows, all text escaped, no style sheet, no script."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any


def card(title: str, rows: Sequence[Sequence[Any]], *, columns: Sequence[str] = (), below: str = "") -> str:
    """A title over a table; the first cell of a row is its name where there are no column names."""
    numeric = [
        bool(rows) and all(_is_number(row[i]) for row in rows if i < len(row))
        for i in range(max(map(len, rows), default=0))
    ]
    sides = [
        ' style="text-align:right"' if number else ' style="text-align:left"' for number in numeric
    ]  # notebooks set all to the right
    head = "".join(
        f"<th{side}>{html.escape(str(name))}</th>"
        for name, side in zip(columns, [*sides, *[""] * len(columns)], strict=False)
    )
    body = []
    for row in rows:
        cells = [f"<td{side}>{html.escape(str(cell))}</td>" for cell, side in zip(row, sides, strict=False)]
        if not columns and cells:
            cells[0] = cells[0].replace("<td", "<th", 1).replace("</td>", "</th>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    table = (
        f"<table>{f'<thead><tr>{head}</tr></thead>' if head else ''}<tbody>{''.join(body)}</tbody></table>"
        if rows
        else ""
    )
    small = f"<small>{html.escape(below)}</small>" if below else ""
    return f"<div><b>{html.escape(title)}</b>{table}{small}</div>"


def _is_number(cell: Any) -> bool:
    try:
        float(cell)
    except (TypeError, ValueError):
        return False
    return True

"""Small tables of HTML for notebooks: a title and rows, all text escaped, no style sheet, no script."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any


def card(title: str, rows: Sequence[Sequence[Any]], *, columns: Sequence[str] = (), below: str = "") -> str:
    """A title over a table; the first cell of a row is its name where there are no column names."""
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in columns)
    body = []
    for row in rows:
        cells = [f"<td>{html.escape(str(cell))}</td>" for cell in row]
        if not columns and cells:
            cells[0] = cells[0].replace("<td>", "<th>", 1).replace("</td>", "</th>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    table = (
        f"<table>{f'<thead><tr>{head}</tr></thead>' if head else ''}<tbody>{''.join(body)}</tbody></table>"
        if rows
        else ""
    )
    small = f"<small>{html.escape(below)}</small>" if below else ""
    return f"<div><b>{html.escape(title)}</b>{table}{small}</div>"

"""Cables: what a Result says of channels or edges between parts, as lines from a writer to a reader with a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from patchbay.results.result import Result

MOST = 500
NAMED = ("edge", "unit")  # columns of tables whose cells are `L0.H1 -> L1.H2.q`
SCORES, CHANCES = ("effect", "score", "value"), ("p_adjusted", "p")


def cables(result: Result, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Lines in the order of their rank; of a circuit how many are enough for it (`smallest`). None where a Result has none.

    `rows`: the Result's ranking, of which parts that are channels (`L0.H1.C3>L2.H0.q`) are lines.
    """
    found = _lines(rows, "part", ">")
    for table in result.tables.values():
        for column in NAMED:
            found = found or _lines(table, column, "->")
    if not found:
        return None
    smallest = float(result["smallest"]) if "smallest" in result and result["smallest"].ndim == 0 else None
    enough = int(smallest) if smallest is not None and smallest == smallest else None
    return {"lines": found[:MOST], "n": len(found), "smallest": enough}


def _lines(rows: Sequence[Mapping[str, Any]], column: str, arrow: str) -> list[dict[str, Any]]:
    made = []
    for row in rows:
        source, between, target = str(row.get(column) or "").partition(arrow)
        score = next((row[name] for name in SCORES if isinstance(row.get(name), int | float)), None)
        if between and score is not None and score == score:
            p = next((row[name] for name in CHANCES if isinstance(row.get(name), int | float)), None)
            made.append({"from": source.strip(), "to": target.strip(), "score": float(score), "p": p})
    return made

"""A Result for the terminal: its ranked table with signed bars, strongest by size first, or its cells as a map in colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from patchbay.draw import screen
from patchbay.draw.coloured import coloured
from patchbay.results import maps
from patchbay.results.result import Result

if TYPE_CHECKING:
    from rich.console import RenderableType

MAIN, FIRST = 6, ("p_adjusted", "low", "high", "p", "null_mean", "null_high", "standard_error")
MAP_ROWS = 32  # of a ranked grid, below its table


def of_result(result: Result, n: int, columns: str = "main") -> list[RenderableType | str]:
    """A Result for the terminal: its ranked table with bars, strongest by size first, or its own text where it ranks nothing;
    notes and origin. `columns`: "main", six with the bar, or "all"."""
    if result.shown:
        tables = [line for title, held, said in result.sections() for line in screen.shown(title, held, said)]
        notes = [f"[{screen.DIM}]note: {escape(note)}[/]" for note in result.other_notes]
        return [*tables, *notes, f"[{screen.DIM}]{escape(result.origin())}[/]"]
    if not result.ranked:
        return _of_cells(result, n)
    rows = result.told(n, by="abs")
    largest, signed = max((abs(row["value"]) for row in rows), default=0.0), any(row["value"] < 0 for row in rows)
    known = list(rows[0]) if rows else result.columns
    shown, left_out = main_columns(known) if columns == "main" else (known, [])
    cells = [
        [_cell(row[name]) for name in shown] + [screen.bar(float(row["value"]), largest, signed=signed)] for row in rows
    ]
    measured = int((~result.values.isnan()).sum())
    title = f"{result.provenance.get('method', 'Result')}: {result.name} in {result.unit or 'no unit'}"
    said = [f"{len(rows)} of {measured} parts"] if measured > len(rows) else []
    said += ["largest first, either sign"] if signed else []
    said += [f"--columns all: {', '.join(left_out)}"] if left_out else []
    notes = [f"[{screen.DIM}]note: {escape(note)}[/]" for note in result.notes]
    made = screen.table(title, [*shown, ""], cells, caption="; ".join(said))
    return [made, *_grid(result), *notes, f"[{screen.DIM}]{escape(result.origin())}[/]"]


def main_columns(columns: Sequence[str]) -> tuple[list[str], list[str]]:
    """The columns that are shown first, at most five beside the bar, and the others: rank, part, value, words, then the interval, p
    and null."""
    fixed = [name for name in columns if name in ("rank", "part", "value", "tokens")]
    others = [name for name in columns if name not in fixed]
    order = sorted(others, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    chosen = set(order[: MAIN - 1 - len(fixed)])
    return [name for name in columns if name in fixed or name in chosen], [
        name for name in others if name not in chosen
    ]


def _cell(value: Any) -> Any:
    return value if isinstance(value, int | float) else escape(str(value))


def _grid(result: Result) -> list[RenderableType | str]:
    """The whole map of a ranked grid such as layers by heads, where it fits beside one another."""
    drawn = maps.map_of(result)
    if drawn is None or len(list(maps.blocks(drawn, screen.console().width - 2))) > 1 or len(drawn.rows) > MAP_ROWS:
        return []
    return [coloured(drawn, screen.console().width - 2), ""]


def _of_cells(result: Result, n: int) -> list[RenderableType | str]:
    """A Result that ranks nothing, in its own text; where the cells of two axes are a map, in colour."""
    drawn, whole = maps.map_of(result), result.summary(n)
    if drawn is None or {"effects", "texts"} & set(result.tables):
        return [escape(whole)]
    width = screen.console().width - 2
    before, cells, after = whole.partition("\n".join(f"  {line}" for line in ["", *maps.lines(drawn), ""]))
    assert cells
    return [escape(before.rstrip("\n")), coloured(drawn, width), escape(after.lstrip("\n"))]


def roles(result: Result, n: int) -> list[RenderableType | str]:
    """The best heads of each role of a survey, and the best of the other finders."""
    rows = result.tables.get("roles", [])[: 3 * n]
    heads = [[escape(row["role"]), row["head"], row["score"], escape(row["unit"]), row["p_adjusted"]] for row in rows]
    others = [[escape(row["finder"]), row["best"], row["highest"], escape(row["unit"])] for row in result.tables.get("others", [])]  # fmt: skip
    return [
        screen.table("the best heads of each role", ("role", "head", "score", "unit", "adjusted p"), heads),
        screen.table("other parts", ("finder", "best", "highest", "unit"), others[: 3 * n]),
    ]

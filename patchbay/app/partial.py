"""What a sweep has found so far, as a map: its entries by the port that they change and by place, as the page draws it. Runs in the worker."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

MOST = 20_000  # cells that are sent several times a second


def partial_map(entries: Sequence[Sequence[Any]], effects: Sequence[float], unit: str) -> dict[str, Any] | None:
    """Rows, columns and values [row][column] (None: has not run) of a sweep at hand; None where it is too large to be drawn as it goes.

    One edit a port: layers by heads (neurons, experts), or by port. Several: ports by place, in the order in which they were given, which
    is called by its position where all rows have one there. Entries of several edits stand in one row, by their number.
    """
    if len(entries) > MOST:
        return None
    cells = _cells(entries)
    rows = sorted({row for row, _ in cells}, key=lambda key: (key[0] is None, *(-1 if x is None else x for x in key)))
    columns = sorted({column for _, column in cells})
    if len(rows) * len(columns) > MOST:
        return None
    values: list[list[float | None]] = [[None] * len(columns) for _ in rows]
    for (row, column), effect in zip(cells, effects, strict=True):
        values[rows.index(row)][columns.index(column)] = None if effect != effect else float(effect)
    axes = (
        ("sweep", "entry")
        if rows == [(None, None)]
        else ("layer" if all(i is None for _, i in rows) else "part", _axis(entries, cells))
    )
    return {"rows": [_named(entries, cells, row) for row in rows], "columns": _labels(entries, cells, columns), "axes": axes, "unit": unit, "values": values}  # fmt: skip


Key = tuple[int | None, int | None]


def _cells(entries: Sequence[Sequence[Any]]) -> list[tuple[Key, int]]:
    """Of each entry its row, (layer, index), and its column."""
    if any(len(entry) != 1 for entry in entries):
        return [((None, None), i) for i in range(len(entries))]
    seen: dict[Any, int] = defaultdict(int)
    places = []
    for (edit,) in entries:
        places.append(seen[edit.port])
        seen[edit.port] += 1
    ports = [entry[0].port for entry in entries]
    if len({(port.signal) for port in ports}) > 1:
        return [((None, None), i) for i in range(len(entries))]
    if max(seen.values()) == 1 and all(port.index is not None for port in ports):
        return [((port.layer, None), port.index) for port in ports]
    return [((port.layer, port.index), place) for port, place in zip(ports, places, strict=True)]


def _axis(entries: Sequence[Sequence[Any]], cells: Sequence[tuple[Key, int]]) -> str:
    if all(key[1] is None for key, _ in cells) and entries[0][0].port.index is not None:
        return str(entries[0][0].port.index_axis)
    return "position" if _positions(entries, cells) else "place"


def _positions(entries: Sequence[Sequence[Any]], cells: Sequence[tuple[Key, int]]) -> dict[int, int]:
    """The position of each column, where every entry there has this one."""
    found: dict[int, set[Any]] = defaultdict(set)
    for (edit,), (_, column) in zip(entries, cells, strict=True):
        found[column].add(_position(edit.positions))
    known = {column: next(iter(one)) for column, one in found.items() if len(one) == 1}
    return known if len(known) == len(found) and None not in known.values() else {}


def _position(positions: Any) -> int | None:
    """One position, however it was written: a number, a list of one, a mask of one column."""
    if isinstance(positions, int) and not isinstance(positions, bool):
        return positions
    if hasattr(positions, "any"):  # [prompt, position]
        at = positions.reshape(-1, positions.shape[-1]).any(0).nonzero().flatten().tolist()
        return int(at[0]) if len(at) == 1 else None
    if isinstance(positions, Sequence) and not isinstance(positions, str) and len(positions) == 1:
        return int(positions[0])
    return None


def _labels(entries: Sequence[Sequence[Any]], cells: Sequence[tuple[Key, int]], columns: Sequence[int]) -> list[str]:
    if any(len(entry) != 1 for entry in entries):
        return [str(column + 1) for column in columns]
    if _axis(entries, cells) not in ("position", "place"):
        return [f"{entries[0][0].port.index_axis[0].upper()}{column}" for column in columns]
    at = _positions(entries, cells)
    return [str(at.get(column, column + 1)) for column in columns]


def _named(entries: Sequence[Sequence[Any]], cells: Sequence[tuple[Key, int]], row: Key) -> str:
    """A row by its layer, or by the port that is changed there."""
    if row == (None, None):
        return "all"
    if row[1] is None:
        return f"L{row[0]}"
    return str(next(entry[0].port for entry, (key, _) in zip(entries, cells, strict=True) if key == row))

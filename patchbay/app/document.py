"""A Result, a knob or a model's card as the JSON that the front end draws. Everything a view shows is here; computes nothing.

Arrays go as little-endian floats in base64, float32 where the Result holds float32 and float64 otherwise, so that a number under the
pointer is the Result's own. An array of more than `inline` values stays behind: its slices of two axes are asked for one by one.
Numbers that are not finite are null in tables and NaN in arrays.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from patchbay.app.again import python_call
from patchbay.app.cables import cables
from patchbay.draw import screen
from patchbay.results import maps, printed
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError

INLINE = 1 << 18  # values of an array that go with the document
ROWS = 500  # of a ranking or a further table
VERSION = 1


def document(returned: Any, *, name: str = "", inline: int = INLINE) -> dict[str, Any]:
    """What a method returned as plain data: a Result, or a knob with its evidence."""
    if isinstance(returned, Result):
        return of_result(returned, name=name, inline=inline)
    evidence = {key: of_result(held, inline=inline) for key, held in returned.evidence.items()}
    return {
        "kind": "knob",
        "version": VERSION,
        "name": name or returned.name,
        "method": str(returned.provenance.get("method") or "knob"),
        "strength": returned.strength,
        "neutral": returned.neutral,
        "edits": [str(edit) for edit in returned.edits][:ROWS],
        "n_edits": len(returned.edits),
        "evidence": evidence,
        "provenance": _short(returned.provenance),
        "origin": printed.origin(returned),
    }


def of_result(result: Result, *, name: str = "", inline: int = INLINE, n: int | None = None) -> dict[str, Any]:
    """A Result as plain data; see the head of this file. `n`: the most rows of a ranking or a table, ROWS without."""
    most = ROWS if n is None else n
    rows = result.told(most, by="abs") if result.ranked else []
    return {
        "kind": "result",
        "version": VERSION,
        "name": name,
        "method": str(result.provenance.get("method") or ""),
        "asked": _asked(result),
        "title": printed.title(result),
        "origin": printed.origin(result),
        "main": result.name,
        "variables": [_variable(result, variable, inline) for variable in result.variables],
        "steps": {axis: result.labels_of(axis) for axis in result.sizes},
        "labels": {axis: maps.labels_of(result, axis) for axis in result.sizes},
        "ranked": result.ranked,
        "measured": int((~result.values.isnan()).sum()),
        "rows": _rows(rows),
        "names": _cell_names(result),
        "cables": screen.plain(cables(result, rows)),
        "tables": {key: {"rows": _rows(held[:most]), "n": len(held)} for key, held in result.tables.items() if held},
        "sections": [
            {"name": title, "rows": _rows(held[:most]), "n": len(held), "notes": said}
            for title, held, said in result.sections()
        ],
        "notes": list(result.other_notes if result.shown else result.notes),
        "highlights": [str(part) for part in result.highlights],
        "provenance": _short(result.provenance),
        "python": python_call(result.provenance, name or "FOLDER"),
    }


def slice_of(result: Result, variable: str, fixed: Sequence[int]) -> tuple[bytes, str]:
    """The bytes of the last two axes of a variable at the steps `fixed` of those before them, and their type."""
    array = result[variable]
    if len(fixed) != max(0, array.ndim - 2):
        raise PatchbayError(
            f"{variable} has {array.ndim} axes: {max(0, array.ndim - 2)} steps are given, got {len(fixed)}"
        )
    for step, size in zip(fixed, array.shape, strict=False):
        if not 0 <= step < size:
            raise PatchbayError(f"{variable}: step {step} asked of an axis with {size}")
    return _bytes(array[tuple(fixed)])


def _variable(result: Result, name: str, inline: int) -> dict[str, Any]:
    array = result[name]
    finite = array[array.isfinite()].double() if array.is_floating_point() else array.double()
    data, kind = _bytes(array) if array.numel() <= inline else (None, _bytes(array.flatten()[:0])[1])
    return {
        "name": name,
        "axes": list(result.axes_of(name)),
        "unit": result.units[name],
        "shape": list(array.shape),
        "type": kind,
        "data": None if data is None else base64.b64encode(data).decode(),
        "low": finite.min().item() if finite.numel() else None,
        "high": finite.max().item() if finite.numel() else None,
    }


def _bytes(array: torch.Tensor) -> tuple[bytes, str]:
    """Little-endian floats: float32 as it is, all else as float64, which holds every integer below 2^53."""
    small = array.dtype in (torch.float32, torch.float16)
    made = (array.float() if small else array.double()).contiguous().numpy()
    return made.astype("<f4" if small else "<f8", copy=False).tobytes(), "float32" if small else "float64"


def _asked(result: Result) -> str:
    """What was asked of a method: its text where it was one, else the name of its task."""
    record = result.provenance
    options, task = record.get("options") or {}, record.get("task") or {}
    text = task.get("prompts") or options.get("prompt")
    return printed.short(text) if isinstance(text, str) else str(task.get("name") or "")


def _cell_names(result: Result) -> list[str] | None:
    """What the cells of a map are called, in the order of its values; None where they have no names."""
    if len(result.axes) != 2 or not result.tables.get("cells"):
        return None
    named = maps.names_of(result)
    rows, columns = (result.labels_of(axis) for axis in result.axes)
    return [named.get((str(r), str(c)), "") for r in rows for c in columns]


def _rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [screen.plain(row) for row in rows]


def _short(provenance: Mapping[str, Any]) -> list[list[str]]:
    """Where the numbers came from, as pairs of a name and a value on one line; prompts by their number."""
    rows = []
    for key, value in provenance.items():
        if key == "task" and isinstance(value, Mapping):
            n = len(value.get("clean") or value.get("prompts") or ())
            value = {k: value[k] for k in ("name", "metric", "seed", "options") if k in value} | {"prompts": n}
        pieces = value.items() if isinstance(value, Mapping) else [("", value)]
        rows += [[f"{key} {name}".strip(), printed.short(piece)] for name, piece in pieces]
    return rows

"""Items of a meter: a Task, a list of mappings, or a file of one's own with named fields, JSON lines or CSV.

`qa.jsonl` has one object a line; `blimp.jsonl:good=sentence_good,bad=sentence_bad` says which of its fields are meant. What a row lacks
is refused with its file and line. A plain text has an item on each line, for meters that need one field. In CSV a list is written as JSON, or with | between its entries.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from patchbay import tasks
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError, suggest
from patchbay.tasks.table import Row, frame_table, read_table
from patchbay.tasks.task import Task

Items = Task | str | Path | list[Any]  # what a meter takes


def resolved(model: Model, items: Any) -> Any:
    """Items as they are, or the built-in task that a text names: `facts_in_context:n=300,seed=5`."""
    name, _, written = items.partition(":") if isinstance(items, str) else ("", "", "")
    if name not in tasks.__all__ or Path(str(items)).exists():
        hint = suggest(name, tasks.__all__) if name and not Path(name).suffix and not Path(name).exists() else ""
        if hint:
            raise PatchbayError(f"items {items!r}: no file and no built-in task is called that{hint}")
        return items
    options: dict[str, Any] = {}
    for pair in filter(None, map(str.strip, written.split(","))):
        key, equals, value = (piece.strip() for piece in pair.partition("="))
        try:
            options[key] = json.loads(value) if equals else None
        except ValueError:
            options[key] = value
        if not equals:
            raise PatchbayError(f"task {name}: options are written name=value, got {pair!r}")
    try:
        return getattr(tasks, name)(model, **options)
    except TypeError as error:
        raise PatchbayError(f"task {name}: {error}; `patchbay tasks` lists its options") from error


def rows_of(
    items: Any, needs: Sequence[str], may: Sequence[str] = (), *, lists: Sequence[str] = ()
) -> tuple[list[Row], list[str]]:
    """The rows of items that are no Task, with the fields that they need and may have, and what is to be said of their file.

    Fields of `lists` are lists; a text that stands for one is read as such."""
    if isinstance(items, str | Path):
        table, fields = _file(str(items), (*needs, *may))
        said = [f"items of {table.source}, SHA-256 {hashlib.sha256(Path(table.source).read_bytes()).hexdigest()[:16]}"]
    elif isinstance(items, Sequence) and all(isinstance(item, Mapping) for item in items) and len(items):
        table, fields, said = frame_table(list(items), "items"), {}, []
    else:
        shown = ", ".join(f'"{name}": ...' for name in needs)
        raise PatchbayError(f"items are a file, or a list of {{{shown}}}, got {type(items).__name__} {items!r:.60}")
    found = []
    for row in table.rows:
        values = {
            name: row.values[fields.get(name, name)] for name in (*needs, *may) if fields.get(name, name) in row.values
        }
        if len(needs) == 1 and not fields and list(row.values) == ["prompt"]:
            # a plain text, whose lines are what is needed
            values = {needs[0]: row.values["prompt"]}
        lacking = [name for name in needs if name not in values]
        if lacking:
            there = ", ".join(row.values) or "nothing"
            hint = suggest(lacking[0], list(row.values))
            raise PatchbayError(
                f"{row.where} lacks the field {fields.get(lacking[0], lacking[0])!r}; it has {there}{hint}; FILE:{lacking[0]}=NAME says another name"
            )
        values |= {name: _listed(values[name], name, row.where) for name in lists if name in values}
        found.append(Row(values, row.where))
    return found, said


def _file(text: str, known: Sequence[str]) -> tuple[Any, dict[str, str]]:
    """A file's table and which of its fields are meant: `FILE:good=sentence_good,...`."""
    path, colon, written = text.rpartition(":")
    if not colon or not re.fullmatch(r"\s*\w+\s*=.*", written, re.DOTALL):
        path, written = text, ""
    fields = {}
    for pair in filter(None, map(str.strip, written.split(","))):
        name, equals, field = (piece.strip() for piece in pair.partition("="))
        if not equals or name not in known:
            raise PatchbayError(
                f"{path}: fields are written {known[0]}=NAME, got {pair!r}; possible: {', '.join(known)}{suggest(name, list(known))}"
            )
        fields[name] = field
    return read_table(path), fields


def _listed(value: Any, name: str, where: str) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.lstrip().startswith("[") else [part.strip() for part in value.split("|")]
        except ValueError as error:
            raise PatchbayError(f"{where}: {name} is {value!r:.60}, which is no JSON list: {error}") from error
    if not isinstance(value, list | tuple):
        raise PatchbayError(f"{where}: {name} is a list, got {type(value).__name__} {value!r:.60}")
    return list(value)


def finite(value: Any, says: str) -> float:
    """A number of an item; raises PatchbayError with what `says` for what is none, NaN and infinity too."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise PatchbayError(f"{says}, got {value!r}")
    return number


def texts_only(rows: Sequence[Row], names: Sequence[str]) -> None:
    """Raise PatchbayError where a field that is text, or token ids, is something else."""
    for row in rows:
        for name in names:
            value = row.values.get(name)
            ids = isinstance(value, list | tuple) and all(
                isinstance(token, int) and not isinstance(token, bool) for token in value
            )
            if value is not None and not isinstance(value, str) and not ids:
                raise PatchbayError(
                    f"{row.where}: {name} is a text, or a list of token ids, got {type(value).__name__} {value!r:.60}"
                )

"""From the rows of a table to a task, or to prompts alone: which column is what, and what may stand in it.

Columns are called `prompt`, `right`, `wrong`, `corrupted`, `labels` and `marks`, or as `columns` says: {"prompt": "question",
"wrong": ["b", "c"], "labels": ["subject"]}. Only `prompt` is needed. A column of another name is refused, so that a slip of the pen
is no lost column, but where `columns` is given: then the others are not meant. Whatever is refused names its file and line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchbay.errors import PatchbayError, suggest
from patchbay.model.tokens import is_chat
from patchbay.tasks.table import Row, Table, read_table

if TYPE_CHECKING:
    from patchbay.model.model import Model

FIELDS = ("prompt", "right", "wrong", "corrupted", "labels", "marks")
SEVERAL = ("wrong", "labels")  # that may stand in several columns
Columns = Mapping[str, str | Sequence[str]]


def task_of(kind: Any, model: Model, table: Table, columns: Columns | None, **how: Any) -> Any:
    """A task of a table's rows; `how` goes to `Task.from_prompts`."""
    chosen = _chosen(table, columns)
    values = [_values(row, chosen) for row in table.rows]
    _check_alike(table, values)
    try:
        return _made(kind, model, values, how)
    except PatchbayError as error:
        for row, held in zip(table.rows, values, strict=True):
            try:
                _made(kind, model, [held], how)
            except PatchbayError as found:
                raise PatchbayError(f"{row.where}: {found}") from error
        raise PatchbayError(f"{table.source}: {error}") from error


def prompts_of(table: Table, columns: Columns | None = None) -> list[Any]:
    """The prompts of a table alone: texts, or chats."""
    chosen = _chosen(table, columns)
    return [_values(row, chosen)["prompt"] for row in table.rows]


def read_prompts(path: str | Path, *, columns: Columns | None = None, **how: Any) -> list[Any]:
    """The prompts of a file alone; answers and the like are left where they are."""
    return prompts_of(read_table(path, **how), columns)


def only_prompts(table: Table, columns: Columns | None) -> bool:
    """Whether the rows hold nothing but prompts."""
    return set(_chosen(table, columns)) == {"prompt"}


def _made(kind: Any, model: Model, values: Sequence[Mapping[str, Any]], how: Mapping[str, Any]) -> Any:
    texts = {field: [held[field] for held in values] for field in ("right", "wrong", "corrupted") if field in values[0]}
    task = kind.from_prompts(model, [held["prompt"] for held in values], **texts, **how)
    named = {field: _by_name(values, field) for field in ("labels", "marks") if field in values[0]}
    return dataclasses.replace(task, **named) if named else task


def _by_name(values: Sequence[Mapping[str, Any]], field: str) -> dict[str, list[Any]]:
    """name -> one value for each prompt, from one mapping for each prompt."""
    return {name: [held[field][name] for held in values] for name in values[0][field]}


def _check_alike(table: Table, values: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a field that some rows have and others lack, and labels and marks whose names differ."""
    for field in FIELDS:
        has = [field in held for held in values]
        if any(has) and not all(has):
            raise PatchbayError(
                f"{table.rows[has.index(False)].where} has no {field!r} and other rows have; all or none"
            )
        for row, held in zip(table.rows, values, strict=True):
            if field in ("labels", "marks") and any(has) and held[field].keys() != values[0][field].keys():
                raise PatchbayError(
                    f"{row.where}: the {field} are {', '.join(held[field]) or 'none'}, in the first row "
                    f"{', '.join(values[0][field]) or 'none'}; the same names in every row"
                )


# --- columns ------------------------------------------------------------------------------------------


def _chosen(table: Table, columns: Columns | None) -> dict[str, list[str]]:
    """Field -> the table's columns that hold it."""
    if columns is not None and not isinstance(columns, Mapping):
        raise PatchbayError(f"{table.source}: columns are a mapping such as {{'prompt': 'question'}}, got {columns!r}")
    other = next((field for field in columns or () if field not in FIELDS), None)
    if other is not None:
        raise PatchbayError(
            f"{table.source}: columns names {other!r}; possible: {', '.join(FIELDS)}{suggest(str(other), FIELDS)}"
        )
    chosen = {field: [field] for field in FIELDS if field in table.columns}
    for field, named in (columns or {}).items():
        listed = [named] if isinstance(named, str) else list(named)
        if len(listed) > 1 and field not in SEVERAL:
            raise PatchbayError(
                f"{table.source}: {field} stands in one column, got {listed}; several have {', '.join(SEVERAL)}"
            )
        for name in listed:
            if name not in table.columns:
                raise PatchbayError(f"{table.rows[0].where}: no column {name!r}; its columns are {', '.join(table.columns)}"
                                    + suggest(str(name), table.columns))  # fmt: skip
        chosen[field] = listed
    if "prompt" not in chosen:
        raise PatchbayError(
            f"{table.rows[0].where}: no column 'prompt'; its columns are {', '.join(table.columns)}{_say(table, 'prompt')}"
        )
    if columns is None:
        _refuse_others(table)
    return chosen


def _refuse_others(table: Table) -> None:
    for row in table.rows:
        other = next((name for name in row.values if name not in FIELDS), None)
        if other is not None:
            raise PatchbayError(
                f"{row.where} has {other!r}; columns are {', '.join(FIELDS)}{suggest(other, FIELDS)}{_say(table, 'prompt')}"
            )


def _say(table: Table, field: str) -> str:
    """What to write where a file's columns have other names."""
    name = next((name for name in table.columns if name not in FIELDS), field) if field not in table.columns else field
    return (
        f"; say which are meant, as in columns={{{field!r}: {name!r}, ...}} (at the command line {table.source}:{field}={name}), "
        "and the rest is left out"
    )


# --- what stands in them ------------------------------------------------------------------------------


def _values(row: Row, chosen: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Field -> value of one row, of the right kind; fields that it lacks are not there."""
    if (name := chosen["prompt"][0]) not in row.values:
        raise PatchbayError(f"{row.where}: no text in the column {name!r}, which is the prompt")
    found: dict[str, Any] = {}
    for field, names in chosen.items():
        for name in names:
            if name in row.values:
                value = _one(field, name, row.values[name], f"{row.where}, column {name!r}")
                found[field] = (
                    value if field not in found else found[field] + value if field == "wrong" else found[field] | value
                )
    return found


def _one(field: str, name: str, value: Any, where: str) -> Any:
    if field == "labels":
        if isinstance(value, dict) or name != field:
            return value if isinstance(value, dict) else {name: value}
        raise PatchbayError(f"{where}: {{name: value}} is needed, got {value!r:.40}")
    if field == "marks":
        return _marks(value, where)
    if field == "wrong":
        return [_a_text(one, where) for one in (value if isinstance(value, list) else [value])]
    return value if field != "right" and is_chat(value) else _a_text(value, where)


def _a_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        written = "" if isinstance(value, list | dict) else f"; as a text it is {str(value)!r} in quotes"
        raise PatchbayError(f"{where}: a text is needed, got {value!r:.40} ({type(value).__name__}){written}")
    if not value:
        raise PatchbayError(f"{where}: the text is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PatchbayError(f"{where}: {value[error.start]!r} is half of a character that takes two") from error
    return value


def _marks(value: Any, where: str) -> dict[str, list[int]]:
    listed = isinstance(value, dict) and all(isinstance(at, list) for at in value.values())
    if not listed or any(type(place) is not int for at in value.values() for place in at):
        raise PatchbayError(f"{where}: {{name: [token positions]}} is needed, got {value!r:.40}")
    return dict(value)

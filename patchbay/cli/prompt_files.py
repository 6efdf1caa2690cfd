"""Files of prompts as a command line names them: `qa.csv`, or with its columns said, `qa.csv:prompt=question,wrong=b+c`."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from patchbay.errors import PatchbayError

if TYPE_CHECKING:
    from patchbay import Model, Task


class PromptFile(NamedTuple):
    """`qa.csv:prompt=question,wrong=b+c,encoding=cp1252`: a file, and which of its columns are what."""

    path: str
    columns: dict[str, list[str]] | None
    how: dict[str, str]  # form, encoding


def named(text: str) -> PromptFile | None:
    """The file of prompts that a text names; None where it names none: it is no file here, and does not look like one."""
    from patchbay.tasks.table import SUFFIXES

    path, colon, written = text.removeprefix("@").rpartition(":")
    if not colon or not re.fullmatch(r"\s*\w+\s*=.*", written, re.DOTALL):
        path, written = text.removeprefix("@"), ""
    try:
        there = Path(path).is_file()
    except (OSError, ValueError):  # a long text is no path
        there = False
    if not there and not text.startswith("@") and Path(path).suffix.lower() not in SUFFIXES:
        return None
    columns: dict[str, list[str]] = {}
    how: dict[str, str] = {}
    for pair in filter(None, (piece.strip() for piece in written.split(","))):
        key, equals, value = (piece.strip() for piece in pair.partition("="))
        if not equals or not value:
            raise PatchbayError(f"{path}: columns are written prompt=question,wrong=b+c, got {pair!r}")
        if key in ("form", "encoding"):
            how[key] = value
        else:
            columns[key] = value.split("+") if key in ("wrong", "labels") else [value]
    return PromptFile(path, columns or None, how)


def read_prompts(text: str, model: Model, *, texts: bool = False) -> Task | list[Any]:
    """A task of one's own from a file, as `named` reads its name and `Task.from_file` its rows. With `texts`, a file that has no
    answer at all gives its prompts alone."""
    import patchbay as pb
    from patchbay.tasks.rows import only_prompts, prompts_of, task_of
    from patchbay.tasks.table import read_table

    path, columns, how = named(text) or PromptFile(text, None, {})
    table = read_table(path, **how)
    if texts and only_prompts(table, columns):
        return prompts_of(table, columns)
    return typing.cast("Task", task_of(pb.Task, model, table, columns, name=Path(path).stem))


def read_texts(text: str, what: str) -> list[Any]:
    """Texts that are no task: those of a file, of a JSON list, or one text as it stands, commas and all."""
    from patchbay.tasks.rows import prompts_of
    from patchbay.tasks.table import read_table

    if text.startswith("["):
        try:
            listed = json.loads(text)
        except ValueError:
            listed = None
        if isinstance(listed, list) and listed and all(isinstance(one, str | list) for one in listed):
            return listed
        if isinstance(listed, list):
            raise PatchbayError(f'{what}: {text!r:.60} is a list of no texts; write ["...", "..."]')
    found = named(text)
    if Path(text).is_dir():
        raise PatchbayError(f"{what}: {text} is a folder, and a file or texts are read")
    if found is None:
        return [text]
    try:
        return prompts_of(read_table(found.path, **found.how), found.columns)
    except PatchbayError as error:
        raise PatchbayError(f'{what}: {error}; a text that is not the name of a file is written ["..."]') from error


def lines(text: str, what: str) -> Any:
    """Texts of a file as they are read: a plain one (.txt) line by line, so that it may be larger than memory; others whole."""
    found = named(text)
    if found is None or Path(found.path).suffix.lower() != ".txt" or found.columns or "form" in found.how:
        return read_texts(text, what)

    def each() -> Iterator[str]:
        try:
            with Path(found.path).open(encoding=found.how.get("encoding", "utf-8-sig")) as file:
                for line in file:
                    if line.strip():
                        yield line.rstrip("\r\n")
        except (OSError, UnicodeError, LookupError) as error:
            raise PatchbayError(f"{what}: could not read {found.path}: {error}") from error

    return each()


def first(own: Any, n: int | None) -> Any:
    """The first `n` of what a file holds."""
    if n is not None and n < 1:
        raise PatchbayError(f"asked for n={n}; possible: 1 and more")
    return own if n is None else own[:n]

"""Tables of prompts as they lie in files: JSON lines, JSON arrays, CSV, TSV, plain text, and tables in memory, as rows that know where they stood.

A line ends at a line feed, a carriage return or both; every other separator of Unicode (U+2028, U+0085, ...) belongs to the text that
holds it. A byte order mark in front says the encoding and is taken off; without one a file is UTF-8. Nothing is stripped from a
prompt or an answer, and nothing is guessed: what is not a text where one belongs is refused with its file, line and column.
"""

from __future__ import annotations

import csv
import io
import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from patchbay.errors import PatchbayError, suggest

FORMS = ("jsonl", "json", "csv", "tsv", "text")
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".txt": "text"}  # fmt: skip
MARKS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe\x00\x00", "utf-32"), (b"\x00\x00\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))  # fmt: skip
PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip (as Excel sheets are)", b"PAR1": "parquet", b"BZh": "bzip2"}
LINE = re.compile(r"\r\n|\n|\r")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
JSON_TEXT = re.compile(r'\s*(\[\s*["{]|\{\s*")')


class Row(NamedTuple):
    """Column -> value of one prompt, without cells that are empty; and where it stood, such as `qa.csv, line 3`."""

    values: Mapping[str, Any]
    where: str


@dataclass(frozen=True)
class Table:
    """Rows and the names of their columns, in the order in which they first come."""

    source: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def read_table(path: str | Path, *, form: str | None = None, encoding: str | None = None) -> Table:
    """The rows of a file. `form`: one of FORMS; without, by the suffix, and where that says nothing by how the text begins.

    A plain text has one column, `prompt`, with a prompt on each line that is not blank; so has JSON whose entries are texts.
    """
    source = str(path)
    if form is not None and form not in FORMS:
        raise PatchbayError(f"{source}: no form {form!r}; possible: {', '.join(FORMS)}" + suggest(str(form), FORMS))
    text = _text(source, encoding)
    form = form or _form(source, text)
    if form in ("csv", "tsv"):
        columns, rows = _cells(text, source, form)
    else:
        rows = list({"jsonl": _json_lines, "json": _json_array, "text": _plain}[form](text, source))
        columns = list(dict.fromkeys(name for row in rows for name in row.values))
    if not rows:
        raise PatchbayError(
            f"{source} holds no prompts" + (f" under its columns {', '.join(columns)}" if columns else "")
        )
    return Table(source, tuple(columns), tuple(rows))


def frame_table(frame: Any, source: str = "table") -> Table:
    """The rows of a table in memory: a DataFrame, a data set whose rows are mappings, or a list of such."""
    names = [str(name) for name in getattr(frame, "columns", ())]
    if len(set(names)) < len(names):
        raise PatchbayError(f"{source}: {_twice(names)}")
    listed = _records(frame, source)
    rows = []
    for i, record in enumerate(listed):
        where = f"{source}, row {i}"
        if not isinstance(record, Mapping):
            raise PatchbayError(f"{where}: a mapping from columns to values is needed, got {type(record).__name__}")
        plain = {str(name): value.tolist() if hasattr(value, "tolist") else value for name, value in record.items()}
        rows.append(Row({name: value for name, value in plain.items() if not _missing(value)}, where))
    if not rows:
        raise PatchbayError(f"{source} has no rows")
    columns = names or list(dict.fromkeys(name for row in rows for name in row.values))
    return Table(source, tuple(columns), tuple(rows))


def _records(frame: Any, source: str) -> list[Any]:
    if hasattr(frame, "iloc") and hasattr(frame, "to_dict") and hasattr(frame, "columns"):
        frame = frame.set_axis([str(name) for name in frame.columns], axis=1).to_dict("records")
    elif hasattr(frame, "to_dicts"):
        frame = frame.to_dicts()
    if isinstance(frame, str | bytes | Mapping) or not isinstance(frame, Iterable):
        raise PatchbayError(f"{source}: a DataFrame or a list of mappings is needed, got {type(frame).__name__}")
    return list(frame)


def _missing(value: Any) -> bool:
    """Whether a table says with this value that it has none."""
    return (
        value is None or type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value)
    )


# --- bytes to text ------------------------------------------------------------------------------------


def _text(source: str, encoding: str | None) -> str:
    try:
        data = Path(source).read_bytes()
    except (OSError, ValueError) as error:
        raise PatchbayError(f"could not read prompts from {source}: {error}") from error
    packed = next((name for start, name in PACKED.items() if data.startswith(start)), None)
    if packed is not None:
        raise PatchbayError(
            f"{source} is {packed}, no text: unpack it, or read it with pandas and give Task.from_frame the frame"
        )
    used = next((name for mark, name in MARKS if data.startswith(mark)), encoding or "utf-8")
    try:
        text = data.decode(used).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise PatchbayError(_not_decoded(source, data, used, error)) from error
    except LookupError as error:
        raise PatchbayError(
            f"{source}: there is no encoding {encoding!r}; possible: utf-8, latin-1, cp1252, utf-16, ..."
        ) from error
    for character, meaning in {"\0": "NUL characters: UTF-16 without a byte order mark? Say encoding='utf-16-le'",
                               "\ufeff": "a byte order mark inside: two files joined? Take it out"}.items():  # fmt: skip
        if character in text:
            raise PatchbayError(f"{source}, line {_line(text, text.index(character))} holds {meaning}")
    return text


def _not_decoded(source: str, data: bytes, used: str, error: UnicodeDecodeError) -> str:
    line = len(LINE.split(data[: error.start].decode("latin-1")))
    byte = data[error.start : error.start + 1]
    return (
        f"{source}, line {line} is not {used}: byte 0x{byte.hex()} ({byte.decode('latin-1')!r} in latin-1) stands at {error.start}; "
        "save it as UTF-8, or say encoding='latin-1'"
    )


def _line(text: str, at: int) -> int:
    """The number of the line, from 1, in which a character stands."""
    return len(LINE.findall(text, 0, at)) + 1


def _form(source: str, text: str) -> str:
    known = SUFFIXES.get(Path(source).suffix.lower(), "text")
    if known not in ("text", "jsonl", "json"):
        return known
    if known == "text" and not JSON_TEXT.match(text):
        return "text"
    return "json" if text.lstrip().startswith("[") else "jsonl"


# --- text to rows -------------------------------------------------------------------------------------


def _plain(text: str, source: str) -> Iterator[Row]:
    for i, line in enumerate(LINE.split(text), 1):
        if line.strip():
            yield Row({"prompt": line}, f"{source}, line {i}")


def _json_lines(text: str, source: str) -> Iterator[Row]:
    lines = LINE.split(text)
    for i, line in enumerate(lines, 1):
        if line.strip():
            where = f"{source}, line {i}"
            cut = " (the last line, and it has no end: the file may be cut short)" if i == len(lines) else ""
            yield _entry(_decoded(line, None, where, cut)[0], where)


def _json_array(text: str, source: str) -> Iterator[Row]:
    """The entries of a JSON array, each read by itself, so that what is wrong has a line."""
    starts = [found.end() for found in LINE.finditer(text)]
    cut = "" if text.rstrip().endswith("]") else " (the file may be cut short)"

    def where(at: int) -> str:
        return f"{source}, line {bisect_right(starts, at) + 1}"

    at = _skipped(text, 0)
    if text[at : at + 1] != "[":
        raise PatchbayError(f"{where(at)}: a JSON array [...] of prompts is needed, found {text[at : at + 20]!r}")
    at = _skipped(text, at + 1)
    while text[at : at + 1] != "]":
        value, end = _decoded(text, at, where(at), cut)
        yield _entry(value, where(at))
        at = _skipped(text, end)
        if text[at : at + 1] == ",":
            at = _skipped(text, at + 1)
        elif text[at : at + 1] != "]":
            raise PatchbayError(f"{where(at)}: ',' or ']' is needed after an entry, found {text[at : at + 20]!r}{cut}")
    if _skipped(text, at + 1) < len(text):
        raise PatchbayError(f"{where(at)}: text stands after the end of the array")


def _skipped(text: str, at: int) -> int:
    """The place of the next character that is no space of JSON."""
    while text[at : at + 1] in (" ", "\t", "\n", "\r"):
        at += 1
    return at


def _decoded(text: str, at: int | None, where: str, cut: str) -> tuple[Any, int]:
    """The JSON value that starts at a place, and where it ends; without a place, the whole text as one value."""
    decoder = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_number)
    try:
        found = (decoder.decode(text), len(text)) if at is None else decoder.raw_decode(text, at)
        if SURROGATE.search(text, at or 0, found[1]):
            json.dumps(found[0], ensure_ascii=False).encode()
        return found
    except PatchbayError as error:
        raise PatchbayError(f"{where}: {error}") from error
    except RecursionError as error:
        raise PatchbayError(f"{where} is not JSON that can be read: it is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise PatchbayError(
            f"{where} holds {error.object[error.start]!r}, half of a character that takes two"
        ) from error
    except json.JSONDecodeError as error:
        raise PatchbayError(f"{where} is not JSON: {error.msg} at column {error.colno}{cut}") from error
    except ValueError as error:
        raise PatchbayError(f"{where} is not JSON that can be read: {error}") from error


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise PatchbayError(_twice(names))
    return dict(pairs)


def _twice(names: Sequence[str]) -> str:
    name = next(name for name in names if names.count(name) > 1)
    return f"two columns are called {name!r}; each name once"


def _no_number(name: str) -> Any:
    raise PatchbayError(f"{name} is no value of JSON")


def _entry(value: Any, where: str) -> Row:
    if isinstance(value, str):
        return Row({"prompt": value}, where)
    if not isinstance(value, dict):
        kind = {list: "a list", bool: "true or false", type(None): "null"}.get(type(value), "a number")
        raise PatchbayError(f'{where}: an object {{"prompt": ...}} or a text is needed, got {kind}')
    return Row({name: held for name, held in value.items() if held is not None}, where)


def _cells(text: str, source: str, form: str) -> tuple[list[str], list[Row]]:
    """The names of a header and the rows under it; a cell with nothing in it is not there."""
    head = LINE.split(text.lstrip("\r\n"), maxsplit=1)[0]
    comma = "\t" if form == "tsv" else next((mark for mark in ",;\t" if mark in head), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=comma, strict=True)
    names: list[str] = []
    rows, last, end = [], 0, _line(text, len(text.rstrip("\r\n")))
    try:
        for cells in reader:
            where, last = f"{source}, line {last + 1}", reader.line_num
            if cells and not names:
                names = _header(cells, where)
            elif cells and len(cells) != len(names):
                raise PatchbayError(
                    f"{where}: {len(cells)} cells under {len(names)} columns ({', '.join(names)}); a text with {comma!r} or a "
                    "line's end in it stands in double quotes" + (" (the file may be cut short)" if last == end else "")
                )
            elif any(cells):
                rows.append(Row({name: cell for name, cell in zip(names, cells, strict=True) if cell}, where))
    except csv.Error as error:
        raise PatchbayError(f"{source}, line {last + 1}: {_unquoted(error)}") from error
    return names, rows


def _header(cells: Sequence[str], where: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(set(names)) < len(names):
        raise PatchbayError(f"{where}: {_twice(names)}")
    return names


def _unquoted(error: csv.Error) -> str:
    """The csv module's complaint in words that say what to do."""
    said = str(error)
    if "unexpected end" in said:
        return "a double quote opens a text and none closes it (the file may be cut short)"
    if "field limit" in said:
        return f"a cell of more than {csv.field_size_limit():,} characters; JSON lines take texts of any length"
    return f"{said}; inside a quoted text a double quote is written twice"

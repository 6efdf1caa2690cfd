"""Texts of a file, one after another, without the file in memory: `.txt` by lines, `.jsonl` by its field `text`.

Lines are of at most `LONGEST` bytes, so that a file of one line is refused rather than read into memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from patchbay.errors import PatchbayError

LONGEST = 1 << 26  # bytes of a line


def texts_of(path: str | Path) -> Iterator[str]:
    """Every text of a file, in order; lines without a letter are left out.

    Raises PatchbayError for a file that is not there, that has no text, that is not UTF-8, whose last line was cut off in its middle, or with a
    line that is no text but a file.
    """
    return (str(record["text"]) for record in records_of(path))


def documents_of(path: str | Path) -> Iterator[str | list[Any]]:
    """The same, where a record of a .jsonl may have `units` in place of `text`: a list of texts or of lists of token ids."""
    return (record.get("units") or str(record["text"]) for record in records_of(path, units=True))


def records_of(path: str | Path, *, units: bool = False) -> Iterator[dict[str, Any]]:
    """The same with all fields of a `.jsonl`, such as `url`; of a `.txt` with `text` alone. With `units`, a record may have these in its place."""
    file = Path(path)
    if file.suffix not in (".txt", ".jsonl"):
        raise PatchbayError(f"{path}: texts lie in a .txt, a line each, or in a .jsonl with a field `text`")
    n = 0
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(iter(partial(lines.readline, LONGEST + 1), b""), 1):
                if len(line) > LONGEST:
                    raise PatchbayError(
                        f"{path}, line {number} is longer than {LONGEST:,} bytes: a text is a line; cut it, or write texts as a .jsonl"
                    )
                if line.strip():
                    n += 1
                    yield _record(file, number, line, units)
    except OSError as error:
        raise PatchbayError(f"{path} cannot be read: {error}") from error
    if not n:
        raise PatchbayError(f"{path} holds no text")


def _record(file: Path, number: int, line: bytes, units: bool) -> dict[str, Any]:
    """One line as a record; a last line that ends in the middle of a letter or a record is told from a wrong one."""
    cut = "" if line.endswith(b"\n") else ": the file ends in mid-line, as one that was cut off"
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise PatchbayError(f"{file}, line {number} is not UTF-8{cut} ({error})") from error
    if file.suffix == ".txt":
        return {"text": text}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise PatchbayError(f"{file}, line {number} is no JSON{cut} ({error})") from error
    if units and isinstance(found, dict) and isinstance(found.get("units"), list) and found["units"]:
        return found
    if not isinstance(found, dict) or not isinstance(found.get("text"), str):
        raise PatchbayError(
            f"{file}, line {number} has no field `text` that is a text; it has {sorted(found) if isinstance(found, dict) else type(found).__name__}"
        )
    return found

"""Texts of a file, one after another, without the file in memory: `.txt` by lines, `.jsonl` by its field `text`.

Lines are of at most `LONGEST` bytes, so that a file of one line is refused rather than read into memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from patchbay.errors import PatchbayError

LONGEST = 1 << 26  # bytes of a line
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
HALVES = re.compile(rb"\\u[dD][89a-fA-F]")  # how JSON writes halves of a letter, which may stand alone
MARK = b"\xef\xbb\xbf"  # what some programs begin a file with


def texts_of(path: str | Path) -> Iterator[str]:
    """Every text of a file, in order; empty lines are left out. Texts are as they are written: equal letters in another form of Unicode are other letters.

    Raises PatchbayError for a file that is not there, that has no text, that is not UTF-8, whose last line was cut off in its middle, or with a
    line that is no text but a file; and for a record with a field twice or half a letter.
    """
    return (str(record["text"]) for record in records_of(path))


def several(texts: Iterable[str]) -> Iterator[str]:
    """Texts that were given one after another. Raises PatchbayError for one text, whose letters would be taken for texts, and by its number for what is none."""
    return (whole(text, f"text {number}") for number, text in enumerate(no_text(texts), 1))


def no_text(texts: Any) -> Any:
    """What was given for several texts, or texts as token ids; PatchbayError where it is one text, or nothing that can be gone through."""
    if isinstance(texts, str | bytes):
        raise PatchbayError(f"{texts!r:.40} is one text: give a list of them, or corpus.texts_of(file)")
    if not isinstance(texts, Iterable):
        raise PatchbayError(f"{texts!r:.40} is no list of texts: give one, or corpus.texts_of(file)")
    return texts


def whole(text: Any, what: str) -> str:
    """The text; PatchbayError where it is none, or holds half of a letter (a surrogate alone), which no UTF-8 has."""
    if not isinstance(text, str):
        raise PatchbayError(f"{what} is a {type(text).__name__}: texts are asked for, of a record its field")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PatchbayError(
                f"{what} holds half a letter (a surrogate without the other half), which no text has"
            ) from error
    return text


def documents_of(path: str | Path) -> Iterator[str | list[Any]]:
    """The same, where a record of a .jsonl may have `units` in place of `text`: a list of texts or of lists of token ids."""
    return (record.get("units") or str(record["text"]) for record in records_of(path, units=True))


def records_of(path: str | Path, *, units: bool = False) -> Iterator[dict[str, Any]]:
    """The same with all fields of a `.jsonl`, such as `url`; of a `.txt` with `text` alone. With `units`, a record may have these in its place."""
    file = Path(path)
    if file.suffix not in (".txt", ".jsonl"):
        first = "; unpack it" if file.suffix in PACKED else ""
        raise PatchbayError(
            f"{path}: texts lie in a file, a .txt, a line each, or in a .jsonl with a field `text`{first}"
        )
    n = 0
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(iter(partial(lines.readline, LONGEST + 1), b""), 1):
                if len(line) > LONGEST:
                    raise PatchbayError(
                        f"{path}, line {number} is longer than {LONGEST:,} bytes: a text is a line; cut it, or write texts as a .jsonl"
                    )
                if (line.removeprefix(MARK) if number == 1 else line).strip():
                    n += 1
                    yield _record(file, number, line, units)
    except OSError as error:
        raise PatchbayError(f"{path} cannot be read: {error.strerror or error}") from error
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
        found = json.loads(text, object_pairs_hook=_once)
        if HALVES.search(line):
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise PatchbayError(
            f"{file}, line {number} holds half a letter (a surrogate without the other half), which no text has"
        ) from error
    except (ValueError, RecursionError) as error:
        raise PatchbayError(f"{file}, line {number} is no JSON{cut} ({error})") from error
    if units and isinstance(found, dict) and isinstance(found.get("units"), list) and found["units"]:
        return found
    if not isinstance(found, dict) or not isinstance(found.get("text"), str):
        raise PatchbayError(
            f"{file}, line {number} has no field `text` that is a text; it has {sorted(found) if isinstance(found, dict) else type(found).__name__}"
        )
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of a record, none of which may stand there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return found

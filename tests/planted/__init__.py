"""Planted bugs: one-line changes to the package that its tests must notice, as rows of the TOML files beside this one.

A row says what is wrong then (`name`), where (`file`, and `old`, which stands there exactly once), what is written instead
(`new`), and which tests must fail (`tests`, as pytest is given them: single ones, that take seconds). Each is a mistake that
somebody could make, that leaves the code running, and that makes a number, a choice or a refusal wrong. `methods` names the
methods that it belongs to where the file does not: a row in `patchbay/find/NAME.py` is one of `find.NAME`. `argued` says why a
change that nobody can observe is kept. One TOML file holds the rows of one room, `tests/planted/ROOM.toml`.

`python -m tests.planted` plants them one at a time in copies of the tree (`make planted`).
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).parents[2]
ROWS = Path(__file__).parent
KEYS = {"name", "file", "old", "new", "tests", "methods", "argued"}


@dataclass(frozen=True)
class Bug:
    """One planted bug."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    methods: tuple[str, ...] = ()
    argued: str = ""

    @classmethod
    def of(cls, row: dict[str, Any]) -> Bug:
        """A row of a TOML file. Raises ValueError on a key that means nothing."""
        if strange := set(row) - KEYS:
            raise ValueError(f"{row.get('name')}: no key {sorted(strange)}; a row has {sorted(KEYS)}")
        lists = {key: tuple(row[key]) for key in ("tests", "methods") if key in row}
        return cls(**(row | lists))

    @property
    def room(self) -> str:
        """The folder of the package that it is in, or the file's name where that stands in none."""
        return PurePosixPath(self.file).parts[1].removesuffix(".py")

    @property
    def belongs_to(self) -> set[str]:
        """The methods that it is a bug of, as `verb.name`."""
        path = PurePosixPath(self.file)
        return {*self.methods, f"{self.room}.{path.stem}"} if len(path.parts) == 3 else set(self.methods)

    def planted(self, text: str) -> str:
        """The file's text with the bug. Raises ValueError unless `old` stands there exactly once."""
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: {self.old!r} stands {count} times in {self.file}")
        return text.replace(self.old, self.new)

    @property
    def test_files(self) -> list[str]:
        return sorted({test.split("::")[0] for test in self.tests})

    def key(self, root: Path) -> str:
        """What its outcome depends on: the row, the file that it changes and the test files that it names."""
        digest = hashlib.sha256(json.dumps([self.file, self.old, self.new, self.tests]).encode())
        for path in (self.file, *self.test_files):
            digest.update((root / path).read_bytes())
        return digest.hexdigest()[:16]


def bugs(folder: Path = ROWS) -> list[Bug]:
    """All rows, file by file."""
    return [bug for path in sorted(folder.glob("*.toml")) for bug in rows_of(path.read_text(encoding="utf-8"))]


def rows_of(text: str) -> list[Bug]:
    """The rows of one TOML file."""
    return [Bug.of(row) for row in tomllib.loads(text).get("bug", ())]


def share(outcomes: Sequence[str]) -> float:
    """Share of the bugs that were noticed, of those that anything could notice."""
    seen = [outcome for outcome in outcomes if outcome != "argued"]
    return sum(outcome == "noticed" for outcome in seen) / len(seen) if seen else 1.0

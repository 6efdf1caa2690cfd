"""Planted bugs: one-line changes to the package that its tests must notice, as rows of the TOML files beside this one.

A row says where (`file`, and `old`, which stands there exactly once), what is written instead (`new`), and which tests must
fail then (`tests`, as pytest is given them). Each is a mistake that somebody could make, that leaves the code running, and that
makes a number wrong. `python -m tests.planted` plants them one at a time in a copy of the tree (`make planted`).
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROWS = Path(__file__).parent


@dataclass(frozen=True)
class Bug:
    """One planted bug."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def planted(self, text: str) -> str:
        """The file's text with the bug. Raises ValueError unless `old` stands there exactly once."""
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: {self.old!r} stands {count} times in {self.file}")
        return text.replace(self.old, self.new)

    def key(self, root: Path) -> str:
        """What its outcome depends on: the row, the file that it changes and the test files that it names."""
        named = sorted({test.split("::")[0] for test in self.tests})
        digest = hashlib.sha256(json.dumps([self.file, self.old, self.new, self.tests]).encode())
        for path in (self.file, *named):
            digest.update((root / path).read_bytes())
        return digest.hexdigest()[:16]


def bugs(folder: Path = ROWS) -> list[Bug]:
    """All rows, file by file."""
    found = []
    for path in sorted(folder.glob("*.toml")):
        for row in tomllib.loads(path.read_text(encoding="utf-8"))["bug"]:
            found.append(Bug(row["name"], row["file"], row["old"], row["new"], tuple(row["tests"])))
    return found


def share(outcomes: Sequence[str]) -> float:
    """Share of the bugs that were noticed."""
    return sum(outcome == "noticed" for outcome in outcomes) / len(outcomes) if outcomes else 1.0

"""A copy of the tree in which bugs are planted one at a time, and the process that runs tests in it."""

from __future__ import annotations

import compileall
import json
import os
import py_compile
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.planted import ROOT, Bug

COPIED = ("patchbay", "tests", "docs", "bench")
FILES = ("pyproject.toml", "README.md", "CONTRIBUTING.md", "constraints.txt", "Makefile", "mkdocs.yml")
NEVER_RAN = ("ImportError", "ModuleNotFoundError", "SyntaxError", "IndentationError")


@dataclass(frozen=True)
class Outcome:
    """What became of one bug: `noticed`, `survived`, `broken` or `argued`; by which test, and what that raised."""

    what: str
    by: str = ""
    how: str = ""


def copy_of(root: Path, into: Path) -> Path:
    """The part of the tree that tests need, compiled so that a run compiles only the file that changed."""
    for name in COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, into / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        if (root / name).exists():
            shutil.copy2(root / name, into / name)
    compileall.compile_dir(into / "patchbay", quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
    return into


class Tree:
    """A copy of the tree, and the process that runs tests in it."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = copy_of(root, folder)
        env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-B", "-m", "tests.planted.worker", str(folder)]
        pipe = subprocess.PIPE
        self.worker = subprocess.Popen(command, cwd=ROOT, env=env, stdin=pipe, stdout=pipe, text=True)

    def run(self, tests: Sequence[str], seconds: float, every: bool = False) -> dict[str, Any]:
        """The worker's answer: up to the first test that fails, or of `every` one."""
        assert self.worker.stdin is not None
        assert self.worker.stdout is not None
        self.worker.stdin.write(json.dumps({"tests": list(tests), "seconds": seconds, "all": every}) + "\n")
        self.worker.stdin.flush()
        return json.loads(self.worker.stdout.readline())

    def plant(self, bug: Bug, seconds: float) -> Outcome:
        """The outcome of one bug; the copy is left as it was."""
        path = self.folder / bug.file
        whole = path.read_text(encoding="utf-8")
        try:
            planted = bug.planted(whole)
            compile(planted, bug.file, "exec")
        except (ValueError, SyntaxError) as error:
            return Outcome("broken", how=str(error))
        path.write_text(planted, encoding="utf-8")
        try:
            return self.judged(bug, self.run(bug.tests, seconds))
        finally:
            path.write_text(whole, encoding="utf-8")

    def judged(self, bug: Bug, found: dict[str, Any]) -> Outcome:
        """What the worker's answer says of the bug."""
        if found["code"] in ("time", "killed"):
            return Outcome("noticed", how=f"ended: {found['code']}")
        if found["code"] == 0:
            if not found["passed"]:
                return Outcome("broken", how="no test ran")
            return Outcome("argued" if bug.argued else "survived")
        if found["code"] != 1 or not found["failed"]:
            return Outcome("broken", how=f"nothing could be imported or collected: pytest ends with {found['code']}")
        by, how = found["failed"][0]
        if how in NEVER_RAN:
            return Outcome("broken", by, f"{how}: the changed code never ran")
        return Outcome("broken", by, "argued, and noticed") if bug.argued else Outcome("noticed", by, how)

    def close(self) -> None:
        assert self.worker.stdin is not None
        self.worker.stdin.close()
        self.worker.wait()
        assert self.worker.stdout is not None
        self.worker.stdout.close()

"""What stays of runs in a folder: finished ones as checkpoints with what was told of them, the one at work, and whose they are.

One call at a time has a folder: another that comes meanwhile is refused, and what a killed one left half written goes. Of processes that train together the first alone writes.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchbay import files
from patchbay.files import record_of, write_file
from patchbay.signal.port import PatchbayError
from patchbay.train import _together

REQUEST, TOLD = "lab.json", "run.json"
CAME = ("scores", "losses", "start", "end", "seen", "panel", "weights", "nonzero", "state")  # what is told of a run


@dataclass
class Kept:
    """Runs by what they are; `folder` None: kept for this call alone."""

    folder: Path | None
    nowhere: Path
    request: dict[str, Any]
    made: dict[Any, Any] = field(default_factory=dict)
    fresh: bool = False  # whether this call made the folder

    def __post_init__(self) -> None:
        if self.folder is not None:
            self.fresh = not self.folder.exists()
            self._check(self.folder)

    def _check(self, folder: Path) -> None:
        """Raise PatchbayError for a folder of something else; else it is this call's."""
        found = record_of(folder, REQUEST, "a folder of training runs")
        if found is not None and found != self.request:
            if not isinstance(found, dict):
                raise PatchbayError(f"{folder / REQUEST} is not of training runs: give another folder")
            differ = ", ".join(key for key in self.request if found.get(key) != self.request[key])
            raise PatchbayError(f"{folder} holds runs of another {differ}: give another folder, or remove it")
        # what another process had half written the first would take for left by a killed call
        if found is None and _together.first():
            write_file(folder / REQUEST, json.dumps(self.request).encode())

    @contextlib.contextmanager
    def alone(self) -> Iterator[Kept]:
        """While the block runs no other call has the folder; one that has it already is told by a PatchbayError."""
        if self.folder is None or not _together.first():
            yield self
            return
        with files.alone(self.folder):
            self._check(self.folder)  # another call may have come between
            for left in self.folder.glob(f".*{files.PARTIAL}"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            try:
                yield self
            except PatchbayError:
                self._leave(self.folder)
                raise

    def _leave(self, folder: Path) -> None:
        """Remove a folder that this call made and that holds nothing of a run: what was refused may be asked for again under the same name."""
        if self.fresh and not any(path.is_file() for path in folder.rglob("*") if path != folder / REQUEST):
            shutil.rmtree(folder, ignore_errors=True)

    def finished(self, name: str, arm: dict[str, Any]) -> dict[str, Any] | None:
        """What was told of a run that ended."""
        if self.folder is None or not (self.folder / name / TOLD).is_file():
            return None
        told: dict[str, Any] = record_of(self.folder / name, TOLD, "a run")
        said = told if isinstance(told, dict) else {}
        lacking = [key for key in ("arm", *CAME) if key not in said]
        if lacking:
            raise PatchbayError(
                f"{self.folder / name / TOLD} does not say what came of a run ({', '.join(lacking)}): remove {self.folder / name}, and it is trained again"
            )
        if told["arm"] != arm:
            raise PatchbayError(f"{self.folder / name} is of another run ({told['arm']}): give another folder")
        return told

    def at_work(self, name: str) -> Path:
        """Where checkpoints of the run lie while it is trained."""
        return (self.nowhere if self.folder is None else self.folder) / f".{name}"

    def end(self, name: str) -> None:
        """Remove what the run was trained from."""
        shutil.rmtree(self.at_work(name), ignore_errors=True)

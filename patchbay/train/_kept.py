"""What stays of runs in a folder: finished ones as checkpoints with what was told of them, the one at work, and whose they are."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchbay.files import record_of, write_file
from patchbay.signal.port import PatchbayError

REQUEST, TOLD = "lab.json", "run.json"


@dataclass
class Kept:
    """Runs by what they are; `folder` None: kept for this call alone."""

    folder: Path | None
    nowhere: Path
    request: dict[str, Any]
    made: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.folder is None:
            return
        found = record_of(self.folder, REQUEST, "a folder of training runs")
        if found is not None and found != self.request:
            differ = ", ".join(key for key in self.request if found.get(key) != self.request[key])
            raise PatchbayError(f"{self.folder} holds runs of another {differ}: give another folder, or remove it")
        if found is None:
            write_file(self.folder / REQUEST, json.dumps(self.request).encode())

    def finished(self, name: str, arm: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint of a run that ended, and what was told of it."""
        if self.folder is None or not (self.folder / name / TOLD).is_file():
            return None
        told = json.loads((self.folder / name / TOLD).read_text(encoding="utf-8"))
        if told["arm"] != arm:
            raise PatchbayError(f"{self.folder / name} is of another run ({told['arm']}): give another folder")
        return self.folder / name, told

    def at_work(self, name: str) -> Path:
        """Where checkpoints of the run lie while it is trained."""
        return (self.nowhere if self.folder is None else self.folder) / f".{name}"

    def end(self, name: str) -> None:
        shutil.rmtree(self.at_work(name), ignore_errors=True)

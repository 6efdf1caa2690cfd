"""The folder of results, which is all the state that the page has: what lies in it, also what is damaged, read without torch.

A folder with `result.json` is a Result, a `.knob` file a knob; both may lie some folders down. Names are paths inside the folder;
one that leads out of it, also by a link, is refused. Hidden names are passed over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from patchbay.errors import PatchbayError
from patchbay.results.saved import FILES, read_saved
from patchbay.serve.guard import inside

DEEP, MOST = 4, 2000  # folders down, and entries, that are looked at
HEADER = 16 << 20  # bytes of a knob's header that are read


class Results:
    """A folder of Results and knobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._known: dict[Path, tuple[Any, dict[str, Any]]] = {}

    def listed(self) -> list[dict[str, Any]]:
        """Every Result and knob as a line, newest first; what is damaged says how."""
        entries = [self._entry(path) for path in self._paths()]
        return sorted(entries, key=lambda entry: (entry["date"], entry["name"]), reverse=True)

    def path(self, name: str) -> Path:
        """Where an entry lies; refuses a name that leads out of the folder, and one that is not there."""
        path = inside(self.folder, name)
        if path == self.folder or not path.exists():
            raise PatchbayError(f"{name} is not in {self.folder}")
        return path

    def read(self, name: str) -> Any:
        """The Result or knob of that name."""
        import patchbay as pb

        path = self.path(name)
        return pb.load_result(path) if path.is_dir() else pb.load_knob(path)

    def document(self, name: str, **options: Any) -> dict[str, Any]:
        """The same as the front end draws it."""
        from patchbay.app.document import document

        return document(self.read(name), name=name, **options)

    def turned(self, name: str, strength: float, saved: str) -> str:
        """Save a knob of the folder at another strength, under a name that is free; returns it."""
        knob = self.read(name)
        if not hasattr(knob, "edits_at"):
            raise PatchbayError(f"{name} is a Result, and no knob")
        target = self.free(checked(saved or name).removesuffix(".knob"))
        knob.at(strength).save(self.folder / f"{target}.knob")
        return f"{target}.knob"

    def free(self, name: str, taken: Collection[str] = ()) -> str:
        """`name`, or with the next number that neither the folder nor `taken` has."""
        inside(self.folder, name)
        while name in taken or (self.folder / name).exists() or (self.folder / f"{name}.knob").exists():
            name = _next(name)
        return name

    def _paths(self) -> Iterator[Path]:
        found = 0
        for root, folders, files in os.walk(self.folder):
            here = Path(root)
            deep = len(here.relative_to(self.folder).parts)
            folders[:] = sorted(name for name in folders if not name.startswith(".")) if deep < DEEP else []
            own = [here / name for name in sorted(files) if name.endswith(".knob") and not name.startswith(".")]
            if here != self.folder and set(files) & set(FILES):
                own, folders[:] = [here], []
            for path in own:
                found += 1
                if found > MOST:
                    return
                yield path

    def _entry(self, path: Path) -> dict[str, Any]:
        """One line, read anew only where the files have changed."""
        files = [path / name for name in FILES] if path.is_dir() else [path]
        stamp = [(file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.exists()]
        known = self._known.get(path)
        if known is None or known[0] != stamp:
            known = self._known[path] = stamp, self._said(path, max((when for when, _ in stamp), default=0))
        return known[1]

    def _said(self, path: Path, changed: int) -> dict[str, Any]:
        date = datetime.fromtimestamp(changed / 1e9, UTC).isoformat(timespec="seconds")
        entry = {"name": path.relative_to(self.folder).as_posix(), "date": date, "message": ""}
        try:
            record = read_saved(path)[0] if path.is_dir() else _knob_record(path)
            return entry | {"kind": "result" if path.is_dir() else "knob"} | _of_record(record)
        except (PatchbayError, OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            said = str(error).replace(f"{path} ", "").replace(f"{path}: ", "")
            return entry | {"kind": "damaged", "method": "", "model": "", "about": "", "message": said[:300]}


def checked(name: str) -> str:
    """A name that a Result or a knob may have in the folder, without spaces around it."""
    name = name.strip()
    if not name or name.startswith(".") or "/." in name or name.endswith("/") or len(name) > 200:
        raise PatchbayError(f"{name!r} is no name for a Result: letters, digits, - and _, and / for folders")
    return name


def _next(name: str) -> str:
    stem, _, number = name.rpartition("-")
    return f"{stem}-{int(number) + 1}" if stem and number.isdecimal() and len(number) < 9 else f"{name}-2"


def _of_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a line says of a record: method, model, task and the unit of the main variable."""
    made = record["provenance"]
    task, model = made.get("task") or {}, made.get("model") or {}
    variables = record.get("variables") or [{}]
    prompts = task.get("prompts")
    about = [task.get("name") or (prompts if isinstance(prompts, str) else ""), variables[0].get("unit")]
    date = {"date": str(made["date"])} if made.get("date") else {}
    said = " · ".join(str(one)[:80] for one in about if one)
    return {"method": str(made.get("method") or ""), "model": str(model.get("source") or ""), "about": said} | date


def _knob_record(path: Path) -> dict[str, Any]:
    """The record in a knob's header; a file of another program's vectors has none."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= min(HEADER, path.stat().st_size - 8):
            raise PatchbayError("is no knob, or a damaged one: its header is cut or too large")
        marks = json.loads(file.read(size)).get("__metadata__") or {}
    return dict(json.loads(marks["knob"])) if "knob" in marks else {"provenance": {}}

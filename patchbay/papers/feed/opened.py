"""The store that commands read and write, with the catalogue's entries in it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from patchbay.errors import PatchbayError
from patchbay.papers import catalogue
from patchbay.papers.feed.store import Store

NAMED = "PATCHBAY_PAPERS"  # the environment's name for the file


def usual_path() -> Path:
    """The file that $PATCHBAY_PAPERS names, else papers.sqlite where programs of this user keep their data."""
    if named := os.environ.get(NAMED):
        return Path(named)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "patchbay" / "papers.sqlite"


def opened(path: str | Path | None = None, *, make: bool = False) -> Store:
    """The store at `path` or at the usual place. Where there is none: made, with `make`; else one in memory, of the catalogue alone.
    Raises PatchbayError where `path` was given and is not there."""
    file = usual_path() if path is None else Path(path)
    if not make and not file.exists():
        if path is not None:
            raise PatchbayError(f"no store of papers at {file}; `patchbay papers sync SOURCE --store {file}` makes one")
        store = Store()
    else:
        store = Store(file)
    entries = catalogue.papers()
    state = hashlib.sha256(json.dumps(entries, sort_keys=True, default=str).encode()).hexdigest()
    store.catalogue(entries, state)
    return store

"""Finished batches of a sweep, kept in a folder, so that the same call goes on where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as write_tensors
from torch import Tensor

from patchbay.files import record_of, write_file
from patchbay.signal.port import PatchbayError


class Kept:
    """Finished batches in a folder: `sweep.json` says what they belong to, each batch is one safetensors file."""

    def __init__(self, folder: str | Path, digest: str) -> None:
        self.folder = Path(folder)
        manifest = {"format": "patchbay-sweep", "version": 1, "digest": digest}
        found = record_of(self.folder, "sweep.json", "a sweep")
        if found is None:
            write_file(self.folder / "sweep.json", json.dumps(manifest).encode())
        elif found != manifest:
            raise PatchbayError(
                f"{self.folder} holds another sweep (model, prompts, answers, edits, metric, memory or versions differ): choose another folder"
            )

    def path(self, group: int, place: int) -> Path:
        return self.folder / f"batch-{group:03d}-{place:05d}.safetensors"

    def read(self, group: int, place: int) -> Tensor | None:
        path = self.path(group, place)
        if not path.exists():
            return None
        try:
            return load_file(path)["value"]
        except (SafetensorError, OSError, KeyError):
            path.unlink()  # cut off while it was written by something that does not rename: compute it again
            return None

    def write(self, group: int, place: int, block: Tensor) -> None:
        try:
            write_file(self.path(group, place), write_tensors({"value": block.contiguous()}))
        except PatchbayError as error:
            raise PatchbayError(f"{error}; finished batches stay, the same call goes on from them") from error

"""Fingerprints of saved models, kept from one load to the next: gigabytes of weights are hashed once, and not at every start.

They lie in the user's cache folder (`$XDG_CACHE_HOME/patchbay/fingerprints`, else `~/.cache/...`), each under the BLAKE3 of the model's
class, dtypes, the versions of transformers and torch, and path, size and time of change of each file that it was loaded from. A
kept one is taken where no weight has changed since the load, as far as PyTorch counts changes, and where a number in every row and every
column of every weight is what was hashed: a row that was set through `.data`, which PyTorch does not count, is found by that, and so
are weights that a checkpoint lacks and that are drawn anew at each load; a single number set so is not. What has an adapter, a
quantiser or code of its own, or lies partly elsewhere, is hashed each time, and so is what is small.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from blake3 import blake3
from torch import Tensor, nn

from patchbay.files import write_file
from patchbay.model.fingerprint import fingerprint_of, switched, version_of
from patchbay.model.source import folder
from patchbay.signal.port import PatchbayError

LEAST = 64 * 2**20  # bytes of files below which hashing takes no time worth saving
Stamps = list[tuple[str, int, int]]


@dataclass(frozen=True)
class Loaded:
    """Weights as they were when their load was done, and where their fingerprint is kept."""

    version: tuple[Any, ...]
    path: Path


def stamps(source: str, hf: Any = None) -> Stamps:
    """Path, size and time of change of the files of a local folder or GGUF file; of a hub name, when it is loaded, of those in the hub's cache."""
    place = Path(folder(source))
    if hf is not None and not place.exists():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(source, "config.json", revision=getattr(hf.config, "_commit_hash", None))
        place = Path(found).parent if isinstance(found, str) else place
    held = [place] if place.is_file() else sorted([*place.glob("*.safetensors"), *place.glob("*.json")])
    whole = [(os.path.realpath(path), path.stat()) for path in held]
    return [(path, at.st_size, at.st_mtime_ns) for path, at in whole]


def loaded(hf: nn.Module, source: str, before: Stamps) -> Loaded | None:
    """What to keep a fingerprint by, for a model that was just loaded; `before`: the stamps of a local source before the load."""
    state = hf.state_dict()
    plain = all(type(value) in (Tensor, nn.Parameter) and _here(value) for value in state.values())
    own_code = type(hf).__module__.partition(".")[0] != "transformers"
    if not plain or own_code or getattr(hf, "hf_quantizer", None) is not None or switched(hf):
        return None
    files = stamps(source, hf)
    weights = sum(size for path, size, _ in files if not path.endswith(".json"))
    if weights <= LEAST or (before and before != files):
        return None
    dtypes = sorted({str(value.dtype) for value in state.values()})
    told = [type(hf).__qualname__, dtypes, transformers.__version__, str(torch.__version__), files]
    place = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if not place.is_absolute():  # there is no home
        return None
    key = blake3(json.dumps(told).encode()).hexdigest()
    return Loaded(version_of(hf), place / "patchbay" / "fingerprints" / key)


def fingerprint(hf: nn.Module, version: tuple[Any, ...], loaded: Loaded | None) -> str:
    """The fingerprint of the weights: the kept one where it is theirs, else computed, and kept where they are as they were loaded."""
    if loaded is None or loaded.version != version:
        return fingerprint_of(hf)
    sample = _sample(hf)
    with contextlib.suppress(OSError, ValueError):
        found, *marks = loaded.path.read_text(encoding="ascii").split()
        if marks == [sample, _mark(found, sample)]:
            return found
    made = fingerprint_of(hf)
    with contextlib.suppress(PatchbayError, OSError):  # a home that cannot be written to
        write_file(loaded.path, f"{made} {sample} {_mark(made, sample)}\n".encode())
    return made


def _here(value: Tensor) -> bool:
    return value.device.type != "meta" and not value.is_quantized and value.layout == torch.strided


def _mark(found: str, sample: str) -> str:
    return str(blake3(f"{found} {sample}".encode()).hexdigest())


def _sample(hf: nn.Module) -> str:
    """BLAKE3 of a number in every row and in every column of every tensor, taken as a matrix [..., last axis]."""
    digest = blake3()
    for name, value in sorted(hf.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        if value.numel():
            matrix = value.detach().reshape(-1, value.shape[-1] if value.ndim else 1)
            rows, columns = matrix.shape
            at = torch.arange(max(rows, columns), device=value.device)
            digest.update(memoryview(matrix[at % rows, at % columns].cpu().view(torch.uint8).numpy()))
    return str(digest.hexdigest())

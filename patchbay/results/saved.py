"""Plain data: what strict JSON holds of a Result, a knob and their records; and the files of a saved Result, read and checked without torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patchbay.signal.channel import Channel
from patchbay.signal.port import Part, PatchbayError

FORMAT, VERSION = "patchbay-result", 1
FILES = ("arrays.safetensors", "result.json")


def plain(value: Any) -> Any:
    """Parts as text, numbers as Python's own, tuples as lists; refuses what JSON cannot hold."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)  # numpy's float64 is a float that prints otherwise
    if isinstance(value, Part | Channel):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist") and getattr(value, "ndim", 1) == 0:
        return value.tolist()
    raise PatchbayError(f"a Result's tables, labels and provenance hold plain data, got {type(value).__name__}")


def packed(value: Any) -> Any:
    """Plain data that strict JSON holds: NaN and the infinities become {"$float": "nan"}."""
    value = plain(value)
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(value)}
    if isinstance(value, dict):
        return {key: packed(item) for key, item in value.items()}
    return [packed(item) for item in value] if isinstance(value, list) else value


def unpacked(value: Any) -> Any:
    """What `packed` was given."""
    if isinstance(value, dict):
        return float(value["$float"]) if set(value) == {"$float"} else {k: unpacked(v) for k, v in value.items()}
    return [unpacked(item) for item in value] if isinstance(value, list) else value


def read_saved(folder: str | Path) -> tuple[dict[str, Any], bytes]:
    """The record of a saved Result as it stands, and the bytes of its arrays, whose checksum is the record's; refuses all else."""
    folder = Path(folder)
    if not folder.is_dir():
        raise PatchbayError(
            f"{folder} is {'a file, not a folder' if folder.exists() else 'not there'}: no Result to load"
        )
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise PatchbayError(f"{folder} is not a saved Result: it lacks {' and '.join(missing)}; it holds {found}")
    try:
        record = json.loads((folder / FILES[1]).read_bytes())
        marker, version = record["format"], record["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PatchbayError(f"{folder}: result.json is damaged or no Patchbay file ({error!r})") from error
    if marker != FORMAT:
        raise PatchbayError(f"{folder} holds {marker!r}, not {FORMAT!r}")
    if version != VERSION:
        raise PatchbayError(
            f"{folder} has format version {version!r}; this Patchbay reads version {VERSION}: update it"
        )
    try:
        arrays = (folder / FILES[0]).read_bytes()
        altered = hashlib.sha256(arrays).hexdigest() != record["arrays_sha256"]
    except (OSError, KeyError, TypeError) as error:
        raise PatchbayError(f"{folder} is a damaged Result: {error!r}") from error
    if altered:
        reason = f"arrays.safetensors is truncated or altered ({len(arrays)} bytes, checksum differs)"
        raise PatchbayError(f"{folder} is a damaged Result: {reason}")
    return record, arrays

"""Plain data: what strict JSON holds of a Result, a knob and their records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from patchbay.signal.channel import Channel
from patchbay.signal.port import Part, PatchbayError


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

"""The trained checkpoints that oracles of decoders were measured on, their five prompts, and the digest of a list of texts."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence

import pytest

import patchbay as pb
from tests.shared import SHARED

FIVE = [
    "Once upon a time",
    "One day, a little girl named Lily",
    "Tom and his dog",
    "The sun was shining and",
    "There was a big red ball",
]
T260, G512 = "stories260K", "gpt2-sp512-tinystories-0.28m"


@functools.cache
def stories(name: str = T260) -> pb.Model:
    path = SHARED / "models" / name
    if not path.is_dir():
        pytest.skip(f"no {path}: set PATCHBAY_SHARED to the folder of shared checkpoints")
    return pb.load(path)


def new_tokens(found: pb.Result) -> list[list[list[int]]]:
    """[prompt][draft] the new tokens of a Result."""
    return [[[t for t in row if t >= 0] for row in drafts] for drafts in found["tokens"].tolist()]


def digest(lists: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(lists).encode()).hexdigest()[:12]

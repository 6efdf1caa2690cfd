"""GGUF, the file format of llama.cpp, as far as control vectors need it: fields, and arrays of numbers, written and read.

Version 3, little-endian. An array of the file has its longest stride first; here it has the shape that numpy gives it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchbay.errors import PatchbayError

KINDS = {0: "<f4", 1: "<f2"}  # of arrays; quantised ones are not read
NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
TEXT, LIST = 8, 9


def write_gguf(path: Path, fields: Mapping[str, str | int], arrays: Mapping[str, Any]) -> None:
    """GGUF version 3, little-endian: texts and unsigned numbers as fields, one-dimensional float32 arrays."""

    def text(value: str) -> bytes:
        raw = value.encode()
        return struct.pack("<Q", len(raw)) + raw

    def aligned(content: bytes) -> bytes:
        return content + bytes(-len(content) % 32)

    head = b"GGUF" + struct.pack("<IQQ", 3, len(arrays), len(fields))
    for name, value in fields.items():
        typed = struct.pack("<I", 8) + text(value) if isinstance(value, str) else struct.pack("<II", 4, value)
        head += text(name) + typed
    data = b""
    for name, array in arrays.items():
        head += text(name) + struct.pack("<IQIQ", 1, array.size, 0, len(data))  # dimensions, length, float32, place
        data += aligned(array.astype("<f4").tobytes())
    path.write_bytes(aligned(head) + data)


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields and arrays (as float32) of a GGUF file. Raises PatchbayError where it is damaged or quantised."""
    raw = path.read_bytes()
    try:
        return _Reader(raw).file()
    except (
        struct.error,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        ArithmeticError,
        MemoryError,
        RecursionError,
    ) as error:
        if isinstance(error, PatchbayError):
            raise
        raise PatchbayError(f"{path} is no GGUF file, or a damaged one: {error!r}") from error


class _Reader:
    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 0

    def number(self, kind: str) -> Any:
        (value,) = struct.unpack_from(kind, self.raw, self.at)
        self.at += struct.calcsize(kind)
        return value

    def text(self) -> str:
        length = self.number("<Q")
        if self.at + length > len(self.raw):
            raise PatchbayError(f"a GGUF text of {length} bytes goes beyond the file's end")
        self.at += length
        return self.raw[self.at - length : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text()
        if kind == LIST:
            inner, length = self.number("<I"), self.number("<Q")
            if length > len(self.raw):
                raise PatchbayError(f"a GGUF list of {length} entries goes beyond the file's end")
            return [self.value(inner) for _ in range(length)]
        return self.number(NUMBERS[kind])

    def file(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self.raw[:4] != b"GGUF":
            raise PatchbayError(f"a GGUF file begins with GGUF, this one with {self.raw[:4]!r}")
        self.at = 4
        version, n_arrays, n_fields = self.number("<I"), self.number("<Q"), self.number("<Q")
        if version not in (2, 3):
            raise PatchbayError(f"GGUF version {version}; versions 2 and 3 are read")
        if n_arrays + n_fields > len(self.raw):
            raise PatchbayError("a GGUF file that announces more than it holds")
        fields = {}
        for _ in range(n_fields):
            name = self.text()
            fields[name] = self.value(self.number("<I"))
        heads = [self.head() for _ in range(n_arrays)]
        step = int(fields.get("general.alignment", 32))
        start = -(-self.at // step) * step
        return fields, {name: self.array(name, shape, kind, start + place) for name, shape, kind, place in heads}

    def head(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.text()
        shape = tuple(self.number("<Q") for _ in range(self.number("<I")))
        return name, shape[::-1], self.number("<I"), self.number("<Q")

    def array(self, name: str, shape: tuple[int, ...], kind: int, place: int) -> Tensor:
        if kind not in KINDS:
            raise PatchbayError(f"{name} is of GGUF kind {kind}; arrays of float32 (0) and float16 (1) are read")
        count = int(np.prod(shape, dtype=np.int64))
        values = np.frombuffer(self.raw, KINDS[kind], count, place).reshape(shape)
        return torch.from_numpy(values.astype(np.float32))

"""Shards of a trace: the signals of some batches of prompts as rows without padding, in one safetensors file.

A signal lies as [row, ...]: a row is a token, prompt after prompt, and the port's other axes follow in their order. An attention
pattern lies flat: of each prompt its own queries, heads and keys, [query, head, key]. The logits of last positions have a row for each
prompt. The header says which batches these are, of which request, and the BLAKE3 of every tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from patchbay.files import write_file
from patchbay.signal.port import PatchbayError, Port, parse_port

SHARD = 2**28  # bytes of signals after which a shard ends, with the batch that it is in
ALL, LAST, IDS = (
    "logits of all positions",
    "logits of last positions",
    "token ids",
)  # tensors of a shard beside the ports


def packed(value: Tensor, port: Port, lengths: Tensor) -> Tensor:
    """A signal of one batch as it lies in a shard, on the CPU."""
    if port.signal == "attn.pattern":
        own = (
            one[..., : n if port.query is None else one.shape[-2], :n]
            for one, n in zip(value, lengths.tolist(), strict=True)
        )
        return torch.cat([one.movedim(-2, 0).flatten() for one in own]).cpu()
    value = value.movedim(port.tapped_axis, 1)  # [prompt, position, ...]
    if int(lengths.min()) >= value.shape[1]:
        return value.flatten(0, 1).cpu()
    return value[(torch.arange(value.shape[1]) < lengths[:, None]).to(value.device)].cpu()


def units(name: str, lengths: Sequence[int]) -> int:
    """How often a tensor of a shard repeats for prompts of these lengths: its size is this times one number."""
    if name == LAST:
        return len(lengths)
    port = _pattern(name)
    if port is None:
        return sum(lengths)
    return sum(n * (n if port.query is None else len(port.query)) for n in lengths)


def _pattern(name: str) -> Port | None:
    """The port of a tensor of a shard, if that is a pattern."""
    return parse_port(name) if ".pattern" in name else None


def pieces(stored: Tensor, name: str, lengths: Sequence[int]) -> Iterator[Tensor]:
    """Of a shard's tensor each prompt's part: [position, ...], of patterns [query, head, key] or [query, key]."""
    port = _pattern(name)
    each = [units(name, [n]) for n in lengths]
    if port is None:
        yield from stored.split(each)
        return
    heads = stored.numel() // max(1, sum(each))
    for one, n in zip(stored.split([heads * size for size in each]), lengths, strict=True):
        yield one.view(-1, n) if port.index is not None else one.view(-1, heads, n)


def filled(parts: Iterator[dict[str, Tensor]], lengths: Sequence[Sequence[int]]) -> tuple[dict[str, Tensor], int]:
    """The tensors of one shard and how many batches are in it. `parts` are those of batches with these lengths, made as they are
    taken: one batch and one shard are in memory."""
    first = next(parts)
    each = [
        sum(t.nbytes // units(name, lengths[0]) * units(name, some) for name, t in first.items()) for some in lengths
    ]
    total, n = 0, 0
    while n < len(each) and total < SHARD:
        total, n = total + each[n], n + 1
    shard = {}
    for name, tensor in first.items():
        rows = sum(units(name, some) for some in lengths[:n]) * len(tensor) // units(name, lengths[0])
        shard[name] = tensor.new_empty((rows, *tensor.shape[1:]))
        shard[name][: len(tensor)] = tensor
    at = {name: len(tensor) for name, tensor in first.items()}
    del first, tensor
    for part in islice(parts, n - 1):
        for name, tensor in part.items():
            shard[name][at[name] : at[name] + len(tensor)] = tensor
            at[name] += len(tensor)
        del part, tensor  # before the next batch is run
    return shard, n


def digest(tensor: Tensor) -> str:
    """BLAKE3 of the bytes of a tensor in memory."""
    return str(blake3(memoryview(tensor.flatten().view(torch.uint8).numpy())).hexdigest())


class Shards:
    """The shards of one request in a folder."""

    def __init__(self, folder: Path, request: str) -> None:
        self.folder, self.request = folder, request
        self._checked: set[tuple[int, str]] = set()

    def path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def write(self, number: int, tensors: dict[str, Tensor], first: int, batches: int) -> None:
        marks: dict[str, Any] = {"request": self.request, "first": first, "batches": batches}
        header = {"trace": json.dumps(marks | {"blake3": {name: digest(t) for name, t in tensors.items()}})}
        try:
            write_file(self.path(number), lambda path: save_file(tensors, path, metadata=header))
        except PatchbayError as error:
            raise PatchbayError(f"{error}; finished shards stay, the same call goes on from them") from error

    def batches(self, number: int, first: int) -> int:
        """How many batches a shard that begins with batch `first` holds; 0 where it is not there, or not whole."""
        try:
            marks = self._marks(number)
            if marks["first"] != first:
                return 0
            for name in marks["blake3"]:
                self.read(number, name)
            return int(marks["batches"])
        except (PatchbayError, KeyError):
            return 0

    def read(self, number: int, name: str) -> Tensor:
        """A tensor, mapped from its file; its bytes are checked when it is first asked for."""
        marks = self._marks(number)
        try:
            with safe_open(self.path(number), framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._damaged(number, str(error)) from error
        if (number, name) not in self._checked:
            if digest(tensor) != marks["blake3"].get(name):
                raise self._damaged(number, f"{name} is not what was written")
            self._checked.add((number, name))
        return tensor

    def _marks(self, number: int) -> dict[str, Any]:
        try:
            with safe_open(self.path(number), framework="pt") as file:
                marks: dict[str, Any] = json.loads((file.metadata() or {})["trace"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise self._damaged(number, str(error)) from error
        if marks.get("request") != self.request:
            raise self._damaged(number, "it is of another run")
        return marks

    def _damaged(self, number: int, why: str) -> PatchbayError:
        return PatchbayError(
            f"{self.path(number)} is damaged ({why.splitlines()[0] if why else 'unreadable'}): make the call of pb.run again, which makes "
            "this shard anew and keeps the others"
        )

"""Traces in folders, opened again: each signal is read when it is asked for, or as rows without padding.

`trace.json` says what was run and which prompts lie in which shard, at which row; `shard-*.safetensors` hold the signals and the
token ids, `edits.safetensors` the edits. A row is a token: prompt after prompt as they were run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor
from torch.nn.functional import pad

from patchbay.edits.edit import load_edits
from patchbay.errors import by_kind
from patchbay.files import record_of
from patchbay.model.shards import ALL, IDS, LAST, Shards, pieces
from patchbay.model.trace import Trace
from patchbay.signal.port import PatchbayError, Port, parse_port

FORMAT = {"format": "patchbay-trace", "version": 1}
RECORD, EDITS = "trace.json", "edits.safetensors"


def short(text: str) -> str:
    """BLAKE3 of a text."""
    return str(blake3(text.encode()).hexdigest())


def checked(record: Any, folder: Path) -> dict[str, Any]:
    """The record of a folder, if it is one and says what was written."""
    path = folder / RECORD
    if not isinstance(record, dict) or {name: record.get(name) for name in FORMAT} != FORMAT:
        raise PatchbayError(f"{path} is no record of a trace of version {FORMAT['version']}")
    rest = {name: value for name, value in record.items() if name not in (*FORMAT, "blake3")}
    if record.get("blake3") != short(json.dumps(rest)):
        raise PatchbayError(f"{path} is damaged: remove the folder and run again")
    return rest


class _Signals(Mapping[Port, Tensor]):
    """Signals by port, each read from the folder when it is asked for."""

    def __init__(self, trace: KeptTrace, ports: Sequence[str]) -> None:
        self._trace, self._ports = trace, [parse_port(text) for text in ports]

    def __getitem__(self, port: Port) -> Tensor:
        return self._trace._whole(str(port), port)

    def __contains__(self, port: object) -> bool:
        return port in self._ports

    def __iter__(self) -> Iterator[Port]:
        return iter(self._ports)

    def __len__(self) -> int:
        return len(self._ports)


class KeptTrace(Trace):
    """A trace in a folder: all that a Trace shows, each signal read when it is asked for, on the CPU; and its rows.

    A row is a token of a prompt, without padding, in the order in which prompts were run: `n_rows` of them, `rows(port, start,
    stop)`, `shards(port)` for all in turn, `places(start, stop)` for the prompt and position of each. `trace[port]` needs memory for
    the whole signal, the others for one shard.
    """

    def __init__(self, folder: Path, record: Mapping[str, Any]) -> None:
        asked = record["request"]
        self.folder, self.kept_logits = folder, str(asked["logits"])
        self.lengths = self.prompt_lengths = torch.tensor(record["lengths"])
        self.edits = load_edits(folder / EDITS) if record["touched"] else []
        self._touched = record["touched"]
        self._model = None
        self._shards = Shards(folder, short(json.dumps(asked)))
        self._prompts: list[list[int]] = [shard["prompts"] for shard in record["shards"]]
        order = torch.tensor([prompt for prompts in self._prompts for prompt in prompts])
        self._order, self._ends = order, self.lengths[order].cumsum(0)
        self._begins = [shard["row"] for shard in record["shards"]] + [self.n_rows]  # of each shard, and the end
        self._captured = _Signals(self, asked["taps"])

    def __getattr__(self, name: str) -> Any:
        """Ids, logits and touched positions are read, or written out, at the first look."""
        if name not in ("ids", "logits", "touched") or "_captured" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self.__dict__[name] = value = getattr(self, f"_read_{name}")()
        return value

    def _read_ids(self) -> Tensor:
        return self._whole(IDS, Port("embed"))

    def _read_logits(self) -> Tensor:
        if self.kept_logits == "none":
            raise PatchbayError(
                f"{self.folder} holds no logits: run with logits='all' or logits='last' into another folder"
            )
        if self.kept_logits == "all":
            return self._whole(ALL, Port("logits"))
        rows = torch.cat([self._shards.read(i, LAST) for i in range(len(self._prompts))])
        return rows[self._order.argsort()][:, None]

    def _read_touched(self) -> list[list[tuple[int, ...]]]:
        return [
            [tuple(i for a, b in zip(runs[::2], runs[1::2], strict=True) for i in range(a, b)) for runs in prompts]
            for prompts in self._touched
        ]

    @property
    def prompts_of_shards(self) -> list[list[int]]:
        """The prompts of each shard, in the order of their rows."""
        return [list(prompts) for prompts in self._prompts]

    @property
    def n_rows(self) -> int:
        """Tokens of all prompts."""
        return int(self._ends[-1])

    def __repr__(self) -> str:
        tokens = f"{self.n_rows} tokens of {len(self.lengths)} prompt{'s' if len(self.lengths) > 1 else ''}"
        lines = [f"Trace of {tokens} in {self.folder}, {len(self._prompts)} shards; logits kept: {self.kept_logits}"]
        lines += [f"  {port} [{', '.join(port.axes)}]" for port in self.ports]
        return "\n".join([*lines, *(f"  {edit}" for edit in self.edits)])

    def places(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Prompt and position of rows start to stop, each [row]."""
        rows = torch.arange(*self._span(start, stop))
        at = torch.searchsorted(self._ends, rows, right=True)
        return self._order[at], rows - self._ends[at] + self.lengths[self._order[at]]

    def rows(self, port: Port | str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start to stop of a signal, [row, ...]: the port's axes without prompt and position. A row of a pattern is a query's
        weights [row, key] or [row, head, key], 0 at keys that its prompt lacks."""
        start, stop = self._span(start, stop)
        found = [
            self._shard_rows(port, i, max(start, begin) - begin, min(stop, end) - begin)
            for i, (begin, end) in enumerate(pairwise(self._begins))
            if begin < stop and start < end
        ]
        return torch.cat(found) if found else self._shard_rows(port, 0, 0, 0)

    def shards(self, port: Port | str) -> Iterator[Tensor]:
        """All rows of a signal, shard by shard: [row, ...] as `rows` gives them."""
        for i, (begin, end) in enumerate(pairwise(self._begins)):
            yield self._shard_rows(port, i, 0, end - begin)

    def _span(self, start: int, stop: int | None) -> tuple[int, int]:
        stop = self.n_rows if stop is None else stop
        if not 0 <= start <= stop <= self.n_rows:
            raise PatchbayError(f"rows {start} to {stop}: this trace has rows 0 to {self.n_rows}")
        return start, stop

    def _shard_rows(self, asked: Port | str, shard: int, start: int, stop: int) -> Tensor:
        port = self.port(asked)
        held = self._held(port)
        if port.query is not None:
            raise PatchbayError(f"{port}: query rows are no rows of tokens; read them from trace[port]")
        stored = self._shards.read(shard, str(held))
        if held.signal == "attn.pattern":
            stored = self._queries(stored, held, shard)
        value = stored[start:stop].clone()
        if held.index == port.index:
            return value
        axes = [axis for i, axis in enumerate(held.axes) if i not in (0, held.tapped_axis)]
        return value.select(1 + axes.index(str(port.index_axis)), port.index or 0)

    def _queries(self, stored: Tensor, held: Port, shard: int) -> Tensor:
        """A shard's patterns as [row, head, key] or [row, key], as wide as the longest prompt of all."""
        width = int(self.lengths.max())
        lengths = self.lengths[self._prompts[shard]].tolist()
        return torch.cat([pad(piece, (0, width - piece.shape[-1])) for piece in pieces(stored, str(held), lengths)])

    def _whole(self, name: str, port: Port) -> Tensor:
        """A signal of all prompts with its padding, as a run in memory gives it: [prompt, ...]."""
        width, out = int(self.lengths.max()), None
        pattern = port.signal == "attn.pattern"
        for shard, prompts in enumerate(self._prompts):
            stored = self._shards.read(shard, name)
            for prompt, piece in zip(prompts, pieces(stored, name, self.lengths[prompts].tolist()), strict=True):
                if out is None:
                    rows = width if port.query is None else len(port.query)
                    shape = (len(self.lengths), rows, *(piece.shape[1:-1] if pattern else piece.shape[1:]))
                    fill = 0 if name == IDS else float("nan") if piece.is_floating_point() else -1
                    out = piece.new_full((*shape, width) if pattern else shape, fill)
                n = len(piece)
                if pattern:
                    out[prompt, :n] = 0.0  # nobody attends to padding
                    out[prompt, :n, ..., : piece.shape[-1]] = piece
                else:
                    out[prompt, :n] = piece
        assert out is not None  # a trace has a prompt
        if name == IDS:
            return out
        at = port.axes.index("query") if pattern else port.tapped_axis
        return out.movedim(1, at).contiguous()


@by_kind
def load_trace(folder: str | Path) -> KeptTrace:
    """The trace that `pb.run(..., folder=...)` wrote. Nothing is read but its index: signals are, when they are asked for.

    Raises PatchbayError where the folder holds none, where the run was not finished, and where what was written has changed.
    """
    path = Path(folder).expanduser()
    found = record_of(path, RECORD, "a trace")
    if found is None:
        raise PatchbayError(f"{path} holds no trace: pb.run(model, prompts, taps=..., folder=...) writes one")
    record = checked(found, path)
    if record["shards"] is None:
        raise PatchbayError(
            f"{path} holds a run that was not finished: make the same call of pb.run, which goes on from there"
        )
    return KeptTrace(path, record)

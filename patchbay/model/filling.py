"""Traces in folders, written batch by batch while a run goes on: what is finished stays, and the same call goes on from there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from patchbay.edits.edit import Edit, pack, save_edits
from patchbay.files import PARTIAL, record_of, write_file
from patchbay.model.kept import EDITS, FORMAT, RECORD, checked, short
from patchbay.model.model import Model
from patchbay.model.shards import ALL, IDS, LAST, Shards, digest, filled, packed
from patchbay.model.trace import Trace
from patchbay.signal.port import PatchbayError, Port


def request(
    model: Model, ids: Tensor, lengths: Tensor, taps: Sequence[Port], edits: Sequence[Edit], **options: Any
) -> dict[str, Any]:
    """What makes two runs the same, bit for bit, by the name of what may differ."""
    return {
        "model": model.fingerprint,
        "prompts": digest(torch.cat([lengths, ids.cpu().flatten()])),
        "taps": [str(port) for port in taps],
        "edits": edits_digest(model.active_edits(edits)),
        **options,
        "attention": str(getattr(model.hf.config, "_attn_implementation", "")),
        "device": model.device.type,
        "versions": [str(torch.__version__), transformers.__version__],
    }


def edits_digest(edits: Sequence[Edit]) -> str:
    """BLAKE3 of edits with their values."""
    rows, tensors = pack(edits)
    return short(json.dumps([rows, {name: [str(t.dtype), digest(t)] for name, t in sorted(tensors.items())}]))


class Folder:
    """A folder that belongs to one request: what is finished of it stays, what is missing is made."""

    def __init__(self, folder: str | Path, asked: Mapping[str, Any]) -> None:
        self.folder, self.asked = Path(folder).expanduser(), json.loads(json.dumps(asked))
        found = record_of(self.folder, RECORD, "a trace")
        if found is not None:
            self._refuse_another(checked(found, self.folder)["request"])
        self._begun = found is not None
        self.shards = Shards(self.folder, short(json.dumps(self.asked)))

    def _refuse_another(self, found: Mapping[str, Any]) -> None:
        differ = sorted(name for name in self.asked.keys() | found if self.asked.get(name) != found.get(name))
        if differ:
            raise PatchbayError(
                f"{self.folder} holds the trace of another run, with other {', '.join(differ)}: choose another folder"
            )

    def fill(
        self,
        run: Callable[[Sequence[int]], Trace],
        batches: Sequence[Sequence[int]],
        lengths: Sequence[int],
        edits: Sequence[Edit],
        touched: Sequence[Sequence[Sequence[int]]],
    ) -> None:
        """Make the shards that are missing. `run(prompts)` is the trace of a batch; `touched` holds for each edit and prompt where
        positions that it touched begin and end, begin and end."""
        record: dict[str, Any] = {"request": self.asked, "lengths": list(lengths), "touched": touched, "shards": None}
        at, ends = 0, [0]  # where shards begin and end, in batches
        while at < len(batches):
            n = self.shards.batches(len(ends) - 1, at)
            if n == 0:
                rest = batches[at:]
                parts = (_parts(run(some), self.asked["logits"]) for some in rest)
                tensors, n = filled(parts, [[lengths[i] for i in some] for some in rest])
                if not self._begun:
                    self._write(record)
                    self._begun = True
                self.shards.write(len(ends) - 1, tensors, at, n)
                del tensors
            at += n
            ends.append(at)
        if edits:
            save_edits(edits, self.folder / EDITS)
        held = [[i for some in batches[a:b] for i in some] for a, b in pairwise(ends)]
        rows = accumulate((sum(lengths[i] for i in prompts) for prompts in held), initial=0)
        record["shards"] = [
            {"file": self.shards.path(i).name, "row": row, "prompts": prompts}
            for i, (row, prompts) in enumerate(zip(rows, held, strict=False))
        ]
        self._write(record)
        self._tidy(len(held))

    def _write(self, record: dict[str, Any]) -> None:
        marked = FORMAT | {"blake3": short(json.dumps(record))} | record
        write_file(self.folder / RECORD, json.dumps(marked).encode())

    def _tidy(self, n: int) -> None:
        """Nothing stays of a write that was killed, or of shards of another size."""
        own = {self.shards.path(i).name for i in range(n)}
        for path in self.folder.iterdir():
            if path.name.endswith(PARTIAL) or (path.match("shard-*.safetensors") and path.name not in own):
                path.unlink(missing_ok=True)


def _parts(trace: Trace, logits: str) -> dict[str, Tensor]:
    """What is kept of a batch, by its name in a shard."""
    parts = {IDS: packed(trace.ids[..., None], Port("embed"), trace.lengths)[:, 0]}
    parts |= {str(port): packed(trace[port], port, trace.lengths) for port in trace.ports}
    if logits == "all":
        parts[ALL] = packed(trace.logits, Port("logits"), trace.lengths)
    elif logits == "last":
        parts[LAST] = trace.last_logits.cpu()
    return parts

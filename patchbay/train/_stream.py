"""Activations as a stream of shuffled batches of tokens, of which a bounded number is in memory. Where it stands is (seed, step).

Prompts go by in another order each epoch. As many of them as fill the buffer make a block: the model runs on them, their tokens (all but the
first of each) are shuffled and served in batches; fewer than a batch are left over and dropped. From a trace on disk a block is one of its
shards, and shards go by in another order each epoch. Order and blocks follow from the seed and the prompts' lengths alone, so that a stream
goes on from any step without a run of what came before. Of several processes each runs its share of a block, and all have its tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from patchbay.files import record_of
from patchbay.model.filling import edits_digest
from patchbay.model.kept import RECORD, KeptTrace, checked, load_trace
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.signal.port import PatchbayError, Port
from patchbay.train._places import Places
from patchbay.train._together import gathered, share

TOGETHER = 32  # prompts that run as one batch


def shuffled(n: int, *what: object) -> list[int]:
    """A permutation that follows from what is named."""
    number = int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:7], "big")
    return torch.randperm(n, generator=torch.Generator().manual_seed(number)).tolist()


class Source:
    """Prompts and their signals, run as they are asked for: `ids` of all of them, what is read and what is written of some."""

    def __init__(self, models: Sequence[Model], prompts: Sequence[Sequence[int]], places: Places) -> None:
        self.models, self.ids, self.places = list(models), [list(ids) for ids in prompts], places

    def blocks(self, which: Sequence[int], buffer: int, seed: int) -> Iterator[list[int]]:
        """Of the prompts `which`, as many together as have `buffer` tokens to serve; without end."""
        block: list[int] = []
        held = epoch = 0
        while True:
            for i in shuffled(len(which), seed, "epoch", epoch):
                block.append(which[i])
                held += len(self.ids[which[i]]) - 1
                if held >= buffer:
                    yield block
                    block, held = [], 0
            epoch += 1

    def of(self, which: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What is read and what is written at all tokens but the first of each prompt, [token, sites x d] in the order of prompts."""
        mine = share(which)
        reads, writes = zip(*(self._run(model, mine) for model in self.models), strict=True) if mine else ([], [])
        lengths = [len(self.ids[i]) - 1 for i in which]
        return gathered(torch.cat(reads, 1), lengths), gathered(torch.cat(writes, 1), lengths)

    def _run(self, model: Model, which: Sequence[int]) -> tuple[Tensor, Tensor]:
        places, several = self.places, len(self.models) > 1
        trace = run(model, [self.ids[i] for i in which], taps=places.ports, logits="last", batch_size=TOGETHER)
        real = (torch.arange(trace.ids.shape[1])[None] < trace.lengths[:, None].cpu()).to(trace.ids.device)
        real[:, 0] = False

        def held(ports: Sequence[Port]) -> Tensor:
            own = ports[:1] if several else ports
            return torch.cat([trace[port].flatten(2)[real].float() for port in own], 1)

        return held(places.reads), held(places.writes)


class Stored(Source):
    """The same from a trace on disk, of which a block and one shard are in memory."""

    def __init__(self, model: Model, trace: KeptTrace, places: Places) -> None:
        request = checked(record_of(trace.folder, RECORD, "a trace"), trace.folder)["request"]
        for name, own in (("model", model.fingerprint), ("edits", edits_digest(model.active_edits()))):
            if request[name] != own:
                raise PatchbayError(
                    f"{trace.folder} was made with {'another model' if name == 'model' else 'other edits'}: make it again with this one, "
                    "pb.run(model, texts, taps=[...], folder=...)"
                )
        lacking = [str(port) for port in places.ports if port not in trace.ports]
        if lacking:
            raise PatchbayError(
                f"{trace.folder} holds {', '.join(map(str, trace.ports))}, and not {', '.join(lacking)}"
            )
        ids = [row[:n] for row, n in zip(trace.ids.tolist(), trace.lengths.tolist(), strict=True)]
        super().__init__([model], ids, places)
        self.trace = trace
        prompt, position = trace.places()
        first = (position == 0).nonzero()[:, 0]
        self.begins = dict(zip(prompt[first].tolist(), first.tolist(), strict=True))  # of each prompt its first row

    def blocks(self, which: Sequence[int], buffer: int, seed: int) -> Iterator[list[int]]:
        """Of the prompts `which`, those of as many shards together as have `buffer` tokens to serve; without end."""
        among, block = set(which), list[int]()
        shards = [[i for i in shard if i in among] for shard in self.trace.prompts_of_shards]
        held = epoch = 0
        while True:
            for at in shuffled(len(shards), seed, "epoch", epoch):
                block += shards[at]
                held += sum(len(self.ids[i]) - 1 for i in shards[at])
                if held >= buffer:
                    yield block
                    block, held = [], 0
            epoch += 1

    def of(self, which: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self._held(self.places.reads, which), self._held(self.places.writes, which)

    def _held(self, ports: Sequence[Port], which: Sequence[int]) -> Tensor:
        """Signals of prompts, shard by shard."""
        found: dict[int, Tensor] = {}
        for shard in self.trace.prompts_of_shards:
            mine = sorted(set(shard) & set(which), key=self.begins.__getitem__)
            if mine:
                low, high = self.begins[mine[0]], self.begins[mine[-1]] + len(self.ids[mine[-1]])
                rows = torch.cat([self.trace.rows(port, low, high).flatten(1).float() for port in ports], 1)
                for i in mine:
                    at = self.begins[i] - low
                    found[i] = rows[at + 1 : at + len(self.ids[i])].clone()
        return torch.cat([found[i] for i in which])


def source_of(models: Sequence[Model], prompts: object, places: Places) -> Source:
    """Texts, or the folder of a trace that holds the signals."""
    if isinstance(prompts, KeptTrace) or (isinstance(prompts, str | Path) and (Path(prompts) / RECORD).is_file()):
        if len(models) > 1:
            raise PatchbayError("a trace on disk is of one model; of two, give the texts")
        return Stored(models[0], prompts if isinstance(prompts, KeptTrace) else load_trace(prompts), places)
    return Source(models, [ids for ids in models[0].encode(prompts) if len(ids) > 1], places)


def batches(
    source: Source, which: Sequence[int], size: int, buffer: int, seed: int, skip: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """What is read and what is written, each [token, sites x d], batch by batch, from step `skip` on."""
    for number, block in enumerate(source.blocks(which, buffer, seed)):
        n = sum(len(source.ids[i]) - 1 for i in block)
        if skip >= n // size:
            skip -= n // size
            continue
        read, written = source.of(block)
        order = torch.tensor(shuffled(n, seed, "block", number), device=read.device)
        for at in range(skip, n // size):
            some = order[at * size : (at + 1) * size]
            yield read[some], written[some]
        skip = 0

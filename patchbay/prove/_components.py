"""Components: runs in which a head writes something else, everywhere or as one reader alone hears it.

What a head writes is a sum of components, z W_O = sum_i c_i v_i with c_i = z . read_i; write_i is the z that writes v_i and
no other. A Change says what becomes of z: z keep + put. Without some components, with some alone, or with one of them held at
a coordinate it is such a map, so that hundreds of them run as rows of shared batches.

As one reader hears it: everything between the writer and the reader keeps what it wrote (other heads, mixers and MLPs), so
that the reader's query, key, value or input changes by the stream alone; in a second run that one signal is put in. Where
query heads share keys and values, the reader alone gets the changed ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchbay.edits import edit
from patchbay.edits.edit import Edit
from patchbay.model.model import Model
from patchbay.model.run import Trace, run
from patchbay.prove._cells import at_end, batches
from patchbay.signal.port import Part, Port
from patchbay.tasks.task import Task
from patchbay.wiring.components import components

LEAST = 1e-5  # of the largest singular value: a component below is rounding


@dataclass(frozen=True)
class Change:
    """What becomes of a head's z: z @ keep + put."""

    keep: Tensor  # [d_head, d_head]
    put: Tensor  # [d_head]


@dataclass(frozen=True)
class Writer:
    """A head and its components: `read` and `write` [component, d_head], biorthogonal."""

    part: Part
    read: Tensor
    write: Tensor

    @classmethod
    def of(cls, model: Model, part: Part) -> Writer:
        """Its components but those of a head of lower rank that it cannot write (the smallest come last)."""
        found = components(model, part)
        n = max(1, int((found.s > LEAST * found.s[0]).sum()))
        return cls(part, found.read_z[:n].detach().float().cpu(), found.write_z[:n].detach().float().cpu())

    @property
    def n(self) -> int:
        return len(self.read)

    @property
    def port(self) -> Port:
        return self.part.port("z")

    def as_it_is(self) -> Change:
        return Change(torch.eye(self.read.shape[1], dtype=self.read.dtype), self.read.new_zeros(self.read.shape[1]))

    def without(self, which: Sequence[int], at: Tensor | None = None) -> Change:
        """Without these components; with `at` [component], these held at those coordinates."""
        rows = list(which)
        whole = self.as_it_is()
        put = whole.put if at is None else at[rows].to(self.write) @ self.write[rows]
        return Change(whole.keep - self.read[rows].T @ self.write[rows], put)

    def only(self, which: Sequence[int], at: Tensor | None = None) -> Change:
        """These components alone; with `at`, the others held at those coordinates, and what is in none of them gone."""
        rows = list(which)
        rest = [i for i in range(self.n) if i not in set(rows)]
        put = self.as_it_is().put if at is None else at[rest].to(self.write) @ self.write[rest]
        return Change(self.read[rows].T @ self.write[rows], put)

    def coordinates(self, z: Tensor) -> Tensor:
        """c [..., component] of z [..., d_head]."""
        return z.to(self.read) @ self.read.T


@dataclass(frozen=True)
class Reader:
    """Where a reader hears: its signal (keys and values: those of the head's group), and the head, where it is one."""

    port: Port
    head: Part | None = None


@dataclass
class Answers:
    """Scores in the task's metric and shares of right answers, [change, prompt]."""

    score: Tensor
    right: Tensor


def natural(model: Model, task: Task, writer: Writer, size: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each coordinate over all positions of all prompts, [component]."""
    total = square = torch.zeros(writer.n, dtype=torch.float64)
    for prompts in batches(task, size):
        z = run(model, [list(task.clean[i]) for i in prompts], taps=[writer.port], logits="last")[writer.port]
        seen = writer.coordinates(z.cpu()).double().flatten(0, 1)  # [token, component]
        total, square = total + seen.sum(0), square + seen.square().sum(0)
    count = sum(map(len, task.clean))
    mean = total / count
    return mean, (square / count - mean.square()).clamp_min(0.0).sqrt()


def answers(
    model: Model, task: Task, writer: Writer, changes: Sequence[Change], size: int, reader: Reader | None = None
) -> Answers:
    """The task's answers under each change; with `reader` (a head's q, k or v, an MLP's input, or the logits), as that one
    alone hears it."""
    task.check(model.vocab_size)
    found = Answers(*torch.zeros(2, len(changes), len(task), dtype=torch.float64))
    for prompts in batches(task, max(1, size // 8)):
        some = task[prompts]
        ids = [list(row) for row in some.clean]
        base = run(model, ids, taps=_taps(model, writer, reader), logits="last")
        step = max(1, size // len(prompts))
        for start in range(0, len(changes), step):
            which = list(range(start, min(start + step, len(changes))))
            made = [changes[i] for i in which]
            said = _logits(model, writer, base, ids, made, reader, task.reads)  # [change, prompt, ...]
            for i, logits in zip(which, said, strict=True):
                reference = base.last_logits if task.metric == "kl" else None
                found.score[i, prompts] = some.score(logits, reference).double().cpu()
                found.right[i, prompts] = some.with_metric("accuracy").score(at_end(logits)).double().cpu()
    return found


def _taps(model: Model, writer: Writer, reader: Reader | None) -> list[Port]:
    """The writer's z; with a reader, also what must stay as it was between the two."""
    if reader is None:
        return [writer.port]
    return [Port("attn.z", writer.part.layer), *_between(model, writer.part, reader.port)]


def _between(model: Model, part: Part, reader: Port) -> list[Port]:
    """Whole signals that parts after the writer add to the stream before the reader reads it."""
    first = part.layer or 0
    last = model.n_layers - 1 if reader.layer is None else reader.layer
    ports = []
    for layer in range(first, last + 1):
        offered, at_reader = model.signals(layer), layer == reader.layer
        if layer > first and (not at_reader or reader.signal == "mlp.in"):
            ports.append(Port("attn.z" if "attn.z" in offered else "attn.out", layer))
        if not at_reader and "mlp.out" in offered:
            ports.append(Port("mlp.out", layer))
    return ports


def _logits(
    model: Model,
    writer: Writer,
    base: Trace,
    ids: list[list[int]],
    changes: Sequence[Change],
    reader: Reader | None,
    reads: str,
) -> Tensor:
    """The logits that the metric reads: the last [change, prompt, vocab], or all [change, prompt, position, vocab]."""
    n, rows = len(ids), len(changes) * len(ids)
    own = base[writer.port]  # [prompt, position, d_head]
    keep = torch.stack([change.keep for change in changes]).to(own)  # [change, d_head, d_head]
    put = torch.stack([change.put for change in changes]).to(own)[:, None, None]
    z = (torch.einsum("ptd,cde->cpte", own, keep) + put).flatten(0, 1)  # [row, position, d_head]
    every = ids * len(changes)
    if reader is None:
        trace = run(model, every, edits=[edit.replace(writer.port, z)], logits=reads)
        return trace.read(reads).unflatten(0, (len(changes), n))
    place = torch.arange(rows) % n
    layer = base[Port("attn.z", writer.part.layer)][place].clone()
    layer[:, :, writer.part.index or 0] = z
    edits = [edit.replace(Port("attn.z", writer.part.layer), layer)]
    edits += [edit.replace(port, base[port][place]) for port in _between(model, writer.part, reader.port)]
    return _heard(model, every, edits, reader, reads).unflatten(0, (len(changes), n))


def _heard(model: Model, ids: list[list[int]], edits: list[Edit], reader: Reader, reads: str) -> Tensor:
    """The logits that are read when the reader alone hears what `edits` do to the stream."""
    port = reader.port
    if port.signal == "logits":
        return run(model, ids, edits=edits, logits=reads).read(reads)
    heard = edit.replace(port, run(model, ids, taps=[port], edits=edits, logits="last")[port])
    layer = port.layer or 0
    if port.signal in ("attn.k", "attn.v") and reader.head and model.n_groups(layer) < model.n_heads(layer):
        own = reader.head.port("z")  # other heads share these keys and values: the reader alone gets the changed ones
        heard = edit.replace(own, run(model, ids, taps=[own], edits=[heard], logits="last")[own])
    return run(model, ids, edits=[heard], logits=reads).read(reads)

"""The graph of a model: who writes into the stream, who reads it, and runs in which every reader has a stream of its own.

Writers are the embedding, every head (a whole mixer in layers without heads) and every MLP. Readers are every head's
q, every key/value group's k and v, whatever else attention reads (a gate, or all that a mixer reads: its port is
`attn.out`), every MLP and the logits. An edge goes from a writer to each later reader; in parallel blocks attention
and MLP of one layer do not see each other.

`Mixed` runs the model with the edges in `keep` as they are and all others replaced: a reader's stream is the sum of
what the writers that it keeps put out in this very run, and of what the others put out in the run given for them.
Where a family norms what attention adds, a layer's heads are mixed before that norm. Every value is computed by the
model's own layer on such streams: q, k, v read off it and put back for the layer's z, then the MLP from its own
stream. Exact; costs a call of the layer for each distinct stream of its heads, and two more.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from patchbay.edits import edit
from patchbay.jacks.session import Session
from patchbay.model.linear import bias_of
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.signal.port import Part, PatchbayError, Port
from patchbay.signal.positions import Batch

QKV = ("attn.q", "attn.k", "attn.v")
Call: TypeAlias = "tuple[tuple[Any, ...], dict[str, Any]]"  # with what a module was called
ROOM = 2**27  # numbers held at a time by a batch of circuits


class Group(NamedTuple):
    """Writers that stand together: the embedding, a layer's heads, or an MLP; `sent` is when, in layers."""

    layer: int
    writers: slice
    sent: float


class Graph:
    """Writers, readers and which of their pairs are edges: `valid` [writer, reader]."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.writers: list[Part] = []
        self.readers: list[Port] = []
        self.groups: list[Group] = []
        self.read: list[float] = []
        self._writes([Part(None, "embed")], -1, -1.0)
        for layer in range(model.n_layers):
            signals = model.signals(layer)
            heads = range(model.n_heads(layer)) if "attn.z" in signals else ()
            for port in self._attention(layer):
                self._reads(port, layer)
            self._writes([Part(layer, "head", i) for i in heads] or [Part(layer, "attn")], layer, layer + 0.25)
            if "mlp.out" in signals:
                self._reads(Port("mlp.in", layer), layer + (0.5 if "resid_mid" in signals else 0.0))
                self._writes([Part(layer, "mlp")], layer, layer + 0.75)
        self._reads(Port("logits"), float(model.n_layers))
        sent = [group.sent for group in self.groups for _ in range(group.writers.stop - group.writers.start)]
        self.valid = torch.tensor(sent)[:, None] < torch.tensor(self.read)[None, :]
        self.edges: list[tuple[int, int]] = [(w, r) for w, r in self.valid.nonzero().tolist()]

    def _attention(self, layer: int) -> list[Port]:
        model = self.model
        if "attn.z" not in model.signals(layer):
            return [Port("attn.out", layer)]
        counts = (model.n_heads(layer), model.n_groups(layer), model.n_groups(layer))
        ports = [Port(signal, layer, i) for signal, n in zip(QKV, counts, strict=True) for i in range(n)]
        return [*ports, *([Port("attn.out", layer)] if model.family.qkv == "gated" else [])]

    def _writes(self, parts: list[Part], layer: int, sent: float) -> None:
        self.groups.append(Group(layer, slice(len(self.writers), len(self.writers) + len(parts)), sent))
        self.writers += parts

    def _reads(self, port: Port, when: float) -> None:
        self.readers.append(port)
        self.read.append(when)

    def of(self, layer: int, *signals: str) -> list[int]:
        """Places of a layer's readers of these signals."""
        return [i for i, port in enumerate(self.readers) if port.layer == layer and port.signal in signals]

    def label(self, edge: tuple[int, int]) -> str:
        return f"{self.writers[edge[0]]} -> {self.readers[edge[1]]}"

    def norm_after(self, layer: int) -> nn.Module | None:
        """The norm that a family puts on what a layer's heads add, if it has one."""
        at = self.model.modules[layer]
        plain = at.attn is None or at.attn_added is at.attn or at.attn_added is at.attn_proj
        return None if plain else at.attn_added

    def added(self, layer: int, total: Tensor) -> Tensor:
        """What attention adds to the stream when its heads (and the projection's bias) sum to `total`."""
        norm = self.norm_after(layer)
        if self.model.modules[layer].attn is None:
            return total
        return (total if norm is None else norm(total)) * self.model.residual_scale


@dataclass
class Outputs:
    """What each group of writers puts out: [prompt, position, writer, d_model]; heads before the norm after them."""

    values: list[Tensor]  # one of each group
    bias: list[Tensor | float]  # what the projection adds to the heads' sum

    def total(self, group: int) -> Tensor:
        return self.values[group].sum(2) + self.bias[group]


def signals_of(graph: Graph) -> list[Port]:
    """The signal from which each group's output is read."""
    out = []
    for group in graph.groups:
        part = graph.writers[group.writers.start]
        signal = {"embed": "embed", "head": "attn.z", "attn": "attn.out", "mlp": "mlp.out"}[part.kind]
        out.append(Port(signal, None if part.kind == "embed" else group.layer))
    return out


def head_outputs(model: Model, layer: int, z: Tensor) -> Tensor:
    """z [..., head, d_head] -> what each head writes [..., head, d_model]."""
    return torch.einsum("...hd,hdm->...hm", z, model.W_O(layer))


@torch.no_grad()
def outputs(graph: Graph, prompts: Sequence[Sequence[int]]) -> Outputs:
    """What the writers put out on prompts of one length."""
    model, ports = graph.model, signals_of(graph)
    trace = run(model, [list(ids) for ids in prompts], taps=ports, logits="last")
    values, bias = [], []
    for group, port in zip(graph.groups, ports, strict=True):
        heads = port.signal == "attn.z"
        values.append(head_outputs(model, group.layer, trace[port]) if heads else trace[port][:, :, None])
        found = bias_of(model.modules[group.layer].attn_proj) if heads else None
        bias.append(0.0 if found is None else found.detach())
    return Outputs(values, bias)


def mean_outputs(found: Sequence[Outputs]) -> Outputs:
    """The mean over the prompts and positions of several batches: [1, 1, writer, d_model]."""
    count = sum(one.values[0].shape[0] * one.values[0].shape[1] for one in found)
    sums = [sum(one.values[i].double().sum((0, 1), keepdim=True) for one in found) for i in range(len(found[0].values))]
    like = found[0].values
    return Outputs([(torch.as_tensor(x) / count).to(y) for x, y in zip(sums, like, strict=True)], found[0].bias)


class Mixed:
    """Runs of prompts of one length in which edges outside a circuit carry what `other` holds."""

    def __init__(self, graph: Graph, prompts: Sequence[Sequence[int]], other: Outputs, rows: int = 64) -> None:
        if graph.model._session is not None:
            raise PatchbayError("runs edge by edge inside model.edited(...) are not offered: leave the block first")
        self.graph, self.model, self.other = graph, graph.model, other
        self.ids = torch.tensor([list(ids) for ids in prompts], device=self.model.device)
        self.embed = outputs(graph, prompts).values[0]  # [prompt, position, 1, d_model]
        self.most = max(1, rows // len(prompts))
        self._calls: dict[int, list[Call]] = {}

    def size(self) -> int:
        """How many circuits fit in memory together."""
        graph = self.graph
        widest = max(len(graph.of(layer, *QKV, "attn.out")) for layer in range(self.model.n_layers))
        return max(1, ROOM // ((len(graph.writers) + 3 * widest) * self.ids.numel() * self.model.d_model))

    @torch.no_grad()
    def logits(self, keep: Tensor) -> Tensor:
        """Last logits [circuit, prompt, vocab] with the edges of `keep` [circuit, writer, reader] as they are."""
        keep = (keep & self.graph.valid).to(self.model.device)
        return torch.cat([self._some(some) for some in keep.split(self.size())])

    def _some(self, keep: Tensor) -> Tensor:
        graph = self.graph
        change = [
            (self.embed - self.other.values[0]).expand(len(keep), -1, -1, -1, -1)
        ]  # [circuit, prompt, position, writer, d]
        for layer in range(self.model.n_layers):
            change.append(self._attention(layer, keep, change) - self.other.values[len(change)])
            if readers := graph.of(layer, "mlp.in"):
                x = self._streams(keep, readers, change)[:, 0]
                port, middle = Port("mlp.out", layer), Port("resid_mid", layer)
                put = {middle: x} if middle.signal in self.model.signals(layer) else {}
                out = self._call(layer, x, [port], put)[port]
                change.append(out[..., None, :] - self.other.values[len(change)])
        final = self._streams(keep, [len(graph.readers) - 1], change)[:, 0, :, -1]  # [circuit, prompt, d_model]
        return self.model.unembed_logits(self.model.final_norm_module(final))

    def _streams(self, keep: Tensor, readers: list[int], change: list[Tensor]) -> Tensor:
        """What these readers, of one time, see: [circuit, reader, prompt, position, d_model]."""
        graph, when = self.graph, self.graph.read[readers[0]]
        mix = keep[:, :, readers].to(self.embed.dtype)  # [circuit, writer, reader]
        total: Tensor | None = None
        for i, group in enumerate(graph.groups[: len(change)]):
            if not group.sent < when:
                continue
            seen = torch.einsum("cwr,cptwd->crptd", mix[:, group.writers], change[i]) + self.other.total(i)
            heads = graph.writers[group.writers.start].kind == "head"
            seen = graph.added(group.layer, seen) if heads else seen
            total = seen if total is None else total + seen
        assert total is not None
        return total

    def _attention(self, layer: int, keep: Tensor, change: list[Tensor]) -> Tensor:
        """What the layer's heads (or mixer) put out: [circuit, prompt, position, writer, d_model]."""
        readers = self.graph.of(layer, *QKV, "attn.out")
        streams = self._streams(keep, readers, change)
        kept = keep[:, :, readers].transpose(1, 2)  # [circuit, reader, writer]
        named = torch.cat(
            [torch.arange(len(keep), device=keep.device)[:, None, None].expand(-1, len(readers), 1), kept.long()], 2
        )
        _, place = torch.unique(
            named.flatten(0, 1), dim=0, return_inverse=True
        )  # readers of one circuit that keep the same
        first = torch.full((int(place.max()) + 1,), len(place), device=place.device)
        first = first.scatter_reduce(0, place, torch.arange(len(place), device=place.device), "amin")
        x, place = streams.flatten(0, 1)[first], place.view(len(keep), len(readers))
        ports = [self.graph.readers[reader] for reader in readers]
        if "attn.z" not in self.model.signals(layer):
            port = Port("attn.out", layer)
            return self._call(layer, x, [port], {})[port][place[:, 0]][..., None, :]
        wholes = [Port(signal, layer) for signal in QKV]
        read = self._call(layer, x, wholes, {})  # [stream, prompt, head, position, d_head]
        put = {}
        for whole in wholes:
            at = [i for i, port in enumerate(ports) if port.signal == whole.signal]
            own = read[whole].transpose(1, 2)[place[:, at], torch.arange(len(at), device=place.device)]
            put[whole] = own.movedim(1, 3)  # [circuit, prompt, position, head, d_head]
        port = Port("attn.z", layer)
        z = self._call(layer, streams[:, -1], [port], put)[port]  # the last reader: attn.out where there is a gate
        return head_outputs(self.model, layer, z)

    def _call(self, layer: int, x: Tensor, taps: list[Port], put: dict[Port, Tensor]) -> dict[Port, Tensor]:
        """The layer on streams x [item, prompt, position, d_model], with signals put in (by item): taps [item, prompt, ...]."""
        out: dict[Port, list[Tensor]] = {port: [] for port in taps}
        start = 0
        while start < len(x):
            n = min(self.most, 1 << (len(x) - start - 1).bit_length())
            items = torch.arange(start, start + n, device=x.device).clamp(max=len(x) - 1)
            edits = [edit.replace(port, value[items].flatten(0, 1)) for port, value in put.items()]
            args, kwargs = self._recorded(n)[layer]
            ids = self.ids.repeat(n, 1)
            lengths = torch.full((len(ids),), ids.shape[1])
            with Session(self.model, taps, edits) as session:
                session.place(Batch(ids, lengths, lengths, self.model), 0, ids.shape[1])
                rows = x[items].flatten(0, 1)
                given = (rows, *args[1:]) if args else ()
                self.model.modules[layer].layer(*given, **(kwargs if args else kwargs | {"hidden_states": rows}))
            for port in taps:
                out[port].append(session.captured[port].unflatten(0, (n, -1))[: len(x) - start])
            start += n
        return {port: torch.cat(pieces) for port, pieces in out.items()}

    def _recorded(self, n: int) -> list[Call]:
        """What each layer is called with on n copies of the prompts."""
        if n not in self._calls:
            calls: dict[int, Call] = {}
            with Session(self.model, [Port("attn.out", i) for i in range(self.model.n_layers)]) as session:
                for i, at in enumerate(self.model.modules):
                    session.on_call(at.layer, functools.partial(_note, calls, i))
                self.model.hf(input_ids=self.ids.repeat(n, 1), use_cache=False)
            self._calls[n] = [calls[i] for i in range(self.model.n_layers)]
        return self._calls[n]


def _note(calls: dict[int, Call], layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    calls[layer] = (args, kwargs)

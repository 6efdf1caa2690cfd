"""Composition scores of every writer with every later reader, by low-rank algebra.

X = |P F|_F^2 for a writer's factor P [rank, d_model] and a reader's F [d_model, width] has two cheap ways:

- **whole writers**: X = <P^T P, F F^T>, an inner product of two symmetric matrices. Blocks of d_model x d_model on and above the
  diagonal are formed for all writers and all readers at once, so that one matrix product of [writer, block] and [block,
  reader] serves every pair: d^2 operations a pair instead of 2 d rank width, and no product of two big matrices.
- **unit rows** (components, biases, neurons): |v F|^2 for all rows at once, one product in tiles. A head's components give
  the whole head by X = sum s_i^2 X_i.

Time and memory: for GPT-2 small's 144 heads and 432 later inputs about 60 GFLOP for whole heads and 200 for all components;
the largest array is that of the readers' factors, 85 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from patchbay.model.model import Model
from patchbay.model.rotary import Turn, turns
from patchbay.signal.channel import READS, WRITES, Channel
from patchbay.signal.port import Part, PatchbayError, as_part
from patchbay.wiring.components import components_of_layer, folded_heads, has_heads
from patchbay.wiring.wiring import Factors, Readers, Writers, bias_writers, readers, writers

DEFAULT_OFFSETS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
BLOCK = 128  # rows and columns of the blocks of symmetric matrices
TILE = 2**23  # numbers in a tile of row products: 32 MiB


@dataclass
class Net:
    """Writers and readers of one model, sorted by time, flattened to one list of each."""

    model: Model
    offsets: tuple[int, ...]  # none where no layer turns queries and keys
    writers: list[Writers]
    readers: list[Readers]
    bases: dict[int, tuple[Tensor, Tensor]] = field(
        default_factory=dict
    )  # layer -> s [head, component], v [..., d_model]

    @property
    def sources(self) -> list[Channel]:
        return [name for group in self.writers for name in group.names]

    @property
    def targets(self) -> list[tuple[Part, str]]:
        return [name for group in self.readers for name in group.names]

    def later(self) -> Tensor:
        """Which readers come after which writers, [writer, reader]."""
        written = torch.tensor([group.time for group in self.writers for _ in group.names])
        read = torch.tensor([group.time for group in self.readers for _ in group.names])
        return written[:, None] < read


def reader_text(part: Part, kind: str) -> str:
    """`L2.H0.q`, `L2.mlp`, `unembed`."""
    return f"{part}.{READS[kind]}" if READS[kind] else str(part)


def gather(
    model: Model,
    *,
    writing: Sequence[str] | None = None,
    reading: Sequence[str] | None = None,
    kinds: Sequence[str] | None = None,
    components: bool = False,
    offsets: Sequence[int] | None = None,
    by_offset: bool = False,
) -> Net:
    """Read the factors off the weights. `writing`: kinds or parts; `reading`: parts or layers; `kinds`: what readers read."""
    kinds = list(READS) if kinds is None else _known(kinds, READS, "kinds")
    write_kinds, write_parts = _writing(model, writing)
    read_parts = None if reading is None else {model.part(str(as_part(part))) for part in reading}
    folded = {layer: folded_heads(model, layer) for layer in range(model.n_layers) if has_heads(model, layer)}
    turned, offsets = _turned(model, folded, kinds, offsets)
    write, read, bases = [], [], {}
    for layer in [None, *range(model.n_layers)]:
        own = folded.get(-1 if layer is None else layer)
        for kind in write_kinds:
            if kind == "bias":
                found = [] if layer is None else bias_writers(model, layer)
            else:
                one = writers(model, kind, layer, own)
                found = [] if one is None else [one]
            write += [kept for group in found if (kept := _chosen_writers(group, write_parts)) is not None]
        if components and own is not None and any(g.kind == "head" and g.time == 2 * (layer or 0) for g in write):
            bases[layer or 0] = components_of_layer(own)
        turn = None if layer is None else turned.get(layer)
        for kind in kinds:
            group = readers(model, layer, kind, turn=turn, heads=own, by_offset=by_offset)
            if group is not None and (kept_group := _chosen_readers(group, read_parts)) is not None:
                read.append(kept_group)
    net = Net(model, offsets, sorted(write, key=lambda g: g.time), sorted(read, key=lambda g: g.time), bases)
    _refuse_without_pairs(net, writing, reading, kinds)
    return net


def _known(asked: Sequence[str], known: Any, what: str) -> list[str]:
    asked = [asked] if isinstance(asked, str) else list(asked)
    wrong = next((kind for kind in asked if kind not in known), None)
    if wrong is not None or not asked:
        raise PatchbayError(f"{what}={asked}: possible are {', '.join(known)}")
    return asked


def _writing(model: Model, writing: Sequence[str] | None) -> tuple[list[str], set[Part] | None]:
    """Kinds of writers, and the parts among them that are wanted (None: all)."""
    if writing is None:
        return [kind for kind in WRITES if kind != "neuron"], None
    writing = [writing] if isinstance(writing, str) else list(writing)
    if not writing:
        raise PatchbayError(f"writers=[]: possible are {', '.join(WRITES)}, and parts such as L0.H1, L0")
    kinds = [str(one) for one in writing if str(one) in WRITES]
    parts = {model.part(str(as_part(one))) for one in writing if str(one) not in WRITES}
    if not parts:
        return kinds, None
    of_part = {"head": "head", "mlp": "mlp", "neuron": "neuron", "expert": "expert", "embed": "embed", "attn": "bias"}
    found = {"head", "mlp", "expert"} if any(part.kind == "layer" for part in parts) else set()
    unfit = next((part for part in parts if part.kind not in (*of_part, "layer")), None)
    if unfit is not None:
        raise PatchbayError(
            f"writers: {unfit} does not write; possible are {', '.join(WRITES)} and parts of these kinds"
        )
    found |= {of_part[part.kind] for part in parts if part.kind != "layer"}
    return [kind for kind in WRITES if kind in {*found, *kinds}], parts


def _turned(
    model: Model, folded: dict[int, Any], kinds: list[str], offsets: Sequence[int] | None
) -> tuple[dict[int, Turn], tuple[int, ...]]:
    if not folded or not {"query", "key"} & set(kinds):
        return {}, ()
    longest = model.max_positions or 10**9
    wanted = (
        [offset for offset in DEFAULT_OFFSETS if offset < longest] if offsets is None else [int(x) for x in offsets]
    )
    found = turns(model, wanted, folded)
    return found, tuple(wanted) if any(turn.rotation is not None for turn in found.values()) else ()


def _chosen_writers(group: Writers, parts: set[Part] | None) -> Writers | None:
    if parts is None:
        return group
    kept = [
        i for i, name in enumerate(group.names) if name.writer in parts or Part(name.writer.layer, "layer") in parts
    ]
    if not kept:
        return None
    values = Factors(group.factors.values[kept], group.factors.is_gram)
    return Writers(group.kind, group.time, [group.names[i] for i in kept], values)


def _chosen_readers(group: Readers, parts: set[Part] | None) -> Readers | None:
    if parts is None:
        return group
    kept = [i for i, (part, _) in enumerate(group.names) if part in parts or Part(part.layer, "layer") in parts]
    if not kept:
        return None
    some = [Factors(f.values[kept], f.is_gram) for f in (group.factors, *group.by_offset)]
    return Readers(group.kind, group.time, [group.names[i] for i in kept], some[0], tuple(some[1:]))


def _refuse_without_pairs(net: Net, writing: Any, reading: Any, kinds: list[str]) -> None:
    model = net.model
    if model.n_layers == 1 and writing is None and reading is None:
        raise PatchbayError(
            f"this {model.family.name} model has one layer: no head or MLP comes before another layer's, so there are no pairs; "
            "what its parts read from the embedding or write to the unembedding: writers=['embed'] or readers=['unembed']"
        )
    inside = any(group.kind not in ("embed", "positions") for group in net.writers) or any(
        group.kind != "unembed" for group in net.readers
    )
    if inside and net.writers and net.readers and bool(net.later().any()):
        return
    needs = {"heads": "attn.z", "MLPs": "mlp.act", "experts": "experts.out"}
    offered = {name for layer in range(model.n_layers) for name in model.signals(layer)}
    lacking = ", ".join(f"{part} ({signal})" for part, signal in needs.items() if signal not in offered)
    shown = [", ".join(asked) if asked else "all" for asked in (writing, reading)]
    raise PatchbayError(
        f"no writer comes before a reader: writers {shown[0]}, readers {shown[1]}, read as {', '.join(kinds)}, in a "
        f"{model.family.name} model of {model.n_layers} layers" + (f" without {lacking}" if lacking else "")
    )


# --- scores -------------------------------------------------------------------------------------------


@dataclass
class Scores:
    """X of every writer and reader (score = sqrt), NaN where the reader is not later, and the traces of both sides, [n, 3]."""

    squares: Tensor  # [writer, reader] in float64
    written: Tensor  # [writer, 3]
    read: Tensor  # [reader, 3]
    rows: dict[int, Tensor] = field(default_factory=dict)  # place of a head among the writers -> X of its components
    weights: dict[int, Tensor] = field(default_factory=dict)  # ... -> s_i^2 of its components


@torch.no_grad()
def score(net: Net) -> Scores:
    """Every score of the net; by component too for heads whose components are in `net.bases`."""
    later = net.later()
    device = net.readers[0].factors.values.device
    read = torch.cat([group.factors.traces() for group in net.readers])
    written = torch.cat([group.factors.traces() for group in net.writers])
    squares = torch.zeros(later.shape, dtype=torch.float64, device=device)
    found = Scores(squares, written, read)
    whole, start = [], 0
    for group in net.writers:
        places = range(start, start + len(group.names))
        start = places.stop
        if group.kind == "head" and group.names[0].writer.layer in net.bases:
            _by_component(net, group, places, found)
        elif not group.factors.is_gram and group.factors.values.shape[1] == 1:
            _by_row(net, group, places, found)
        else:
            whole.append((group, places))
    if whole:
        _by_blocks(net, whole, squares)
    squares /= torch.outer(written[:, 0], read[:, 0])
    squares[~later.to(device)] = torch.nan
    return found


def _by_blocks(net: Net, whole: list[tuple[Writers, range]], squares: Tensor) -> None:
    """X of whole writers as inner products of symmetric matrices, block by block. Writers and readers stand in order of
    time: a stretch of readers meets the writers before its last."""
    d, places = net.model.d_model, [place for _, span in whole for place in span]
    ours, theirs = [group.factors for group, _ in whole], [group.factors for group in net.readers]
    total = torch.zeros(len(places), squares.shape[1], dtype=torch.float64, device=squares.device)
    like = theirs[0].values
    room = [
        torch.empty(sum(map(len, side)) * BLOCK * BLOCK, dtype=like.dtype, device=like.device)
        for side in (ours, theirs)
    ]
    stretches = _stretches(net, whole)
    edges = [slice(i, min(i + BLOCK, d)) for i in range(0, d, BLOCK)]
    for i, first in enumerate(edges):
        for second in edges[i:]:
            a, g = (_blocks(side, first, second, out) for side, out in zip((ours, theirs), room, strict=True))
            for n, span in stretches:
                total[:n, span] += (1 if first == second else 2) * (a[:n] @ g[span].mT)
    squares[places] = total


def _stretches(net: Net, whole: list[tuple[Writers, range]]) -> list[tuple[int, slice]]:
    """Stretches of at least 64 readers, each with how many writers come before its last reader."""
    times = torch.tensor([group.time for group, span in whole for _ in span])
    out, start, stop = [], 0, 0
    for i, group in enumerate(net.readers):
        stop += len(group.names)
        ends = i + 1 == len(net.readers)
        if stop > start and (ends or (stop - start >= 64 and net.readers[i + 1].time > group.time)):
            n = int((times < group.time).sum())
            out += [(n, slice(start, stop))] if n else []
            start = stop
    return out


def _blocks(factors: list[Factors], first: slice, second: slice, room: Tensor) -> Tensor:
    """One block of every symmetric matrix, [n, block], written into `room`: fresh memory costs more than the product."""
    size = (first.stop - first.start) * (second.stop - second.start)
    out = room[: sum(map(len, factors)) * size].view(-1, first.stop - first.start, second.stop - second.start)
    start = 0
    for one in factors:
        stop = start + len(one)
        if one.is_gram:
            out[start:stop] = one.values[:, first, second]
        else:
            torch.bmm(one.values[:, :, first].mT, one.values[:, :, second], out=out[start:stop])
        start = stop
    return out.flatten(1)


def _by_row(net: Net, group: Writers, places: range, found: Scores) -> None:
    rows, start = group.factors.values[:, 0], 0
    for reading in net.readers:
        stop = start + len(reading.names)
        if group.time < reading.time:
            found.squares[places.start : places.stop, start:stop] = in_tiles(reading.factors, rows).double()
        start = stop


def _by_component(net: Net, group: Writers, places: range, found: Scores) -> None:
    """X of each component of a layer's heads, and of the heads by sum s_i^2 X_i."""
    s, v = net.bases[group.names[0].writer.layer or 0]
    kept = [name.writer.index or 0 for name in group.names]
    s, v = s[kept].double(), v[kept]  # [head, component], [head, component, d_model]
    each = torch.full((*s.shape, found.squares.shape[1]), torch.nan, dtype=v.dtype, device=v.device)
    start = 0
    for reading in net.readers:
        stop = start + len(reading.names)
        if group.time < reading.time:
            each[..., start:stop] = in_tiles(reading.factors, v.flatten(0, 1)).view(*s.shape, -1)
        start = stop
    weights = s.square()
    for i, place in enumerate(places):
        found.squares[place] = (weights[i, :, None] * each[i].double()).sum(0)
        found.rows[place] = each[i] / found.read[:, 0].to(each.dtype)
        found.weights[place] = weights[i] / weights[i].sum()


def in_tiles(factors: Factors, rows: Tensor) -> Tensor:
    """`factors.squares(rows)` in tiles of bounded size."""
    width = len(factors) * factors.values.shape[1]
    return torch.cat([factors.squares(some) for some in rows.split(max(1, TILE // width))])

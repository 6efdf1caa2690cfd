"""The restarted walk: many edited copies of a run, computed only where they differ from it. Exact.

An edit at layer l and position p changes nothing before layer l nor left of p. So the base prompts run once, keeping the
stream, the keys and values and what each layer was called with. Each edited row then joins the walk at its layer, from the
base stream at its positions p.. , and attends to the base's keys and values left of p. Rows that start at the same position
form one batch, which grows as the walk goes deeper; every layer is visited once.

Where a layer is attention and MLP one after the other (or side by side) between norms, the two halves are called apart: a row
edited after attention joins in the middle, and the last layer's MLP runs at the read position alone. This is believed only
after the halves reproduced the layer's own output on the base run; otherwise whole layers are called. Rows edited inside
attention, routers or experts run that one layer under a `Session`. The final norm runs at the read position, and the
unembedding only for the tokens that the metric reads.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from patchbay.edit import Batch, Edit, apply, chosen, row_mask
from patchbay.jacks import Session, first
from patchbay.model import Model
from patchbay.port import PatchbayError, Port

IN, MID, OUT = 0, 1, 2  # where in its layer a row joins: before it, after attention, after the MLP
STAGE = {"embed": IN, "resid_in": IN, "attn.z": MID, "attn.head_out": MID, "attn.out": MID, "resid_mid": MID}
STAGE |= {"mlp.act": OUT, "mlp.out": OUT, "resid_out": OUT}
LATE = ("final_norm", "logits")  # edited after the last layer
PAST = ("past_key_values", "layer_past", "past_key_value")


@dataclass(frozen=True)
class Cell:
    """One entry of a sweep: edits made together, for the prompts in `rows`; `start` is the first position they touch."""

    index: int
    edits: tuple[Edit, ...]
    start: int
    layer: int
    stage: int
    inside: bool  # needs its layer run under a Session

    @property
    def key(self) -> tuple[int, int, int, bool]:
        return (self.start, self.layer, self.stage, self.inside)


@dataclass
class Rows:
    """Rows of one start position that have joined: their stream x [row, position - start, d_model]."""

    start: int
    x: Tensor
    cell: list[int] = field(default_factory=list)  # index of each row's cell
    prompt: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def join(self, x: Tensor, cells: Sequence[int], prompts: Tensor) -> None:
        self.x = x if not self.cell else torch.cat([self.x, x])
        self.cell += cells
        self.prompt = torch.cat([self.prompt, prompts])


class Waiting(NamedTuple):
    """Rows of a group between attention and MLP: which ones, their stream and what attention adds [row, position, d_model]."""

    group: Rows
    rows: Any
    stream: Tensor
    added: Tensor

    @property
    def n_tokens(self) -> int:
        return self.stream[..., 0].numel()


class Past:
    """Keys and values of the base run left of `start`, for the rows of one call; what layers take for a cache."""

    def __init__(self, base: Base, start: int, prompts: Tensor) -> None:
        self.base, self.start, self.prompts = base, start, prompts
        self.is_compileable = False

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.start == 0:
            return key, value
        old_key, old_value = self.base.keys[layer_idx], self.base.values[layer_idx]  # [prompt, group, position, d]
        return self._before(old_key, key), self._before(old_value, value)

    def _before(self, old: Tensor, new: Tensor) -> Tensor:
        left = old[:, :, : self.start]
        left = left.expand(len(new), -1, -1, -1) if len(old) == 1 else left[self.prompts]
        return torch.cat([left, new], 2)

    def get_seq_length(self, *_: Any) -> int:
        return self.start


@dataclass
class Base:
    """One run of prompts of one length, with all that a restarted row needs."""

    model: Model
    ids: Tensor  # [prompt, position]
    layer_calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    attn_calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    resid: list[Tensor]  # n_layers + 1 streams, [prompt, position, d_model]
    taps: dict[Port, Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    halves: bool = False  # attention and MLP can be called apart
    refusal: str | None = None  # why rows of this model cannot restart; None when they can

    @property
    def n_positions(self) -> int:
        return self.ids.shape[1]


@torch.no_grad()
def base_run(model: Model, ids: Tensor, signals: Sequence[Port]) -> Base:
    """Run the base prompts, keeping streams, calls, keys and values, and the signals that edits start from."""
    lacking = [i for i, at in enumerate(model.modules) if at.attn is None]
    if lacking:
        return Base(
            model, ids, [], [], [], {}, [], [], refusal=f"layers {lacking[:6]} carry a state, not keys and values"
        )
    calls: dict[tuple[str, int], tuple[tuple[Any, ...], dict[str, Any]]] = {}
    ports = [Port("resid_in", i) for i in range(model.n_layers)]
    ports += [Port("resid_out", model.n_layers - 1), *signals]
    ports += [Port("attn.out", i) for i in range(model.n_layers)]
    ports += [Port("resid_mid", i) for i in range(model.n_layers) if "resid_mid" in model.signals(i)]
    cache = DynamicCache()
    with Session(model, list(dict.fromkeys(ports))) as session:
        for i, at in enumerate(model.modules):
            for name, module in (("layer", at.layer), ("attn", at.attn)):
                session.on_call(module, _note(calls, (name, i)))
        model.hf(input_ids=ids, past_key_values=cache, use_cache=True)
    seen = session.captured
    n = model.n_layers
    base = Base(
        model,
        ids,
        [calls["layer", i] for i in range(n)],
        [calls["attn", i] for i in range(n)],
        [seen[Port("resid_in", i)] for i in range(n)] + [seen[Port("resid_out", n - 1)]],
        seen,
        [cache.layers[i].keys for i in range(n)],
        [cache.layers[i].values for i in range(n)],
    )
    base.halves = _reproduces(base, lambda i, start, x, rows: _halves(base, i, start, x, rows)) is None
    if not base.halves:
        base.refusal = _reproduces(base, lambda i, start, x, rows: _whole_layer(base, i, start, x, rows))
    return base


def _note(calls: dict[Any, Any], key: tuple[str, int]) -> Callable[[tuple[Any, ...], dict[str, Any]], None]:
    def note(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[key] = (args, kwargs)

    return note


def _reproduces(base: Base, call: Callable[[int, int, Tensor, Tensor], Tensor]) -> str | None:
    """None when calling each layer so, from the middle of the first prompt on, gives the base run; else what differs."""
    start, rows = base.n_positions // 2, torch.zeros(1, dtype=torch.long)
    for i in range(base.model.n_layers):
        try:
            out = call(i, start, base.resid[i][:1, start:], rows)
        except (TypeError, RuntimeError, AttributeError, ValueError, IndexError, PatchbayError) as error:
            return f"layer {i} cannot be called on some positions: {error}"
        expected = base.resid[i + 1][:1, start:]
        off = float((out - expected).abs().max() / expected.abs().max())
        if not off <= (1e-4 if expected.dtype == torch.float32 else 5e-2):
            return f"layer {i} called on some positions differs from the whole run by {off:.1e}"
    return None


def _halves(base: Base, layer: int, start: int, x: Tensor, prompts: Tensor) -> Tensor:
    return _mlp_half(base, layer, x, _attention_half(base, layer, start, x, prompts))


# ---- calling a layer on rows -----------------------------------------------------------------------------------------


def _for_rows(
    base: Base, module: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]], start: int, x: Tensor, prompts: Tensor
) -> dict[str, Any]:
    """The arguments of a recorded call by name, for rows of the given prompts and positions from `start` on."""
    args, kwargs = call
    names = list(inspect.signature(module.forward).parameters)
    given = dict(zip(names, args, strict=False)) | kwargs
    given.pop(names[0])  # the stream itself
    if "attention_mask" in names:
        given.setdefault("attention_mask", None)
    n, n_prompts = base.n_positions, len(base.ids)

    def narrowed(value: Any, name: str) -> Any:
        if name in PAST:
            return Past(base, start, prompts)
        if name == "attention_mask":
            if value is None or value.ndim != 4:
                place = torch.arange(n, device=x.device)
                value = (place[None, :] <= place[:, None])[None, None]  # causal
                value = value if base.model.hf.config._attn_implementation == "sdpa" else _numbers(value, x)
            return _some(value, prompts, n_prompts)[:, :, start:]
        if name == "alibi" and isinstance(value, Tensor):
            per_prompt = value.unflatten(0, (n_prompts, -1))[:1]
            return per_prompt.expand(len(x), *per_prompt.shape[1:]).flatten(0, 1)
        if isinstance(value, tuple) and value and all(isinstance(v, Tensor) for v in value):
            return tuple(narrowed(v, name) for v in value)
        if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == n:
            return _some(value, prompts, n_prompts)[:, start:]
        if isinstance(value, Tensor) and n in value.shape:
            raise PatchbayError(f"{name} of shape {tuple(value.shape)} cannot be narrowed to some positions")
        return value

    return {name: narrowed(value, name) for name, value in given.items()}


def _numbers(mask: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(~mask, torch.finfo(like.dtype).min)


def _some(value: Tensor, prompts: Tensor, n_prompts: int) -> Tensor:
    return value if value.shape[0] == 1 or n_prompts == 1 else value[prompts.to(value.device)]


def _call(module: nn.Module, base: Base, call: Any, start: int, x: Tensor, prompts: Tensor) -> Tensor:
    return first(module(x, **_for_rows(base, module, call, start, x, prompts)))


def _whole_layer(base: Base, layer: int, start: int, x: Tensor, prompts: Tensor) -> Tensor:
    return _call(base.model.modules[layer].layer, base, base.layer_calls[layer], start, x, prompts)


def _attention_half(base: Base, layer: int, start: int, x: Tensor, prompts: Tensor) -> Tensor:
    """What attention adds to the stream x [row, position, d_model]."""
    at, model = base.model.modules[layer], base.model
    normed = x if at.norm_attn is None else at.norm_attn(x)
    assert at.attn is not None
    out = _call(at.attn, base, base.attn_calls[layer], start, normed, prompts)
    return _added(at.attn_added, (at.attn, at.attn_proj), out, model.residual_scale)


def _added(module: nn.Module | None, inner: tuple[nn.Module | None, ...], out: Tensor, scale: float) -> Tensor:
    """Through the norm after a block, where the family has one, and its residual scale."""
    if module is not None and all(module is not m for m in inner):
        out = module(out)
    return out if scale == 1.0 else out * scale


def _mlp_half(base: Base, layer: int, x: Tensor, added: Tensor) -> Tensor:
    """The stream after the layer, from the stream before it and what attention added."""
    at, model = base.model.modules[layer], base.model
    if at.mlp is None or at.mlp_added is at.mlp_proj:
        raise PatchbayError("this layer's MLP is not one module")
    middle = x + added
    source = x if at.mid is None else middle
    out = first(at.mlp(source if at.norm_mlp is None else at.norm_mlp(source)))
    return middle + _added(at.mlp_added, (at.mlp,), out.reshape(x.shape), model.residual_scale)


# ---- the walk --------------------------------------------------------------------------------------------------------


def plan(model: Model, index: int, edits: Sequence[Edit], batch: Batch, halves: bool) -> Cell:
    """Where a cell starts and joins. Several edits, or one inside a module, run their layers under a Session."""
    start, layer, inside = batch.ids.shape[1] - 1, model.n_layers, len(edits) > 1
    for edit in edits:
        touched = (chosen(edit.positions, batch, what=str(edit)) >= 0) & (row_mask(edit, len(batch.ids)) >= 0)[:, None]
        places = touched.any(0).nonzero()
        if not len(places):
            raise PatchbayError(f"{edit} touches nothing: no prompt has such a position")
        start = min(start, int(places[0]))
        layer = min(layer, _layer_of(edit.port, model.n_layers))
    signal = edits[0].port.signal
    stage = OUT if signal in LATE else STAGE.get(signal, IN)
    inside = inside or (signal not in STAGE and signal not in LATE)
    if not halves and stage != IN and signal not in ("resid_out", *LATE):
        inside = True
    return Cell(index, tuple(edits), start, layer, IN if inside else stage, inside)


def _layer_of(port: Port, n_layers: int) -> int:
    if port.layer is not None:
        return port.layer
    return 0 if port.signal == "embed" else n_layers - 1


def for_one(edit: Edit, row: int, prompt: int, n_prompts: int) -> Edit:
    """The edit as it acts on one row that is a copy of `prompt`; where it leaves that prompt alone, one that changes nothing."""
    value, positions, keys = edit.value, edit.positions, edit.keys
    rows = row_mask(edit, n_prompts)
    if int(rows[prompt]) < 0:
        return Edit("scale", edit.port, 1.0, None, (row,))
    n_features = len(edit.port.axes) - 2
    if isinstance(value, Tensor) and edit.op != "project" and value.ndim == n_features + 2 and len(value) > 1:
        value = value[int(rows[prompt])][None]
    if isinstance(positions, Tensor):
        positions = tuple(positions[prompt if len(positions) > 1 else 0].nonzero()[:, 0].tolist())
    if isinstance(keys, Tensor):
        keys = tuple(keys[prompt if len(keys) > 1 else 0].nonzero()[:, 0].tolist())
    return Edit(edit.op, edit.port, value, positions, (row,), keys)


class Walk:
    """Rows of many cells through the layers. `finish` yields, row by row, the normalised stream at the read position."""

    def __init__(self, base: Base, cells: Sequence[Cell], read: int, tokens: int = 2048) -> None:
        self.base, self.model, self.read, self.tokens = base, base.model, read, tokens
        self.cells = {cell.index: cell for cell in cells}
        self.batch = Batch(base.ids, _full(base), _full(base), base.model.token_id)
        self.joining: dict[tuple[int, int], list[Cell]] = defaultdict(list)  # (layer, stage) -> cells
        for cell in cells:
            self.joining[cell.layer, cell.stage].append(cell)
        self.groups: dict[int, Rows] = {}

    @torch.no_grad()
    def run(self) -> None:
        """Visit every layer once; `results` then has the rows at the read position."""
        last = self.model.n_layers - 1
        for layer in range(self.model.n_layers):
            self._join(layer, IN)
            only_read = self.base.halves and layer == last
            waiting: list[Waiting] = []
            for group in self.groups.values():
                waiting += self._through(group, layer, only_read)
            self._mlps(waiting, layer)
            self._join(layer, MID, only_read)
            self._join(layer, OUT, only_read)

    def _through(self, group: Rows, layer: int, only_read: bool) -> list[Waiting]:
        """All rows of a group through one layer, in pieces of bounded size. Where halves are called apart, what comes
        back waits for the MLP, with the rows of the other groups; rows edited inside the layer run it under a Session."""
        edited = [i for i, cell in enumerate(group.cell) if self._inside(cell, layer)]
        plain = [i for i in range(len(group.cell)) if not self._inside(group.cell[i], layer)] if edited else None
        keep = slice(self.read - group.start, self.read - group.start + 1) if only_read else slice(None)
        before = group.x
        group.x = before[:, keep].clone() if only_read else torch.empty_like(before)
        waiting = []
        for rows in _pieces(plain if plain is not None else len(group.cell), self.tokens // before.shape[1]):
            x, prompts = before[rows], group.prompt[rows]
            if self.base.halves:
                added = _attention_half(self.base, layer, group.start, x, prompts)
                waiting.append(Waiting(group, rows, x[:, keep], added[:, keep]))
            else:
                group.x[rows] = _whole_layer(self.base, layer, group.start, x, prompts)
        for rows in _pieces(edited, 32):
            group.x[rows] = self._under_session(group, before, rows, layer)[:, keep].to(group.x.dtype)
        return waiting

    def _mlps(self, waiting: list[Waiting], layer: int) -> None:
        """The MLP, which knows no positions, on the tokens of many groups at once: few large products, not many small."""
        while waiting:
            block = [waiting.pop()]
            while waiting and sum(some.n_tokens for some in block) + waiting[-1].n_tokens <= self.tokens:
                block.append(waiting.pop())
            x = torch.cat([some.stream.flatten(0, 1) for some in block])[None]  # [1, token, d_model]
            added = torch.cat([some.added.flatten(0, 1) for some in block])[None]
            out = _mlp_half(self.base, layer, x, added)[0]
            for some, new in zip(block, out.split([some.n_tokens for some in block]), strict=True):
                some.group.x[some.rows] = new.view(some.stream.shape).to(some.group.x.dtype)

    def _inside(self, index: int, layer: int) -> bool:
        cell = self.cells[index]
        return cell.inside and any(_layer_of(edit.port, self.model.n_layers) == layer for edit in cell.edits)

    def _under_session(self, group: Rows, before: Tensor, rows: list[int], layer: int) -> Tensor:
        """One layer for rows whose edits act inside it, each row with its own."""
        x, prompts = before[rows], group.prompt[rows]
        edits = []
        for row, index in enumerate(group.cell[i] for i in rows):
            for edit in self.cells[index].edits:
                if _layer_of(edit.port, self.model.n_layers) == layer and edit.port.signal not in LATE:
                    edits.append(for_one(edit, row, int(prompts[row]), len(self.base.ids)))
        ids = self.base.ids[prompts]
        lengths = torch.full((len(ids),), ids.shape[1])
        with Session(self.model, (), edits) as session:
            session.place(Batch(ids, lengths, lengths, self.model.token_id), group.start, ids.shape[1])
            out = _whole_layer(self.base, layer, group.start, x, prompts)
        return out

    # ---- joining ----

    def _join(self, layer: int, stage: int, only_read: bool = False) -> None:
        kinds: dict[tuple[int, str, bool], list[Cell]] = defaultdict(list)
        for cell in self.joining.pop((layer, stage), []):
            kinds[cell.start, cell.edits[0].port.signal, cell.inside].append(cell)
        prompts = torch.arange(len(self.base.ids))
        joining: dict[int, list[tuple[Tensor, list[int]]]] = defaultdict(list)
        for (start, signal, inside), cells in kinds.items():
            keep = slice(self.read - start, self.read - start + 1) if only_read else slice(None)
            for some in _pieces(cells, self.tokens // (len(prompts) * (self.base.n_positions - start))):
                x = self._start_values(layer, start, signal, inside, some, keep)  # [cell * prompt, position, d_model]
                joining[start].append((x, [cell.index for cell in some for _ in prompts]))
        for start, blocks in joining.items():
            x, cells_of = torch.cat([x for x, _ in blocks]), [index for _, indices in blocks for index in indices]
            group = self.groups.setdefault(start, Rows(start, x))
            group.join(x, cells_of, prompts.repeat(len(cells_of) // len(prompts)))

    def _start_values(
        self, layer: int, start: int, signal: str, inside: bool, cells: Sequence[Cell], keep: slice
    ) -> Tensor:
        """The stream of rows that join here, cells by prompts, with their edit made, at the positions to `keep`."""
        base = self.base
        if signal in LATE and not inside:
            return base.resid[-1][:, start:][:, keep].repeat(len(cells), 1, 1)
        if inside:
            return base.resid[layer][:, start:].repeat(len(cells), 1, 1)
        if signal in ("embed", "resid_in"):
            return self._edited(Port("resid_in", layer), cells, start)
        if signal == "resid_out":
            return self._edited(Port("resid_out", layer), cells, start, base.resid[layer + 1])[:, keep]
        if signal in ("mlp.act", "mlp.out"):
            return self._after_mlp(layer, start, signal, cells)[:, keep]
        x = base.resid[layer][:, start:].repeat(len(cells), 1, 1)
        if signal == "resid_mid":
            added = self._edited(Port(signal, layer), cells, start) - x
        elif signal == "attn.out":
            added = self._edited(Port(signal, layer), cells, start)
        else:
            added = self._attention_from_heads(layer, start, signal, cells)
        return _mlp_half(base, layer, x[:, keep], added[:, keep])

    def _attention_from_heads(self, layer: int, start: int, signal: str, cells: Sequence[Cell]) -> Tensor:
        """What attention adds when the edited heads' z, or what they write, changes: base plus change, through the norm."""
        at, n_prompts = self.model.modules[layer], len(self.base.ids)
        w_o = self.model.W_O(layer)  # [head, d_head, d_model]
        before = self.base.taps[Port("attn.z", layer)][:, start:]  # [prompt, position, head, d_head]
        changes = []
        for cell in cells:
            edit = cell.edits[0]
            head = edit.port.index
            heads = slice(None) if head is None else slice(head, head + 1)
            old = before[:, :, heads]
            if signal == "attn.head_out":
                old = torch.einsum("bphd,hdm->bphm", old, w_o[heads])
            new = self._apply(edit, old if head is None else old[:, :, 0], start)
            change = new - (old if head is None else old[:, :, 0])  # [prompt, position, (head,) d]
            change = change if head is not None else change.flatten(2) if signal == "attn.z" else change.sum(2)
            if signal == "attn.z":
                change = change @ (w_o[head] if head is not None else w_o.flatten(0, 1))
            changes.append(change)
        total = torch.cat(changes)
        if at.attn_added is at.attn or at.attn_added is at.attn_proj:
            added = self.base.taps[Port("attn.out", layer)][:, start:].repeat(len(cells), 1, 1)
            return added + total * self.model.residual_scale
        bias = getattr(at.attn_proj, "bias", None)
        raw = before.flatten(2) @ w_o.flatten(0, 1) + (0 if bias is None else bias)
        return _added(at.attn_added, (), raw.repeat(len(cells), 1, 1) + total, self.model.residual_scale).view(
            n_prompts * len(cells), *raw.shape[1:]
        )

    def _after_mlp(self, layer: int, start: int, signal: str, cells: Sequence[Cell]) -> Tensor:
        """The stream after a layer whose MLP's activations or output were edited."""
        at, base = self.model.modules[layer], self.base
        before_mlp = base.resid[layer][:, start:] + base.taps[Port("attn.out", layer)][:, start:]
        before_mlp = before_mlp.repeat(len(cells), 1, 1)
        new = self._edited(Port(signal, layer), cells, start)
        if signal == "mlp.act":
            assert at.mlp_proj is not None
            new = _added(at.mlp_added, (at.mlp, at.mlp_proj), at.mlp_proj(new), self.model.residual_scale)
        return before_mlp + new

    def _edited(self, port: Port, cells: Sequence[Cell], start: int, base_value: Tensor | None = None) -> Tensor:
        """Base values of a signal, once per cell, each with its cell's edit made: [cell * prompt, position, ...]."""
        before = self.base.taps[port] if base_value is None else base_value
        before = before[:, start:]
        out = []
        for cell in cells:
            edit = cell.edits[0]
            if edit.port.index is None:
                out.append(self._apply(edit, before, start))
            else:
                new = before.clone()
                new[:, :, edit.port.index] = self._apply(edit, before[:, :, edit.port.index], start)
                out.append(new)
        return torch.cat(out)

    def _apply(self, edit: Edit, signal: Tensor, start: int) -> Tensor:
        ordinal = chosen(edit.positions, self.batch, what=str(edit))[:, start:].to(signal.device)
        return apply(edit, signal, ordinal, row_mask(edit, len(self.base.ids)).to(signal.device))

    def results(self) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """After the walk, group by group: each row's cell, its prompt, its final stream at the read position [row, d_model]."""
        for group in self.groups.values():
            yield (
                group.cell,
                group.prompt,
                group.x[:, 0] if group.x.shape[1] == 1 else group.x[:, self.read - group.start],
            )


def _full(base: Base) -> Tensor:
    return torch.full((len(base.ids),), base.n_positions)


def _pieces(rows: Sequence[Any] | int, size: int) -> Iterator[Any]:
    """At most `size` at a time: slices of a count, sublists of a list."""
    size = max(1, size)
    for i in range(0, rows if isinstance(rows, int) else len(rows), size):
        yield slice(i, min(i + size, rows)) if isinstance(rows, int) else list(rows[i : i + size])

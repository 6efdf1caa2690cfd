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

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from patchbay.difference import Difference
from patchbay.edit import Batch, Edit, apply, chosen, row_mask
from patchbay.jacks import Session
from patchbay.model import Model
from patchbay.port import PatchbayError, Port
from patchbay.restart import Base, added_by, attention_flat, attention_half, mlp_half, whole_layer

IN, MID, OUT = 0, 1, 2  # where in its layer a row joins: before it, after attention, after the MLP
STAGE = {"embed": IN, "resid_in": IN, "attn.z": MID, "attn.head_out": MID, "attn.out": MID, "resid_mid": MID}
STAGE |= {"mlp.act": OUT, "mlp.out": OUT, "resid_out": OUT}
LATE = ("final_norm", "logits")  # edited after the last layer
MLP_TOKENS = 512  # at a time: their activations stay in the processor's cache


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
    where: Tensor  # [row, position], as `Base.where`

    @property
    def n_tokens(self) -> int:
        return self.stream[..., 0].numel()


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

    def __init__(
        self, base: Base, cells: Sequence[Cell], read: int, *, difference: Difference | None = None, tokens: int = 2048
    ) -> None:
        self.base, self.model, self.read, self.tokens = base, base.model, read, tokens
        self.difference = difference
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
        with Session(self.model) as session:
            session.fuse_activations()
            if self.difference is not None:
                self.difference.attach(session)
            for layer in range(self.model.n_layers):
                self._join(layer, IN)
                only_read = self.base.halves and layer == last
                self._mlps(self._through(layer, only_read), layer)
                self._join(layer, MID, only_read)
                self._join(layer, OUT, only_read)

    def _through(self, layer: int, only_read: bool) -> list[Waiting]:
        """All rows through one layer, in pieces of bounded size. Where halves are called apart, what comes back waits for
        the MLP; rows edited inside the layer run it under a Session."""
        waiting: list[Waiting] = []
        pieces: list[tuple[Rows, Any, Tensor, slice]] = []
        for group in self.groups.values():
            edited = [i for i, cell in enumerate(group.cell) if self._inside(cell, layer)]
            plain = [i for i in range(len(group.cell)) if not self._inside(group.cell[i], layer)] if edited else None
            keep = slice(self.read - group.start, self.read - group.start + 1) if only_read else slice(None)
            before = group.x
            group.x = before[:, keep].clone() if only_read else torch.empty_like(before)
            for rows in _pieces(plain if plain is not None else len(group.cell), self.tokens // before.shape[1]):
                if self.base.halves:
                    pieces.append((group, rows, before[rows], keep))
                else:
                    group.x[rows] = whole_layer(self.base, layer, group.start, before[rows], group.prompt[rows])
            for rows in _pieces(edited, 32):
                group.x[rows] = self._under_session(group, before, rows, layer)[:, keep].to(group.x.dtype)
        for block in _blocks(pieces, self.tokens if self.base.flat else 1, lambda piece: piece[2][..., 0].numel()):
            given = [(group.start, x, group.prompt[rows]) for group, rows, x, _ in block]
            if self.base.flat:
                added = attention_flat(self.base, layer, given)
            else:
                added = [attention_half(self.base, layer, *piece) for piece in given]
            for (group, rows, x, keep), new in zip(block, added, strict=True):
                where = self.base.tokens(group.start, group.prompt[rows])[:, keep]
                waiting.append(Waiting(group, rows, x[:, keep], new[:, keep], where))
        return waiting

    def _mlps(self, waiting: list[Waiting], layer: int) -> None:
        """The MLP, which knows no positions, on the tokens of many groups at once: few large products, not many small."""
        for block in _blocks(waiting, MLP_TOKENS, lambda some: some.n_tokens):
            x = torch.cat([some.stream.flatten(0, 1) for some in block])[None]  # [1, token, d_model]
            added = torch.cat([some.added.flatten(0, 1) for some in block])[None]
            self.base.where = torch.cat([some.where.flatten() for some in block])
            out = mlp_half(self.base, layer, x, added)[0]
            for some, new in zip(block, out.split([some.n_tokens for some in block]), strict=True):
                some.group.x[some.rows] = new.view(some.stream.shape).to(some.group.x.dtype)

    def _inside(self, index: int, layer: int) -> bool:
        cell = self.cells[index]
        return cell.inside and any(_layer_of(edit.port, self.model.n_layers) == layer for edit in cell.edits)

    def _under_session(self, group: Rows, before: Tensor, rows: list[int], layer: int) -> Tensor:
        """One layer for rows whose edits act inside it, each row with its own."""
        self.base.where = None
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
            out = whole_layer(self.base, layer, group.start, x, prompts)
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
        base.where = base.tokens(start, torch.arange(len(base.ids)))[:, keep].repeat(len(cells), 1).flatten()
        return mlp_half(base, layer, x[:, keep], added[:, keep])

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
        return added_by(at.attn_added, (), raw.repeat(len(cells), 1, 1) + total, self.model.residual_scale).view(
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
            new = added_by(at.mlp_added, (at.mlp, at.mlp_proj), at.mlp_proj(new), self.model.residual_scale)
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


T = TypeVar("T")


def _blocks(pieces: Sequence[T], size: int, n_tokens: Callable[[T], int]) -> Iterator[list[T]]:
    """Neighbouring pieces joined while they hold at most `size` tokens."""
    block: list[T] = []
    held = 0
    for piece in pieces:
        if block and held + n_tokens(piece) > size:
            yield block
            block, held = [], 0
        block.append(piece)
        held += n_tokens(piece)
    if block:
        yield block


def _pieces(rows: Sequence[Any] | int, size: int) -> Iterator[Any]:
    """At most `size` at a time: slices of a count, sublists of a list."""
    size = max(1, size)
    for i in range(0, rows if isinstance(rows, int) else len(rows), size):
        yield slice(i, min(i + size, rows)) if isinstance(rows, int) else list(rows[i : i + size])

"""Rows that join a walk: the base run's values at the positions that their edits touch, with the edits made.

What is edited before the MLP joins as the stream and what attention adds to it; an edit of heads' z, or of what they write, changes
that by a product with the heads' own rows of W_O, so that no attention is run again. Features and neurons are silent at most tokens: a
row joins where its edit first changes an activation of the base run, and one that changes none is the base run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from patchbay.edits.apply import apply, row_mask
from patchbay.edits.edit import Edit
from patchbay.model.linear import bias_of
from patchbay.signal.port import Port, by_home
from patchbay.signal.positions import Batch
from patchbay.sweeps.calls import Base
from patchbay.sweeps.layers import added_by
from patchbay.sweeps.plan import Cell, Touched


class Joins:
    """Values of a base run for cells that join it, each with its cell's edit made."""

    def __init__(self, base: Base) -> None:
        self.base, self.model = base, base.model
        lengths = torch.full((len(base.ids),), base.n_positions)
        self.touched = Touched(Batch(base.ids, lengths, lengths, base.model))

    def moving(self, cells: Sequence[Cell]) -> Iterator[Cell]:
        """The cells that change something, each from the first position on where it does; of what is not sparse, as they are."""
        for cell in cells:
            port = cell.edits[0].port
            signal = Port(port.signal, port.layer)
            if cell.inside or not (by_home(port) or port.signal == "mlp.act") or signal not in self.base.taps:
                yield cell
                continue
            before, span = self.base.taps[signal], slice(cell.start, cell.stop)
            before = (before if port.index is None else before[:, :, port.index])[:, span]
            changed = self._apply(cell.edits[0], before, span) != before
            places = changed.flatten(2).any(2).any(0) if changed.ndim > 2 else changed.any(0)
            at = places.nonzero()[:, 0].tolist()
            if at:
                stop = cell.start + at[-1] + 1 if self.base.narrow else cell.stop
                yield replace(cell, start=cell.start + at[0], stop=stop)

    def before_mlp(self, layer: int, span: slice, signal: str, cells: Sequence[Cell]) -> tuple[Tensor, Tensor]:
        """The stream of rows that join after attention, and what attention adds: [cell * prompt, position, d_model]."""
        x = self.base.resid[layer][:, span].repeat(len(cells), 1, 1)
        if signal == "resid_mid":
            return x, self.edited(Port(signal, layer), cells, span) - x
        if signal == "attn.out":
            return x, self.edited(Port(signal, layer), cells, span)
        return x, self._attention_from_heads(layer, span, signal, cells)

    def _attention_from_heads(self, layer: int, span: slice, signal: str, cells: Sequence[Cell]) -> Tensor:
        """What attention adds when the edited heads' z, or what they write, changes: base plus change, through the norm."""
        at, n_prompts = self.model.modules[layer], len(self.base.ids)
        w_o = self.model.W_O(layer)  # [head, d_head, d_model]
        before = self.base.taps[Port("attn.z", layer)][:, span]  # [prompt, position, head, d_head]
        written = torch.einsum("bphd,hdm->bphm", before, w_o) if signal == "attn.head_out" else before
        changes = []
        for cell in cells:
            old = written if (head := cell.edits[0].port.index) is None else written[:, :, head]
            changes.append(self._apply(cell.edits[0], old, span) - old)  # [prompt, position, (head,) d]
        if signal == "attn.z" and all(change.ndim == 3 for change in changes):  # a head each: their products at once
            heads = [cell.edits[0].port.index for cell in cells]
            total = torch.bmm(torch.stack(changes).flatten(1, 2), w_o[heads]).view(-1, before.shape[1], w_o.shape[2])
        else:
            total = torch.cat([_written(*one, signal, w_o) for one in zip(cells, changes, strict=True)])
        if at.attn_added is at.attn or at.attn_added is at.attn_proj:
            added = self.base.taps[Port("attn.out", layer)][:, span].repeat(len(cells), 1, 1)
            return added + total * self.model.residual_scale
        bias = bias_of(at.attn_proj)
        raw = before.flatten(2) @ w_o.flatten(0, 1) + (0 if bias is None else bias)
        return added_by(at.attn_added, (), raw.repeat(len(cells), 1, 1) + total, self.model.residual_scale).view(
            n_prompts * len(cells), *raw.shape[1:]
        )

    def after_mlp(self, layer: int, span: slice, signal: str, cells: Sequence[Cell]) -> Tensor:
        """The stream after a layer whose MLP's activations or output were edited."""
        at, base = self.model.modules[layer], self.base
        before_mlp = base.resid[layer][:, span] + base.taps[Port("attn.out", layer)][:, span]
        new = self.edited(Port(signal, layer), cells, span)
        if signal == "mlp.act":
            assert at.mlp_proj is not None
            base.where = None
            new = added_by(at.mlp_added, (at.mlp, at.mlp_proj), at.mlp_proj(new), self.model.residual_scale)
        return before_mlp.repeat(len(cells), 1, 1) + new

    def edited(self, port: Port, cells: Sequence[Cell], span: slice, base_value: Tensor | None = None) -> Tensor:
        """Base values of a signal, once per cell, each with its cell's edit made: [cell * prompt, position, ...]."""
        before = (self.base.taps[port] if base_value is None else base_value)[:, span]
        out = []
        for cell in cells:
            edit = cell.edits[0]
            if by_home(edit.port) is not None:
                out.append(self._decoded(edit, before, span))
            elif edit.port.index is None:
                out.append(self._apply(edit, before, span))
            else:
                new = before.clone()
                new[:, :, edit.port.index] = self._apply(edit, before[:, :, edit.port.index], span)
                out.append(new)
        return torch.cat(out)

    def _decoded(self, edit: Edit, before: Tensor, span: slice) -> Tensor:
        """A signal whose features are edited: the base's, and what the change of its activations writes."""
        layer, index = edit.port.layer or 0, edit.port.index
        rows = self.model.dictionaries[layer, edit.port.signal.split(".")[0]].W_dec
        z = self.base.taps[Port(edit.port.signal, layer)][:, span]
        z = z if index is None else z[:, :, index]
        change = self._apply(edit, z, span) - z
        written = change @ rows.to(z) if index is None else change[..., None] * rows[index].to(z)
        moved = (written != 0).any(-1, keepdim=True)
        return torch.where(moved, before + written.to(before.dtype), before)

    def _apply(self, edit: Edit, signal: Tensor, span: slice) -> Tensor:
        ordinal = self.touched.ordinals(edit)[:, span].to(signal.device)
        return apply(edit, signal, ordinal, row_mask(edit, len(self.base.ids)).to(signal.device))


def _written(cell: Cell, change: Tensor, signal: str, w_o: Tensor) -> Tensor:
    """What a change of heads' z, or of what they write, changes in the sum that they write: [prompt, position, d_model]."""
    head = cell.edits[0].port.index
    if signal == "attn.z":
        return change.flatten(2) @ w_o.flatten(0, 1) if head is None else change @ w_o[head]
    return change.sum(2) if head is None else change

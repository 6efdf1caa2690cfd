"""What happens to a signal where it passes: its edits are made, its taps are filled.

`Sites` knows what is asked of each signal and where the tokens that run now stand; it touches no module.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from patchbay.edits.apply import apply, row_mask
from patchbay.edits.edit import Edit
from patchbay.edits.probe import Probe
from patchbay.edits.together import Together, in_rows, made, plan
from patchbay.jacks.arguments import refuse_checkpoints
from patchbay.jacks.modelled import Modelled as Lent
from patchbay.jacks.notes import Note, hit
from patchbay.signal.port import PatchbayError, Port, position_axis
from patchbay.signal.positions import Batch, all_from, chosen

KEYED = ("attn.k", "attn.v", "attn.pattern")  # signals with an entry for each key


@dataclass
class Want:
    """What is asked of one signal of one layer."""

    taps: list[Port] = field(default_factory=list)
    edits: list[tuple[int, Edit]] = field(default_factory=list)  # with their place in the session's list
    probes: list[Probe] = field(default_factory=list)  # which read this signal and decide where edits are made

    @property
    def changes(self) -> list[tuple[int, Edit]]:
        return [(i, edit) for i, edit in self.edits if edit.op != "block"]

    @property
    def looks_only(self) -> bool:
        """Whether the one thing asked is the whole signal as it is."""
        return (
            not self.edits
            and not self.probes
            and len(self.taps) == 1
            and self.taps[0].index is None
            and self.taps[0].query is None
        )


class Here(threading.local):
    """The run that is going on, of each thread its own: threads that were started inside a block share its session.

    The tokens that run now are those of `batch` from `start` to `end`; `reached` are the signals that passed so far. `placed`:
    whether that is so now, `within`: the module in whose call it is; `grad`: whether that call keeps a graph.
    """

    def __init__(self) -> None:
        self.batch: Batch | None = None
        self.column_of: Tensor | None = None  # position of each column [prompt, column], -1 at padding; None: the same
        self.start = self.end = 0
        self.placed = self.grad = False
        self.within: Any = None
        self.shape = (0, 0)  # prompts and positions of the tokens that run now
        self.reached: set[tuple[str, int | None]] = set()
        self.stash: dict[tuple[str, int], Any] = {}
        self.captured: dict[Port, Tensor] = {}
        self.touched: dict[int, list[Note]] = {}
        self.fired: dict[int, Tensor] = {}  # id of a probe -> where it fired among the tokens that run now


class Sites:
    """Taps and edits by signal. `captured` holds what the taps saw: in this thread's latest run, where it made one."""

    def __init__(self, model: Lent, taps: Sequence[Port], edits: Sequence[Edit], *, grad: bool) -> None:
        self.model, self.edits, self.grad = model, list(edits), grad
        self.here = Here()
        self._row_masks: dict[int, tuple[Edit, Tensor, Tensor | None]] = {}
        self._plans: dict[int, list[Together] | None] = {}  # by the first edit's place
        self._seen: dict[Port, Tensor] = {}  # by the taps of the latest run, in whatever thread
        self.wants: dict[tuple[str, int | None], Want] = {}
        self.hosts: dict[
            tuple[str, int | None], list[tuple[str, int]]
        ] = {}  # signals that dictionaries read or write, and whose
        for port in taps:
            model.require(port)
            self._want(port).taps.append(
                Port(port.signal, port.layer) if grad else port
            )  # a slice is off the graph's path
        for i, edit in enumerate(self.edits):
            model.require(edit.port)
            self._want(edit.port).edits.append((i, edit))
            if edit.where is not None:
                model.require(edit.where.port)
                self._want(edit.where.port).probes.append(edit.where)

    @property
    def captured(self) -> dict[Port, Tensor]:
        return self.here.captured or self._seen

    @property
    def touched(self) -> list[list[tuple[int, ...]]]:
        """For each edit, for each prompt, the positions where it was made since the latest prompts began, in this thread."""
        n = 0 if self.here.batch is None else len(self.here.batch.ids)
        made = [hit(self.here.touched.get(i, ()), n) for i in range(len(self.edits))]
        return [[tuple(row.nonzero()[:, 0].tolist()) for row in one] for one in made]

    def _touch(self, edit: int, ordinal: Tensor | None, row: Tensor | None, n_here: int) -> None:
        """Note that an edit was made at the last `n_here` columns, where `ordinal` and `row` name them; `touched` works it out."""
        batch, begin, end = self.here.batch, max(self.here.end - n_here, 0), self.here.end
        assert batch is not None
        notes = self.here.touched.setdefault(edit, [])
        plain = ordinal is None and self.here.column_of is None
        if plain and begin and notes and notes[-1].goes_on(row) and 0 < notes[-1].begin <= begin <= notes[-1].end:
            begin = notes.pop().begin  # one stretch of generated tokens
        notes.append(Note(begin, end, batch.lengths, ordinal, row, self.here.column_of))
        if len(notes) > 512:
            notes[:] = [Note.of(hit(notes, len(batch.ids)))]

    def _want(self, port: Port) -> Want:
        return self.wants.setdefault((port.signal, port.layer), Want())

    def place(self, batch: Batch, start: int, end: int, column_of: Tensor | None = None) -> None:
        """Say where the tokens that run now stand: those of `batch` from `start` to `end`."""
        self.here.batch, self.here.start, self.here.end, self.here.column_of = batch, start, end, column_of
        self.here.shape = (len(batch.ids), end - start)
        self.here.placed = True
        self._seen = self.here.captured
        self.here.fired.clear()

    def check_placed(self, *what: Any) -> None:
        """Refuse what passes outside a run of the model, or in one that will be made again: where its tokens stand is not known."""
        if not self.here.placed:
            raise PatchbayError(
                "a module of the model was called by itself, outside a run of the model (a layer alone, or one that runs again in a "
                "backward pass), so that the positions of edits and taps are not known there; call model.hf(...) or pb.run"
            )
        if self.here.grad:
            refuse_checkpoints()

    def clip(self, n: int) -> None:
        """Forget what was touched from column `n` on: a text that begins anew, or drafts of tokens that were not taken."""
        for notes in self.here.touched.values():
            if notes and notes[-1].end > n:
                notes[:] = [note._replace(end=min(note.end, n)) for note in notes if note.begin < n]

    def _by_prompt(self, x: Tensor) -> Tensor:
        """[prompt * position, ...] -> [prompt, position, ...]; layers that flatten their tokens keep that order."""
        return x if x.ndim > 2 and x.shape[:2] == self.here.shape else x.reshape(*self.here.shape, *x.shape[1:])

    def site(
        self, signal: str, layer: int | None, x: Tensor, n_keys: int | None = None, closed: Tensor | None = None
    ) -> Tensor:
        """The signal has the value `x` (in the axes of `SIGNALS`): edit it, capture it, return what the model goes on with.

        `n_keys`: keys in all, for k and v, which reach back into the cache. `closed`: where a pattern must stay 0.
        """
        want = self.wants.get((signal, layer))
        if want is None:
            return self._decoded(signal, layer, x)
        self.here.reached.add((signal, layer))
        if want.looks_only and not self.grad and (signal, layer) not in self.hosts:
            self._store(want.taps[0], x)
            return x
        changes = want.changes
        self._probe(want, x)
        x = self._edited(changes, signal, x, n_keys)
        x = x.masked_fill(closed, 0.0) if changes and closed is not None else x
        x = self._decoded(signal, layer, x)
        self._capture(want.taps, signal, x)
        return x

    def _decoded(self, signal: str, layer: int | None, x: Tensor) -> Tensor:
        """What becomes of a signal when features of it are edited; see `features.py`."""
        return x

    def _probe(self, want: Want, x: Tensor, only: Sequence[int] | None = None) -> None:
        """Let the probes of a signal read it as it arrives, [prompt, position, (head | neuron | expert), ...]."""
        for probe in want.probes:
            index = probe.port.index
            at = index if only is None or index is None else list(only).index(index)
            self.here.fired[id(probe)] = probe.fires(x if at is None else x[:, :, at])

    def _fired(self, edit: Edit, n_here: int) -> Tensor | None:
        """Where the probe of an edit fired, bool [prompt, position] of the last `n_here` tokens; None without a probe."""
        if edit.where is None:
            return None
        fired = self.here.fired.get(id(edit.where))
        if fired is None or fired.shape[1] < n_here:
            raise PatchbayError(
                f"{edit}: in this model {edit.where.port} passes after {edit.port}, so its probe cannot decide there; give a port before it"
            )
        return fired[:, fired.shape[1] - n_here :].cpu()

    def _edited(
        self,
        edits: Sequence[tuple[int, Edit]],
        signal: str,
        x: Tensor,
        n_keys: int | None = None,
        only: Sequence[int] | None = None,
    ) -> Tensor:
        if not edits:
            return x
        axis = position_axis(signal)
        y = x.movedim(axis, 1)  # [prompt, position, (head | neuron | expert), ...]
        together = None if torch.is_grad_enabled() or only is not None else self._together(edits, y.shape[1], n_keys)
        if together is not None:
            return made(together, y).movedim(1, axis)
        if any(edit.port.index is not None for _, edit in edits):
            y = y.clone()
        for i, edit in edits:
            index = edit.port.index if only is None or edit.port.index is None else list(only).index(edit.port.index)
            part = y if index is None else y[:, :, index].clone() if self.grad else y[:, :, index]
            ordinal, row = self._where(edit, y.shape[1], n_keys)
            self._touch(i, ordinal, row, y.shape[1])
            if ordinal is None and row is not None:
                new = in_rows(edit, part, row, self._rows(edit)[1])
            else:
                new = apply(edit, part, _to(ordinal, y), _to(row, y))
            if index is None:
                y = new.clone() if new._base is not None or len(edits) > 1 else new
            else:
                y[:, :, index] = new
        return y.movedim(1, axis)

    def _where(self, edit: Edit, n_here: int, n_keys: int | None) -> tuple[Tensor | None, Tensor | None]:
        """Ordinals of the edited positions in this chunk, and of the edited rows; None where everything is."""
        assert self.here.batch is not None
        fired = self._fired(edit, n_here)
        n_all = n_here if n_keys is None else n_keys
        begin = max(
            self.here.end - n_all, 0
        )  # cached keys reach back before this chunk; of a fixed size, ahead of its end
        plain = fired is None and (not edit.spread or edit.same_everywhere)
        if plain and (edit.positions is None or all_from(self._first(begin), edit.positions, self.here.batch)):
            return None, None if edit.rows is None and not edit.spread else self._rows(edit)[0]
        ordinal = self._columns(chosen(edit.positions, self.here.batch, what=edit))[:, begin : self.here.end]
        ordinal = ordinal if fired is None else ordinal.masked_fill(~fired, -1)
        return _wide(ordinal, n_all), self._rows(edit)[0]

    def _together(self, edits: Sequence[tuple[int, Edit]], n_here: int, n_keys: int | None) -> list[Together] | None:
        """Edits of single rows as few sums and products, where each is made at every position that runs now; noted as made."""
        key = edits[0][0]
        if key not in self._plans:
            self._plans[key] = plan([edit for _, edit in edits])
        together = self._plans[key]
        if together is None or any(self._where(edit, n_here, n_keys)[0] is not None for _, edit in edits):
            return None
        for i, edit in edits:
            self._touch(i, None, self._rows(edit)[0], n_here)
        return together

    def _first(self, begin: int) -> int:
        """The least position of a column: padding moves them."""
        return begin if self.here.column_of is None else int(self.here.column_of[:, begin].min())

    def _rows(self, edit: Edit) -> tuple[Tensor, Tensor | None]:
        """The edited rows, as from `row_mask`, and their places in the batch in the edit's order; None where these are all of it."""
        assert self.here.batch is not None
        n = len(self.here.batch.ids)
        known = self._row_masks.get(id(edit))  # with the edit, so that no other can come to have its id
        if known is None or len(known[1]) != n:  # asked at each token of a generation
            mask, rows = row_mask(edit, n), edit.rows
            places = None if rows is None or rows == tuple(range(n)) else torch.tensor(rows)
            known = self._row_masks[id(edit)] = edit, mask, places
        return known[1], known[2]

    def _columns(self, ordinal: Tensor) -> Tensor:
        """From positions of prompts to columns of the tensors that run, which hold padding where a mask says so."""
        if self.here.column_of is None:
            return ordinal
        found = ordinal.gather(1, self.here.column_of.clamp(min=0))
        return found.masked_fill(self.here.column_of < 0, -1)

    def blocked(self, layer: int, n_heads: int, n_queries: int, n_keys: int) -> Tensor | None:
        """What `block` edits cut at this layer: bool [prompt, head, query, key], or None."""
        want = self.wants.get(("attn.pattern", layer))
        blocks = [(i, edit) for i, edit in want.edits if edit.op == "block"] if want else []
        if not blocks:
            return None
        assert self.here.batch is not None
        n_prompts = len(self.here.batch.ids)
        cut = torch.zeros(n_prompts, n_heads, n_queries, n_keys, dtype=torch.bool)
        for i, edit in blocks:
            query = self._columns(chosen(edit.positions, self.here.batch, what=edit))
            query = query[:, self.here.end - n_queries : self.here.end] >= 0
            fired = self._fired(edit, n_queries)
            query = query if fired is None else query & fired
            key = self._columns(chosen(edit.keys, self.here.batch, what=edit))
            key = _wide(key[:, max(self.here.end - n_keys, 0) : self.here.end], n_keys) >= 0
            pair = query[:, :, None] & key[:, None, :] & (row_mask(edit, n_prompts) >= 0)[:, None, None]
            began = n_keys - n_queries if n_keys <= self.here.end else self.here.start
            seen = pair & torch.ones(n_queries, n_keys, dtype=torch.bool).tril(began)  # keys at and before the query
            self._touch(i, seen.any(-1).long() - 1, None, n_queries)
            heads = slice(None) if edit.port.index is None else slice(edit.port.index, edit.port.index + 1)
            cut[:, heads] |= pair[:, None]
        return cut.to(self.here.batch.ids.device)

    # ---- capturing ----

    def _capture(self, taps: Iterable[Port], signal: str, x: Tensor, only: Sequence[int] | None = None) -> None:
        if self.grad and x.is_floating_point() and not x.requires_grad:
            x.requires_grad_()  # frozen weights, or an edit that replaced everything: the graph starts here
        whole = any(port.index is None and port.query is None for port in taps)
        for port in taps:
            if port.query is not None:
                self._capture_slice(port, x)
                continue
            if port.index is None:
                value = x
            else:
                axis = Port(port.signal, port.layer, None).index_axis
                place = list(Port(port.signal, port.layer).axes).index(str(axis))
                index = port.index if only is None else list(only).index(port.index)
                value = x.select(place, index)
                value = value if whole else value.clone()  # a view would keep all heads alive
            self._store(port, value)

    def _capture_slice(self, port: Port, pattern: Tensor) -> None:
        """Some query rows of a pattern that was computed whole."""
        rows = self.query_rows([port], pattern.shape[2])
        assert rows is not None
        index = rows[:, None, :, None].to(pattern.device).expand(-1, pattern.shape[1], -1, pattern.shape[3])
        value = pattern.gather(2, index)
        self._store(port, value if port.index is None else value[:, port.index].clone())

    def _store(self, port: Port, value: Tensor) -> None:
        if not self.grad and value.requires_grad:
            value = value.detach()
        axis = port.tapped_axis if port.signal in ("attn.k", "attn.v") else -1
        if self.here.end and port.signal in KEYED and value.shape[axis] > self.here.end:
            value = value.narrow(axis, 0, self.here.end)  # a cache of fixed size has empty places after the last token
        self.here.captured[port] = value

    def query_rows(self, taps: Sequence[Port], n_queries: int) -> Tensor | None:
        """Query rows that the pattern taps need, int64 [prompt, row]; None when one of them needs all."""
        assert self.here.batch is not None
        rows = pattern_rows(list(taps))
        return None if rows is None else query_rows(rows, self.here.batch.lengths.clamp(max=n_queries))

    def capture_rows(self, layer: int, pattern: Tensor, rows: Tensor) -> None:
        """Store the computed rows [prompt, head, row, key] for each tap, in the order that it asked them."""
        taps = self.wants[("attn.pattern", layer)].taps
        computed = pattern_rows(taps)
        assert computed is not None
        for port in taps:
            value = pattern[:, :, [computed.index(row) for row in port.query or ()]]
            self._store(port, value if port.index is None else value[:, port.index].clone())


def query_rows(rows: Sequence[int], lengths: Tensor) -> Tensor:
    """Places of the asked rows in prompts of these lengths, negative ones from the end: int64 [prompt, row]."""
    lengths = lengths.cpu()[:, None]
    asked = torch.tensor(rows)[None]
    out = torch.where(asked < 0, lengths + asked, asked.expand(len(lengths), -1))
    if bool((out < 0).any()) or bool((out >= lengths).any()):
        raise PatchbayError(f"pattern rows {list(rows)} asked, the shortest prompt has {int(lengths.min())} tokens")
    return out


def pattern_rows(ports: list[Port]) -> tuple[int, ...] | None:
    """The query rows that all the pattern taps of a layer need together; None when one of them needs every row."""
    if not ports or any(port.query is None for port in ports):
        return None
    return tuple(dict.fromkeys(row for port in ports for row in port.query or ()))


def _to(index: Tensor | None, like: Tensor) -> Tensor | None:
    return None if index is None else index.to(like.device)


def _wide(ordinal: Tensor, n: int) -> Tensor:
    """`n` columns, those added untouched: places of a fixed cache that no token has filled."""
    return torch.nn.functional.pad(ordinal, (0, n - ordinal.shape[1]), value=-1)

"""The restarted walk: many edited copies of a run, computed only where they differ from it. Exact.

An edit at layer l and position p changes nothing before layer l nor left of p. So the base prompts run once, keeping the
stream, the keys and values and what each layer was called with. Each edited row then joins the walk at its layer, from the
base stream at its positions p.. , and attends to the base's keys and values left of p. Rows that start at the same position
form one batch, which grows as the walk goes deeper; every layer is visited once. Where a row joins, only the positions that its
edit touches differ from the base run: the MLP after a join in the middle, and the queries, keys and values of the attention
after it, are computed for these alone.

Where a layer is attention and MLP one after the other (or side by side) between norms, the two halves are called apart: a row
edited after attention joins in the middle, and the last layer's MLP runs at the read position alone. This is believed only
after the halves reproduced the layer's own output on the base run; otherwise whole layers are called. Rows edited inside
attention, routers or experts run that one layer under a `Session`. The final norm runs at the read position, and the
unembedding only for the tokens that the metric reads.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from patchbay.jacks.session import Session
from patchbay.signal.port import Port
from patchbay.signal.positions import Batch
from patchbay.sweeps.calls import Base, Piece
from patchbay.sweeps.difference import Difference
from patchbay.sweeps.joins import Joins
from patchbay.sweeps.layers import attention_flat, attention_half, mlp_half, whole_layer
from patchbay.sweeps.plan import IN, LATE, MID, OUT, Cell, for_one, layer_of

MLP_TOKENS = 512  # at a time: their activations stay in the processor's cache


class Rows:
    """Rows of one start position that have joined, with room for those that will: x [row, position - start, d_model]."""

    def __init__(self, start: int, stop: int, room: int) -> None:
        self.start, self.stop, self.room = start, stop, room
        self.first = start  # position of x[:, 0]
        self.cell: list[int] = []  # index of each row's cell
        self.prompt = torch.zeros(0, dtype=torch.long)
        self.old = 0  # rows that an attention has seen: of the others only positions start .. stop differ from the base
        self.held: Tensor | None = None

    @property
    def x(self) -> Tensor:
        assert self.held is not None
        return self.held[: len(self.cell)]

    def join(self, stream: Tensor, cells: Sequence[int]) -> slice:
        """Every cell with every prompt's stream [prompt, position, d_model], from `first` on; the places of these rows."""
        begin, n = len(self.cell), len(stream)
        stream = stream[:, self.first :]
        if self.held is None:
            self.held = stream.new_empty(self.room, *stream.shape[1:])
        self.cell += [index for index in cells for _ in range(n)]
        self.prompt = torch.cat([self.prompt, torch.arange(n).repeat(len(cells))])
        rows = slice(begin, len(self.cell))
        self.held[rows].unflatten(0, (-1, n)).copy_(stream)
        return rows

    def keep(self, position: int) -> None:
        """Go on with one position alone."""
        if self.held is not None:
            x = self.x[:, position - self.first][:, None]
            self.held = x.new_empty(self.room, *x.shape[1:])
            self.held[: len(x)] = x
        self.first = position


class Waiting(NamedTuple):
    """Tokens between attention and MLP: their stream and what attention adds, [token, d_model], and whose they are."""

    rows: list[tuple[Rows, Any, slice]]  # group, which of its rows, which places of their x
    stream: Tensor
    added: Tensor


class Walk:
    """Rows of many cells through the layers. `results` yields, group by group, the final stream at the read position."""

    def __init__(
        self, base: Base, cells: Sequence[Cell], read: int, *, difference: Difference | None = None, tokens: int = 2048
    ) -> None:
        self.base, self.model, self.read, self.tokens = base, base.model, read, tokens
        self.difference = difference
        self.cells = {cell.index: cell for cell in cells}
        self.joins = Joins(base)
        self.joining: dict[tuple[int, int], list[Cell]] = defaultdict(list)  # (layer, stage) -> cells
        for cell in cells:
            self.joining[cell.layer, cell.stage].append(cell)
        room = Counter((cell.start, cell.stop) for cell in cells)
        self.groups = {key: Rows(*key, cells * len(base.ids)) for key, cells in room.items()}

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
                waiting = self._through(layer, only_read)
                self._mlps(waiting + self._join(layer, MID, only_read), layer)
                self._join(layer, OUT, only_read)

    def _through(self, layer: int, only_read: bool) -> list[Waiting]:
        """All rows through one layer, in pieces of bounded size. Where halves are called apart, what comes back waits for
        the MLP; rows edited inside the layer run it under a Session."""
        pieces: list[tuple[Rows, Any, Tensor, int]] = []  # group, rows, their stream, how many positions are given
        for group in self.groups.values():
            if only_read and not group.cell:
                group.keep(self.read)
            if not group.cell:
                continue
            before, n = group.x, self.base.n_positions - group.start
            edited = [i for i, cell in enumerate(group.cell) if self._inside(cell, layer)]
            kept = slice(self.read - group.start, self.read - group.start + 1) if only_read else slice(None)
            if only_read:
                group.keep(self.read)
            for rows, given in self._plain(group, edited, n):
                if self.base.halves:
                    pieces.append((group, rows, before[rows], given))
                else:
                    group.x[rows] = whole_layer(self.base, layer, group.start, before[rows], group.prompt[rows])
            for rows in _pieces(edited, 32):
                group.x[rows] = self._under_session(group, before, rows, layer)[:, kept].to(group.x.dtype)
            group.old = len(group.cell)
        size = self.tokens if self.base.flat else 1
        blocks = _blocks(pieces, size, lambda piece: piece[2][..., 0].numel())
        return [self._attention(block, layer, only_read) for block in blocks]

    def _plain(self, group: Rows, edited: Sequence[int], n: int) -> Iterator[tuple[Any, int]]:
        """Rows that no edit inside this layer acts on, some at a time, and how many of their positions differ from the base."""
        left_out = set(edited)
        for begin, end, given in ((0, group.old, n), (group.old, len(group.cell), group.stop - group.start)):
            plain = [i for i in range(begin, end) if i not in left_out] if left_out else end - begin
            for rows in _pieces(plain, self.tokens // n):
                yield (slice(begin + rows.start, begin + rows.stop) if isinstance(rows, slice) else rows), given

    def _attention(self, block: Sequence[tuple[Rows, Any, Tensor, int]], layer: int, only_read: bool) -> Waiting:
        """What attention adds to the rows of a block, where it is read."""
        base, streams, pieces = self.base, [], []
        for group, rows, x, given in block:
            first = self.read if only_read else group.start
            streams.append(x[:, first - group.start :].flatten(0, 1))
            narrow = base.narrow and base.flat
            pieces.append(
                Piece(group.start, x[:, :given] if narrow else x, group.prompt[rows], first if narrow else group.start)
            )
        if base.flat:
            added = attention_flat(base, layer, pieces)
        else:
            base.where = None
            added = torch.cat([attention_half(base, layer, p.start, p.x, p.prompts).flatten(0, 1) for p in pieces])
        if only_read and not base.narrow:
            parts = added.split([piece.x[..., 0].numel() for piece in pieces])
            some = zip(parts, pieces, strict=True)
            added = torch.cat([part.view_as(piece.x)[:, self.read - piece.start] for part, piece in some])
        return Waiting([(group, rows, slice(None)) for group, rows, _, _ in block], torch.cat(streams), added)

    def _mlps(self, waiting: list[Waiting], layer: int) -> None:
        """The MLP, which knows no positions, on the tokens of many groups at once: few large products, not many small."""
        for block in _blocks(waiting, MLP_TOKENS, lambda some: len(some.stream)):
            stream, added = (_together([some[i] for some in block]) for i in (1, 2))
            targets = [target for some in block for target in some.rows]
            where = [self._where(*target) for target in targets]
            tokens, out = torch.cat([places.flatten() for places in where]), torch.empty_like(stream)
            for some in torch.arange(len(out)).tensor_split(-(-len(out) // MLP_TOKENS)):
                few = slice(int(some[0]), int(some[-1]) + 1)
                self.base.where = tokens[few]
                out[few] = mlp_half(self.base, layer, stream[few][None], added[few][None])[0]
            parts = out.split([places.numel() for places in where])
            for (group, rows, kept), places, new in zip(targets, where, parts, strict=True):
                group.x[rows, kept] = new.view(*places.shape, -1).to(group.x.dtype)

    def _where(self, group: Rows, rows: Any, kept: slice) -> Tensor:
        """As `Base.where`, [row, position]."""
        return self.base.tokens(group.first, group.prompt[rows])[:, kept]

    def _inside(self, index: int, layer: int) -> bool:
        cell = self.cells[index]
        return cell.inside and any(layer_of(edit.port, self.model.n_layers) == layer for edit in cell.edits)

    def _under_session(self, group: Rows, before: Tensor, rows: list[int], layer: int) -> Tensor:
        """One layer for rows whose edits act inside it, each row with its own."""
        self.base.where = None
        x, prompts = before[rows], group.prompt[rows]
        edits = []
        for row, index in enumerate(group.cell[i] for i in rows):
            for edit in self.cells[index].edits:
                if layer_of(edit.port, self.model.n_layers) == layer and edit.port.signal not in LATE:
                    edits.append(for_one(edit, row, int(prompts[row]), len(self.base.ids)))
        ids = self.base.ids[prompts]
        lengths = torch.full((len(ids),), ids.shape[1])
        with Session(self.model, (), edits) as session:
            session.place(Batch(ids, lengths, lengths, self.model), group.start, ids.shape[1])
            out = whole_layer(self.base, layer, group.start, x, prompts)
        return out

    # ---- joining ----

    def _join(self, layer: int, stage: int, only_read: bool = False) -> list[Waiting]:
        """Rows that start here: base streams, with the edit made where it touches them. Those that join before the MLP wait."""
        kinds: dict[tuple[int, int, str, bool], list[Cell]] = defaultdict(list)
        for cell in self.joining.pop((layer, stage), []):
            kinds[cell.start, cell.stop, cell.signal, cell.inside].append(cell)
        waiting, n_prompts = [], len(self.base.ids)
        for (start, stop, signal, inside), cells in kinds.items():
            group = self.groups[start, stop]
            span = slice(max(start, group.first), stop)  # edited positions that are read
            kept = slice(span.start - group.first, stop - group.first)
            for some in _pieces(cells, self.tokens // (n_prompts * (self.base.n_positions - start))):
                rows = group.join(self.base.resid[layer + (stage != IN)], [cell.index for cell in some])
                if inside or signal in LATE or span.start >= stop:
                    continue
                if stage == MID:
                    stream, added = self.joins.before_mlp(layer, span, signal, some)
                    waiting.append(Waiting([(group, rows, kept)], stream.flatten(0, 1), added.flatten(0, 1)))
                elif signal in ("mlp.act", "mlp.out"):
                    group.x[rows, kept] = self.joins.after_mlp(layer, span, signal, some).to(group.x.dtype)
                else:
                    port = Port("resid_out" if stage == OUT else "resid_in", layer)
                    before = self.base.resid[layer + (stage == OUT)]
                    group.x[rows, kept] = self.joins.edited(port, some, span, before).to(group.x.dtype)
        return waiting

    def results(self) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """After the walk, group by group: each row's cell, its prompt, its final stream at the read position [row, d_model]."""
        for group in self.groups.values():
            yield group.cell, group.prompt, group.x[:, self.read - group.first]


def _together(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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

"""Rows as trees: what any of many rows begin with alike is run once, and each call runs many rows without padding.

Sorted rows go into a tree one after another, each after what it shares with the row before, until the tree has `WIDTH` nodes; tokens that
nothing is read after are left out, and only nodes that are read are unembedded. The same log-probabilities as whole rows but for
rounding. Rows run otherwise where that costs more than it saves (attention over a whole tree, and once the proof that the
model takes trees), under edits that count positions, are conditional or of attention itself, and for models that do not pass the proof.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from patchbay.jacks.session import Session
from patchbay.measure._branches import CALL, Branch, common, saving, shared_beginnings
from patchbay.model.model import Model
from patchbay.model.packed import WIDTH, Tree, packs, proved, proving_length, tree_logits

Ids = Sequence[int]
Reads = Sequence[tuple[int, int]]
Read = Callable[[Tensor, Sequence[tuple[int, int, int]], Sequence[int]], Tensor]
ATTENTION = ("attn.pattern", "attn.scores")  # signals whose columns are the texts' own


class Pack(NamedTuple):
    """A tree, and of each row in it the node of each of its tokens."""

    tree: Tree
    nodes: dict[int, list[int]]

    @property
    def saved(self) -> int:
        return sum(map(len, self.nodes.values())) - len(self.tree.ids)


def ways(
    model: Model, rows: Sequence[Ids], reads: Sequence[Reads], batch_size: int
) -> tuple[list[Pack], list[Branch], list[int]]:
    """How rows run: trees, or branches where those save more, and the places of rows that run whole."""
    alike, others = shared_beginnings(model, rows, batch_size)
    found = _packs(rows, reads)
    if sum(one.saved for one in found) <= saving(alike) or not _pays(model, rows, found):
        return [], alike, others
    inside = {i for one in found for i in one.nodes}
    return found, [], [i for i in range(len(rows)) if i not in inside]


def _packs(rows: Sequence[Ids], reads: Sequence[Reads]) -> list[Pack]:
    """Trees of all rows of at most half the width of a tree, as far as something is read of them."""
    paths = {i: tuple(rows[i][: max((at for at, _ in reads[i]), default=-1) + 1]) for i in range(len(rows))}
    found: list[Pack] = []
    before: tuple[int, ...] = ()
    nodes: list[int] = []
    for i in sorted((i for i, path in paths.items() if 0 < len(path) <= WIDTH // 2), key=lambda i: paths[i]):
        path = paths[i]
        n = common(before, path)
        if not found or len(found[-1].tree.ids) + len(path) - n > WIDTH:
            found.append(Pack(Tree([], [], []), {}))
            n = 0
        nodes = nodes[:n] + found[-1].tree.add(nodes[n - 1] if n else -1, path[n:])
        found[-1].nodes[i] = nodes
        before = path
    return found


def _pays(model: Model, rows: Sequence[Ids], found: Sequence[Pack]) -> bool:
    """Whether trees save more than they cost, in multiplications, and are right."""
    edits = model.active_edits()
    if any(edit.positions is not None or edit.keys is not None or edit.spread or edit.where for edit in edits):
        return False
    if any(edit.port.signal in ATTENTION for edit in edits) or not found:
        return False
    size = sum(parameter.numel() for parameter in model.hf.parameters())
    length = max(len(nodes) for one in found for nodes in one.nodes.values())
    wide = sum(len(one.tree.ids) for one in found) * 2 * WIDTH * model.d_model  # of a layer, by attention over a tree
    cost = model.n_layers * (wide + len(found) * CALL)
    once = 0 if proved(model, length) else (WIDTH + 3 * proving_length(model, length)) * size
    return sum(one.saved for one in found) * size > cost + once and packs(model, length)


def packed(
    model: Model, reads: Sequence[Reads], found: Sequence[Pack], together: int, read: Read
) -> Iterator[tuple[int, Tensor]]:
    """(place, what is read of that row [read, 2]) of the rows of trees, `together` tokens in a call; `read` as for branches."""
    at_once = max(1, together // WIDTH)
    for start in range(0, len(found), at_once):
        some = found[start : start + at_once]
        asked = [
            (row, nodes[position], token, i)
            for row, one in enumerate(some)
            for i, nodes in one.nodes.items()
            for position, token in reads[i]
        ]
        keep, at = torch.tensor([node for _, node, _, _ in asked]).unique(return_inverse=True)
        edits = model.active_edits()
        late = any(edit.port.signal in ("logits", "final_norm") for edit in edits)
        with torch.no_grad(), Session(model, (), edits, whole=True):
            logits = tree_logits(model, [one.tree for one in some], None if late else keep.to(model.device))
        columns = keep[at].tolist() if late else at.tolist()
        flat = [(row, column, token) for (row, _, token, _), column in zip(asked, columns, strict=True)]
        values = read(logits, flat, [i for *_, i in asked])
        order = [i for one in some for i in one.nodes]
        yield from zip(order, values.split([len(reads[i]) for i in order]), strict=True)

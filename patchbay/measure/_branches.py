"""Rows that begin alike: what they share is run once, and each row goes on from its keys and values.

A branch is some rows and how many first tokens they share. Of sorted rows those are taken together that save the most tokens: all that
share n tokens save n times their number less one, or they are split where neighbours share least, if the pieces save more. Branches of
one n run together: a pass of their beginnings, then one of all that follows, padded on the right. The same log-probabilities as whole
rows but for rounding. Where that costs more than it saves (two calls for one, CALL), under edits that
count positions or are conditional, and for models whose cache does not pass a short run of this, rows run whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from patchbay.jacks.session import Session
from patchbay.model.caches import branches, continued_from, serves, started
from patchbay.model.model import Model

Ids = Sequence[int]
Reads = Sequence[tuple[int, int]]
Read = Callable[[Tensor, Sequence[tuple[int, int, int]], Sequence[int]], Tensor]
CALL = 1e7  # multiplications in whose time a layer of a call is got ready
WEIGHTS = 16  # tokens whose products take the time of fetching the weights once
DEEPEST = 200  # splits


class Branch(NamedTuple):
    """Rows, by their places, that share their first `n` tokens."""

    n: int
    rows: list[int]


def shared_beginnings(model: Model, rows: Sequence[Ids], batch_size: int) -> tuple[list[Branch], list[int]]:
    """Branches that are worth their calls, and the places of all other rows."""
    edits, everything = model.active_edits(), list(range(len(rows)))
    if any(edit.positions is not None or edit.keys is not None or edit.spread or edit.where for edit in edits):
        return [], everything
    order = sorted(everything, key=lambda i: tuple(rows[i]))
    found = [
        Branch(branch.n, branch.rows[at : at + batch_size])
        for branch in _split(rows, order, 0)
        for at in range(0, len(branch.rows), batch_size)
    ]
    found = [one for one in found if one.n and len(one.rows) > 1]
    saved = saving(found)
    size = sum(parameter.numel() for parameter in model.hf.parameters())
    calls = sum(1 for _ in together(found, batch_size)) + 1  # but for those that other rows need anyway
    lengths = [len(rows[i]) for one in found for i in one.rows]
    if not found or saved * size <= calls * (model.n_layers * CALL + WEIGHTS * size) or not branches(model):
        return [], everything
    if not all(serves(model, min(one.n for one in found), length) for length in set(lengths)):
        return [], everything
    inside = {i for one in found for i in one.rows}
    return found, [i for i in everything if i not in inside]


def saving(found: Sequence[Branch]) -> int:
    """How many tokens branches save."""
    return sum(one.n * (len(one.rows) - 1) for one in found)


def _split(rows: Sequence[Ids], order: list[int], depth: int) -> list[Branch]:
    """The branches of sorted rows that save most."""
    if len(order) == 1:
        return [Branch(0, order)]
    alike = [common(rows[a], rows[b]) for a, b in itertools.pairwise(order)]
    least = min(alike)
    whole = Branch(min(least, min(len(rows[i]) for i in order) - 1), order)
    if depth == DEEPEST:
        return [whole]
    pieces: list[list[int]] = [[order[0]]]
    for i, n in zip(order[1:], alike, strict=True):
        if n == least:
            pieces.append([])
        pieces[-1].append(i)
    parts = [branch for piece in pieces for branch in _split(rows, piece, depth + 1)]
    return [whole] if whole.n * (len(order) - 1) >= saving(parts) else parts


def common(a: Ids, b: Ids) -> int:
    """How many first tokens two rows share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def together(found: Sequence[Branch], batch_size: int) -> Iterator[list[Branch]]:
    """Branches that run as one batch: of one n, at most `batch_size` rows."""
    some: list[Branch] = []
    for one in sorted(found, key=lambda one: one.n):
        if some and (one.n != some[0].n or sum(len(each.rows) for each in some) + len(one.rows) > batch_size):
            yield some
            some = []
        some.append(one)
    if some:
        yield some


@torch.no_grad()
def branched(
    model: Model, rows: Sequence[Ids], reads: Sequence[Reads], some: Sequence[Branch], read: Read
) -> Iterator[tuple[int, Tensor]]:
    """(place, what is read of that row [read, 2]) of branches of one n; `read` takes logits, (row, position, token) and the
    place of each one's row."""
    n, places = some[0].n, [i for one in some for i in one.rows]
    of = [at for at, one in enumerate(some) for _ in one.rows]
    first = min((position for i in places for position, _ in reads[i] if position < n), default=n - 1)
    device = model.device
    rest = [list(rows[i][n:]) for i in places]
    width = max(map(len, rest))
    padded = torch.tensor([[*ids, *[ids[-1]] * (width - len(ids))] for ids in rest], device=device)
    with Session(model, (), model.active_edits(), whole=True):
        beginnings = torch.tensor([list(rows[one.rows[0]][:n]) for one in some], device=device)
        before, cache = started(model, beginnings, n - first)
        after = continued_from(model, cache, torch.tensor(of, device=device), padded)
    asked = [(at, k, position, token) for at, i in enumerate(places) for k, (position, token) in enumerate(reads[i])]
    found = [torch.zeros(len(reads[i]), 2, dtype=torch.float64) for i in places]
    for logits, start, there in (
        (before, first, [(of[at], at, k, p, token) for at, k, p, token in asked if p < n]),
        (after, n, [(at, at, k, p, token) for at, k, p, token in asked if p >= n]),
    ):
        if there:
            flat = [(row, p - start, token) for row, _, _, p, token in there]
            values = read(logits, flat, [places[at] for _, at, *_ in there])
            for (_, at, k, _, _), value in zip(there, values, strict=True):
                found[at][k] = value
    yield from zip(places, found, strict=True)

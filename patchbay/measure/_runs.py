"""The one place where meters run a model: log-probabilities of tokens of rows, batched by length, padded on the right.

A row is a prompt and what follows it; positions of edits count in the prompt, so that an edit at its last token acts there, however
long the answer is. Rows are run in order of their lengths, as many at a time as `batch_size` and memory allow, and the
numbers do not depend on either. What rows begin with alike is run once where that pays (`_packed.py`, `_branches.py`). Log-probabilities are float32 log-softmaxes (or better), returned in float64.

`shared()` keeps the streams of every batch for a block: a meter called again under edits (`model.edited`) then starts from
the first layer that they edit, and all that stands below is run once (`_restarted.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from patchbay.measure._branches import branched, together
from patchbay.measure._packed import packed, ways
from patchbay.measure._restarted import Restarted
from patchbay.model.model import Model
from patchbay.model.regime import regimes
from patchbay.model.run import run_rows
from patchbay.signal.port import PatchbayError

Ids = Sequence[int]
Reads = Sequence[tuple[int, int]]  # (position, token): log p(token | the row up to and with that position)
ROOM = 2**26  # logits of a batch
KEPT = 2**28  # numbers that `shared` keeps

_SHARED: ContextVar[dict[Any, Restarted] | None] = ContextVar("shared", default=None)


@contextmanager
def shared() -> Iterator[None]:
    """What meters run without edits in this block is kept, and starts their runs under edits."""
    token = _SHARED.set({})
    try:
        yield
    finally:
        _SHARED.reset(token)


def comparing() -> bool:
    """Whether meters are called to be compared with one another: their values alone are wanted, and no null, interval or p of each."""
    return _SHARED.get() is not None


def token_logprobs(
    model: Model,
    rows: Sequence[Ids],
    reads: Sequence[Reads] | None = None,
    starts: Sequence[int] | None = None,
    *,
    best: bool = False,
    batch_size: int = 32,
) -> list[Tensor]:
    """Of each row, log p in nats of what `reads` asks, [read]; without it, of every token but the first given those before it. With
    `best`, beside each that of the likeliest token, [read, 2].

    `starts`: how many tokens of each row are its prompt, for edits that count from the prompt's end; without, the whole row."""
    refuse_by_row(model)
    reads = [[(at, row[at + 1]) for at in range(len(row) - 1)] for row in rows] if reads is None else reads
    starts = [len(row) for row in rows] if starts is None else starts
    found: list[Tensor] = [torch.zeros((0, 2) if best else 0, dtype=torch.float64)] * len(rows)
    trees, alike, others = ways(model, rows, reads, batch_size) if _SHARED.get() is None else ([], [], range(len(rows)))
    room = min(batch_size * max(map(len, rows), default=1), ROOM // model.vocab_size)
    for i, values in packed(model, reads, trees, room, _read):
        found[i] = values if best else values[:, 0]
    for branches in together(alike, batch_size):
        for i, values in branched(model, rows, reads, branches, _read):
            found[i] = values if best else values[:, 0]
    for some in batches(model, rows, batch_size, others):
        logits = _logits(model, [list(rows[i]) for i in some], [starts[i] for i in some])
        flat = [(at, position, token) for at, i in enumerate(some) for position, token in reads[i]]
        if not flat:
            continue
        values = _read(logits, flat, [some[at] for at, *_ in flat])  # [read, 2]
        values = values if best else values[:, 0]
        for i, own in zip(some, values.split([len(reads[i]) for i in some]), strict=True):
            found[i] = own
    return found


def distributions(
    model: Model, rows: Sequence[Ids], places: Sequence[Sequence[int]] | None = None, *, batch_size: int = 32
) -> list[Tensor]:
    """Of each row, log p in nats of every token after the tokens at its `places`, [place, vocab]; without, after its last one."""
    refuse_by_row(model)
    places = [[len(row) - 1] for row in rows] if places is None else places
    found: list[Tensor] = [torch.zeros(0, model.vocab_size, dtype=torch.float64)] * len(rows)
    for some in batches(model, rows, batch_size):
        logits = _logits(model, [list(rows[i]) for i in some], [len(rows[i]) for i in some])
        for at, i in enumerate(some):
            seen = logits[at, list(places[i])]
            _refuse_nan(seen, [i] * len(seen))
            found[i] = seen.double().log_softmax(-1).cpu()
    return found


def batches(
    model: Model, rows: Sequence[Ids], batch_size: int, places: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Places of rows that run together, of like lengths and one regime; of all rows, or of those at `places`."""
    if batch_size < 1:
        raise PatchbayError(f"batch_size={batch_size}: at least one prompt is run at a time")
    order = sorted(
        range(len(rows)) if places is None else places, key=lambda i: (len(rows[i]), tuple(rows[i]))
    )  # the same rows make the same batches
    own = regimes(model, map(len, rows))
    some: list[int] = []
    for i in order:
        full = len(some) >= batch_size or (len(some) + 1) * len(rows[i]) * model.vocab_size > ROOM
        if some and (full or own[len(rows[i])] != own[len(rows[some[0]])]):
            yield some
            some = []
        some.append(i)
    if some:
        yield some


def refuse_by_row(model: Model) -> None:
    """A meter runs its items in batches of its own: edits that name rows would fall on others."""
    edit = next((edit for edit in model.active_edits() if edit.by_row), None)
    if edit is not None:
        raise PatchbayError(
            f"{edit} treats prompts by their place in a batch, and a meter runs its items in batches of its own: "
            "give an edit that is the same for all"
        )


def _logits(model: Model, rows: list[list[int]], starts: list[int]) -> Tensor:
    """[row, position, vocab], under the edits that are in force."""
    kept = _SHARED.get()
    if kept is None:
        return run_rows(model, rows, starts).logits
    edits = model.active_edits()
    key = (id(model.hf), tuple(map(tuple, rows)), tuple(starts))
    if key not in kept and model._session is None and sum(one.n_numbers for one in kept.values()) < KEPT:
        kept[key] = Restarted(model, rows, last=False, starts=starts)
    ready = kept.get(key)
    if ready is None or (edits and (ready.base is None or any(edit.port.signal == "logits" for edit in edits))):
        return run_rows(model, rows, starts).logits
    if model._session is not None:
        model._session.runs += 1  # its edits are made, of layers called one by one
    return ready.logits(edits)


def _read(logits: Tensor, flat: Sequence[tuple[int, int, int]], of: Sequence[int]) -> Tensor:
    """Log-probabilities [read, 2] of (row of the batch, position, token) and of the likeliest token there, a block at a time; `of`: the
    place of each one's row, for messages. A place that several tokens are read at is gone over once."""
    row, position, token = torch.tensor(flat, device=logits.device).T
    spots, at = (row * logits.shape[1] + position).unique(return_inverse=True)
    step = max(1, 2**24 // logits.shape[-1])
    highest, totals = [], []
    for start in range(0, len(spots), step):
        seen = logits.flatten(0, 1)[spots[start : start + step]]  # [spot, vocab]
        seen = seen if seen.dtype == torch.float64 else seen.float()
        best = seen.amax(-1)
        highest.append(best)
        totals.append(best + (seen - best[:, None]).exp_().sum(-1).log())  # [spot]; NaN where any logit is
    best, total = torch.cat(highest)[at], torch.cat(totals)[at]
    _refuse_nan(total[:, None], of)
    own = logits[row, position, token]
    own = own if own.dtype == torch.float64 else own.float()
    return torch.stack([own - total, best - total], 1).double().cpu()  # equal where the token is the likeliest


def _refuse_nan(seen: Tensor, rows: Sequence[int]) -> None:
    """Raise PatchbayError where logits [read, vocab] of these rows are no numbers."""
    if bool(seen.isnan().any()):
        at = rows[int(seen.isnan().any(-1).nonzero()[0])]
        raise PatchbayError(f"row {at}: the model gives logits that are no numbers (NaN), so nothing can be scored")

"""Scores of one batch of cells: by the restarted walk, or by whole runs where rows of a model cannot restart."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from patchbay.edits.apply import apply, row_mask
from patchbay.jacks.session import Session
from patchbay.signal.positions import Batch, chosen
from patchbay.sweeps.calls import Base
from patchbay.sweeps.difference import Difference
from patchbay.sweeps.plan import LATE, Cell, for_one
from patchbay.sweeps.scorer import Scorer
from patchbay.sweeps.walk import Walk

LOGITS = 20_000_000  # that are scored at a time
ROWS = 32  # whole runs at a time


@torch.no_grad()
def by_walk(
    base: Base,
    cells: Sequence[Cell],
    prompts: Tensor,
    scorer: Scorer,
    *,
    bf16: bool = False,
    difference: Difference | None = None,
) -> Tensor:
    """Scores [cell, prompt]. `prompts`: the places of the base run's prompts among all."""
    norm = base.model.final_norm_module
    with torch.autocast(base.ids.device.type, torch.bfloat16) if bf16 else nullcontext():
        walk = Walk(base, cells, base.n_positions - 1, difference=difference)
        walk.run()
    place = {cell.index: i for i, cell in enumerate(cells)}
    block = torch.full((len(cells), len(prompts)), float("nan"))
    late = [cell for cell in cells if any(edit.port.signal in LATE for edit in cell.edits)]
    for cell_of, prompt, x in walk.results():
        rows = torch.tensor([place[index] for index in cell_of])
        scores = []
        for some in torch.arange(len(rows)).split(max(1, LOGITS // scorer.width)):
            owners, of = [cell_of[i] for i in some.tolist()], prompt[some]
            normed = _edited_late(base, late, owners, of, norm(x[some]), "final_norm")
            logits = _edited_late(base, late, owners, of, scorer.logits(normed, every=bool(late)), "logits")
            scores.append(scorer.score(logits, prompts[of], every=bool(late)).float().cpu())
        block[rows, prompt] = torch.cat(scores)
    return block


def _edited_late(
    base: Base, late: Sequence[Cell], owners: Sequence[int], prompt: Tensor, x: Tensor, signal: str
) -> Tensor:
    """Edits of the final norm's output or the logits, at the read position of the rows that have them: x [row, d], the cell
    that owns each row and the prompt of each."""
    lengths = torch.full((len(base.ids),), base.n_positions)
    batch = Batch(base.ids, lengths, lengths, base.model)
    for cell in late:
        rows = torch.tensor([row for row, owner in enumerate(owners) if owner == cell.index])
        for edit in (edit for edit in cell.edits if edit.port.signal == signal and len(rows)):
            ordinal = chosen(edit.positions, batch, what=str(edit))[:, -1:][prompt[rows]]
            row = row_mask(edit, len(base.ids))[prompt[rows]]
            x = x.clone()
            x[rows] = apply(edit, x[rows][:, None], ordinal.to(x.device), row.to(x.device))[:, 0]
    return x


@torch.no_grad()
def by_whole_runs(base: Base, cells: Sequence[Cell], prompts: Tensor, scorer: Scorer) -> Tensor:
    """The same by runs of the whole model, rows batched."""
    model, ids, n = base.model, base.ids, len(base.ids)
    pairs = [(cell, prompt) for cell in cells for prompt in range(n)]
    out = []
    for i in range(0, len(pairs), ROWS):
        some = pairs[i : i + ROWS]
        of = [prompt for _, prompt in some]
        edits = [for_one(edit, row, prompt, n) for row, (cell, prompt) in enumerate(some) for edit in cell.edits]
        with Session(model, (), edits):
            logits = scorer.read(model.hf(input_ids=ids[of], use_cache=False).logits)
        out.append(scorer.score(scorer.columns(logits), prompts[of]).float().cpu())
    return torch.cat(out).view(len(cells), n)

"""Movers: the measurements behind `name_mover_heads`, which `inhibition_heads` uses too to choose the movers it watches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchbay import maths
from patchbay.find._direct import by_head, by_source, grid, head_layers, own_place, places, precise, read_at_z, reading
from patchbay.model.model import Model
from patchbay.model.run import Trace, run
from patchbay.signal.port import PatchbayError, Port
from patchbay.tasks.task import Task


@dataclass
class Moved:
    """Prompt by prompt [prompt, layer, head]: logits by source, attention by source, and whether the head copies."""

    right: Tensor  # logits from the places of the right answer
    wrong: Tensor  # from those of the wrong answers
    elsewhere: Tensor  # from as many places as the right one has, mean of all others but the first
    attention: Tensor
    attention_wrong: Tensor
    attention_first: Tensor
    without_first: (
        Tensor  # attention to the right answer, of what is not paid to the first token; NaN where that is all
    )
    copies: Tensor  # 1.0 where the right token is among the `top` that the head's write raises most

    def p(self) -> Tensor:
        """p [layer, head] that the answer's places give no more than other places."""
        return maths.sign_flip_p(self.right - self.elsewhere, floor=1e-6)


def moved(model: Model, task: Task, what: str, *, top: int, batch_size: int) -> Moved:
    """Measure all heads on all prompts."""
    task.check(model.vocab_size)
    layers = head_layers(model, what)
    encoded = model.encode(task)
    lacking = [
        i for i, (ids, right) in enumerate(zip(encoded, task.right, strict=True)) if right not in ids
    ]  # a mover needs something to move
    if lacking:
        raise PatchbayError(
            f"{what}: {len(lacking)} of {len(encoded)} prompts do not contain their right answer (first: prompt {lacking[0]}), "
            "so no head can move it; use a task whose answer is said before, such as indirect_object or laundry_list"
        )
    taps = [Port("resid_out", model.n_layers - 1), Port("final_norm")]
    for i in layers:
        taps += [Port(signal, i) for signal in ("attn.z", "attn.v", "attn.out")]
        taps.append(Port("attn.pattern", i, None, (-1,)))
    pieces = []
    for start in range(0, len(task), batch_size):
        piece = task[start : start + batch_size]
        trace = run(model, encoded[start : start + batch_size], taps=taps, logits="last")
        pieces.append(_measure(model, piece, encoded[start : start + batch_size], trace, layers, top))
    return Moved(*(torch.cat([piece[k] for piece in pieces]) for k in range(len(pieces[0]))))


def _measure(model: Model, task: Task, ids: list[list[int]], trace: Trace, layers: list[int], top: int) -> list[Tensor]:
    """The fields of `Moved` on a few prompts."""
    right = places(model, ids, [(token,) for token in task.right])  # [prompt, key]
    wrong = places(model, ids, list(task.wrong)) & ~right
    real = torch.arange(right.shape[1]) < trace.lengths[:, None]
    first = torch.zeros_like(right)
    first[:, 0] = True
    other = real & ~right & ~wrong & ~first
    share = right.sum(1) / other.sum(1).clamp_min(1)  # [prompt]
    towards = reading(model, task, trace)
    columns: list[list[Tensor]] = [[] for _ in range(8)]
    for i in layers:
        given, paid = by_source(model, trace, i, read_at_z(model, trace, i, towards))  # [prompt, head, key]
        right_paid, first_paid = _sum(paid, right), _sum(paid, first)
        rest = (paid.sum(-1) - first_paid).clamp_min(0.0)  # a row may sum to less or more than 1
        free = _sum(paid, right & ~first) / torch.where(rest > 1e-6, rest, torch.nan)
        written = by_head(model, i, precise(trace[Port("attn.v", i)]))  # [prompt, head, key, d_z]
        rows, keys = right.nonzero(as_tuple=True)
        outs = torch.einsum("nhd,hdm->nhm", written[rows, :, keys], precise(model.W_O(i)))
        copied = (own_place(model, i, outs, torch.tensor(task.right)[rows]) < top).double()  # [place, head]
        mean = torch.zeros(len(ids), copied.shape[1], dtype=torch.float64).index_add_(0, rows, copied)
        found = [_sum(given, right), _sum(given, wrong), _sum(given, other) * share[:, None]]
        found += [right_paid, _sum(paid, wrong), first_paid, free, mean / right.sum(1, keepdim=True)]
        for column, value in zip(columns, found, strict=True):
            column.append(value)
    return [grid(model, layers, column) for column in columns]


def _sum(values: Tensor, where: Tensor) -> Tensor:
    """[prompt, head, key] summed over some keys [prompt, key]."""
    return (values * where[:, None]).sum(-1)


def best_movers(model: Model, task: Task, what: str, *, n: int, batch_size: int) -> list[tuple[int, int, float, float]]:
    """Up to `n` heads (layer, head, logits, adjusted p) that move most, those at adjusted p <= 0.05; else the best alone."""
    seen = moved(model, task, what, top=5, batch_size=batch_size)
    score, adjusted = seen.right.mean(0), maths.benjamini_hochberg(seen.p())
    order = score.flatten().nan_to_num(-torch.inf).argsort(descending=True, stable=True).tolist()
    rows = [(*divmod(at, score.shape[1]), float(score.flatten()[at]), float(adjusted.flatten()[at])) for at in order]
    return [row for row in rows[:n] if row[2] > 0 and row[3] <= 0.05] or rows[:1]

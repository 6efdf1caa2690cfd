"""Cells: what the maps of this folder share. Intervals and p values of every cell at once, and pairs of runs to
compare.

A cell is one entry of a map (a layer and a position, a head, an edge); its values are one number per prompt, NaN where
a prompt has no such place. Every function gives, cell by cell, what `maths` gives for one list: percentile bootstraps
over prompts (the same draws for all cells) and exact or sampled sign flips. A share is a ratio of two means, numerator
and denominator drawn together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from patchbay.maths import benjamini_hochberg
from patchbay.model import Model
from patchbay.port import PatchbayError
from patchbay.result import Result
from patchbay.task import Task

WORSE_WHEN_HIGHER = ("rank", "kl")
ROOM = 2**22  # numbers held at a time


# --- prompts ------------------------------------------------------------------------------------------


def check_twins(model: Model, task: Task) -> None:
    """Raise PatchbayError unless each prompt has a corrupted twin of its own length, of tokens that the model knows."""
    task.check(model.vocab_size)
    if task.corrupted is None:
        raise PatchbayError(
            f"task {task.name} has no corrupted twins, and patching needs two runs: make the task with corrupted=, "
            "or take parts away with prove.ablation"
        )
    pairs = enumerate(zip(task.clean, task.corrupted, strict=True))
    uneven = [f"{i} ({len(a)} and {len(b)} tokens)" for i, (a, b) in pairs if len(a) != len(b)]
    if uneven:
        raise PatchbayError(
            f"task {task.name}: {len(uneven)} twins differ from their prompts in length: {', '.join(uneven[:5])}; "
            "patching puts a signal at the position where it was: give twins of equal length"
        )


def batches(task: Task, size: int) -> Iterator[list[int]]:
    """Prompts of one length, at most `size` at a time."""
    if size < 1:
        raise PatchbayError(f"batch_size={size}: at least one prompt is run at a time")
    for length in sorted({len(ids) for ids in task.clean}):
        same = [i for i, ids in enumerate(task.clean) if len(ids) == length]
        yield from (same[start : start + size] for start in range(0, len(same), size))


def held_out(task: Task, ranking: object) -> tuple[Task, list[str]]:
    """The task without the prompts on which a Result ranked its parts, where at least two others remain, and a note."""
    if not isinstance(ranking, Result):
        return task, []
    record = ranking.provenance.get("task") or {}
    used = {tuple(ids) for ids in record.get("clean", ())}
    left = [i for i, ids in enumerate(task.clean) if ids not in used]
    n_used = len(task) - len(left)
    if not n_used:
        return task, []
    if len(left) < 2:
        return task, [
            f"the parts were ranked on {n_used} of these {len(task)} prompts and nothing is held out: rank on one half "
            "of task.split() and prove on the other"
        ]
    return task[left], [f"the {n_used} prompts on which the parts were ranked are left out: {len(left)} remain"]


def sign_of(task: Task) -> float:
    """1 where a higher score is better, -1 for rank and kl."""
    return -1.0 if task.metric in WORSE_WHEN_HIGHER else 1.0


# --- statistics ---------------------------------------------------------------------------------------


def intervals(
    values: Tensor, over: Tensor | None = None, *, n: int = 2000, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, low and high [*cell] of values [prompt, *cell]; with `over` [prompt], mean(values) / mean(over) each time.

    NaN where no prompt has a value; low and high also where only one prompt was given. A mean of 0 below gives NaN.
    """
    count, shape = len(values), values.shape[1:]
    flat = values.detach().double().cpu().reshape(count, -1)  # [prompt, cell]
    below = torch.ones(count, dtype=torch.float64) if over is None else over.detach().double().cpu()
    drawn = torch.randint(count, (n, count), generator=torch.Generator().manual_seed(seed))
    times = torch.zeros(n, count, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(n, count, dtype=torch.float64))
    once = torch.ones(1, count, dtype=torch.float64)
    step = max(1, ROOM // n)
    means, ends = [], []
    for start in range(0, flat.shape[1], step):
        piece = flat[:, start : start + step]
        means.append(_ratio(once, piece, below)[0])
        ends.append(
            torch.nanquantile(_ratio(times, piece, below), torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
        )
    low, high = torch.cat(ends, 1) if ends else flat.new_zeros(2, 0)
    if count == 1:
        low, high = torch.full_like(low, torch.nan), torch.full_like(high, torch.nan)
    mean = torch.cat(means) if means else flat.new_zeros(0)
    return mean.reshape(shape), low.reshape(shape), high.reshape(shape)


def _ratio(times: Tensor, values: Tensor, below: Tensor) -> Tensor:
    """Weighted sums of values over those of `below`, [draw, cell]; prompts without a value count on neither side."""
    has = (~values.isnan()).double()
    bottom = times @ (has * below[:, None])
    return (times @ values.nan_to_num(0.0)) / torch.where(bottom == 0, torch.nan, bottom)


def sign_flip_p(values: Tensor, *, floor: float = 0.0, n: int = 10_000, seed: int = 0) -> Tensor:
    """Two-sided p [*cell] that the mean of values [prompt, *cell] is 0, by flipping signs prompt by prompt.

    Values no larger than `floor` are rounding and count as 0. Exact up to `n` patterns of signs, else sampled as in
    `maths.permutation_p`.
    """
    count, shape = len(values), values.shape[1:]
    flat = values.detach().double().cpu().reshape(count, -1)
    empty = flat.isnan().all(0)
    flat = flat.nan_to_num(0.0)
    flat = torch.where(flat.abs() <= floor, 0.0, flat)
    if 2**count <= n:
        signs = 1.0 - 2.0 * ((torch.arange(2**count)[:, None] >> torch.arange(count)) & 1).double()  # [pattern, prompt]
    else:
        generator = torch.Generator().manual_seed(seed)
        signs = 1.0 - 2.0 * torch.randint(2, (n, count), generator=generator).double()
    observed = flat.sum(0).abs() - 1e-9 * flat.abs().sum(0)  # sums in another order still count as equal
    step = max(1, ROOM // len(signs))
    hits = [
        ((signs @ flat[:, i : i + step]).abs() >= observed[i : i + step]).sum(0) for i in range(0, flat.shape[1], step)
    ]
    found = torch.cat(hits).double() if hits else flat.new_zeros(0)
    p = found / len(signs) if 2**count <= n else (1 + found) / (1 + n)
    return p.masked_fill(empty, torch.nan).reshape(shape)


def rounding(*scores: Tensor) -> float:
    """How large a difference of such scores may be and still be rounding in single precision."""
    return 2e-6 * max(float(score.abs().max()) for score in scores)


def p_values(values: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """p [*cell] of each cell, and p adjusted for how many cells were tested (Benjamini-Hochberg)."""
    p = sign_flip_p(values, floor=floor)
    return p, benjamini_hochberg(p)


def listed(parts: Sequence[object], most: int = 6) -> str:
    """`L0.H1, L1.H2, ...`"""
    return ", ".join(map(str, parts[:most])) + (", ..." if len(parts) > most else "")

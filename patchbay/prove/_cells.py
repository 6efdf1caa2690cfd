"""Cells: what the maps of this folder share. Intervals and p values of every cell at once, and pairs of runs to
compare.

A cell is one entry of a map (a layer and a position, a head, an edge); its values are one number per prompt, NaN where
a prompt has no such place. Every function gives, cell by cell, what `maths` gives for one list: percentile bootstraps
over prompts (the same draws for all cells) and exact or sampled sign flips. A share is a ratio of two means, numerator
and denominator drawn together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from patchbay.maths import benjamini_hochberg, between, intervals, sign_flip_p
from patchbay.model.given import by_length
from patchbay.model.model import Model
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.sweeps.settings import in_turn
from patchbay.tasks.task import Task

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


def batches(task: Task, size: int) -> list[list[int]]:
    """Prompts of one length, at most `size` at a time."""
    return by_length(task.clean, size)


def swept_batches(task: Task, size: int) -> Iterator[list[int]]:
    """The same where each has a sweep of its own: its share of all is that of its tokens."""
    parts = batches(task, size)
    return in_turn(parts, [sum(len(task.clean[prompt]) for prompt in part) for part in parts])


def at_end(logits: Tensor) -> Tensor:
    """Logits [prompt, vocab] at the end of prompts of one length, from those or from logits of all positions."""
    return logits if logits.ndim == 2 else logits[:, -1]


def check_draws(draws: int) -> None:
    if draws < 1:
        raise PatchbayError(f"draws={draws}: a proof needs random controls, at least 1")


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


# --- statistics ---------------------------------------------------------------------------------------


def rounding(*scores: Tensor) -> float:
    """How large a difference of such scores may be and still be rounding in single precision."""
    return 2e-6 * max(float(score.abs().max()) for score in scores)


def p_values(values: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """p [*cell] of each cell, and p adjusted for how many cells were tested (Benjamini-Hochberg)."""
    p = sign_flip_p(values, floor=floor)
    return p, benjamini_hochberg(p)


def ends(
    name: str, interval: Iterable[float | Tensor], unit: str
) -> dict[str, tuple[float | Tensor, tuple[str, ...], str]]:
    """A mean and its ends as the variables `name`, `name_low` and `name_high`."""
    return {name + end: (value, (), unit) for end, value in zip(("", "_low", "_high"), interval, strict=True)}


def doubtful(gap: Tensor, unit: str) -> str | None:
    """The mean gap [prompt] between two runs in words where it is not clearly above 0, so that a share of it means little."""
    mean, low, high = (float(end) for end in intervals(gap[:, None]))
    if low > 0.0 or (len(gap) == 1 and mean > 0.0):
        return None
    return f"{mean:.3g} {unit}{between(low, high)}"


def listed(parts: Sequence[object], most: int = 6) -> str:
    """`L0.H1, L1.H2, ...`"""
    return ", ".join(map(str, parts[:most])) + (", ..." if len(parts) > most else "")

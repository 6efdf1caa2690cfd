"""First order: gradients of a task's score along the line between two runs, and how well an estimate agrees with the truth.

A first-order effect is (clean - corrupted) . d score / d signal: what the score would lose if it were linear in the
signal. With `steps` m the gradient is the mean over m runs whose embeddings lie on the line from one run's to the
other's, at k / m of the way for k = 1..m (Hanna et al. 2024): the last is the run that is patched, and with one step
it is the only one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits import edit
from patchbay.model.model import Model
from patchbay.model.run import Trace, run
from patchbay.signal.port import PatchbayError, Port
from patchbay.tasks.task import Task

SMOOTH = ("logit_diff", "probability", "log_probability", "kl")


def check_smooth(task: Task, steps: int, way: str = "noising", *, everywhere: bool = False) -> None:
    """Raise PatchbayError where the task's metric has no gradient to go by; a function shows in its run whether it has.

    `everywhere`: whether the method can score logits of all positions, as a function may ask."""
    if steps < 1:
        raise PatchbayError(f"steps={steps}: the gradient is the mean of at least 1 run")
    if callable(task.metric):
        if task.reads == "all" and not everywhere:
            raise PatchbayError(
                f"the metric {task.metric_name} reads all positions and this reads the last; possible: prove.attribution_patching, "
                "pb.sweep, or a function of logits [prompt, vocab]"
            )
        return
    if task.metric not in SMOOTH:
        raise PatchbayError(
            f"the metric {task.metric} has no gradient; possible are {', '.join(SMOOTH)} or a function: task.with_metric(...)"
        )
    if task.metric == "kl" and steps == 1 and way == "noising":
        raise PatchbayError(
            "kl is at its lowest in the clean run, where its gradient is 0: take steps=5 or more, or another metric"
        )


def two_runs(task: Task, way: str = "noising") -> tuple[list[list[int]], list[list[int]]]:
    """The prompts that are patched, and those whose values are put in."""
    clean, corrupted = ([list(ids) for ids in side] for side in (task.clean, task.corrupted or ()))
    return (corrupted, clean) if way == "denoising" else (clean, corrupted)


def along(
    model: Model, task: Task, taps: Sequence[Port], steps: int, way: str = "noising"
) -> Iterator[tuple[Trace, Tensor]]:
    """Runs with a graph, and the sum of their prompts' scores: `steps` of them, towards the run that is patched."""
    here, there = two_runs(task, way)
    place = Port("embed")
    ends = [run(model, ids, taps=[place], logits="last")[place] for ids in (there, here)] if steps > 1 else []
    reference = run(model, task, logits="last").last_logits if task.metric == "kl" else None
    for k in range(1, steps + 1):
        edits = [edit.replace(place, torch.lerp(ends[0], ends[1], k / steps))] if k < steps else []
        trace = run(model, here, taps=taps, edits=edits, logits=task.reads, grad=True)
        with torch.enable_grad():  # whatever the caller's mode
            score = task.score(trace.read(task.reads), reference).sum()
        if not score.requires_grad:
            raise PatchbayError(
                f"the metric {task.metric_name} has no gradient: what it returns does not hang on the logits by a graph; write it "
                "in torch without .detach(), .item(), argmax or comparisons"
            )
        yield trace, score


def agreement(estimate: Tensor, exact: Tensor, floor: float) -> tuple[float, float, int]:
    """Spearman's correlation; the share of the k largest exact effects among the k largest estimates, either sign; and k.

    k is a tenth of those that have both, at least 1 and no more than have an exact effect. Values no larger than `floor` are
    rounding and count as 0: an estimate of 0 points at nothing, and of equal ones each is among the largest in part.
    """
    both = ~(estimate.isnan() | exact.isnan())
    estimate, exact = (torch.where(x.abs() <= floor, 0.0, x)[both] for x in (estimate, exact))
    if not len(exact):
        return float("nan"), float("nan"), 0
    k = min(max(1, round(len(exact) / 10)), int((exact != 0).sum()))
    if not k:
        return maths.spearman(estimate, exact), float("nan"), 0
    shared = float((_among(estimate.abs(), k) * _among(exact.abs(), k)).sum())
    return maths.spearman(estimate, exact), shared / k, k


def _among(sizes: Tensor, k: int) -> Tensor:
    """How far each is among the k largest, 0 to 1: of equal ones at the edge each in part; those of size 0 are not."""
    last = sizes.sort(descending=True).values[k - 1]
    above, equal = sizes > last, (sizes == last) & (sizes > 0)
    return above.double() + equal.double() * (k - int(above.sum())) / max(1, int(equal.sum()))


def agreed(
    estimate: Tensor, exact: Tensor, floor: float, what: str
) -> tuple[dict[str, tuple[Tensor | float, tuple[str, ...], str]], str]:
    """How far estimates agree with exact effects, NaN where none was measured: as scalar variables, and in words."""
    rho, overlap, k = agreement(estimate.flatten(), exact.flatten(), floor)
    n = int((~exact.isnan()).sum())
    values: dict[str, tuple[Tensor | float, tuple[str, ...], str]]
    values = {"spearman": (rho, (), "correlation"), "overlap": (overlap, (), f"share of {what}")}
    if not k:
        return values, f"against {n} {what} patched exactly: none of them has an effect"
    return values, (
        f"against {n} {what} patched exactly: Spearman {rho:.3f}; {overlap:.0%} of the {k} largest exact effects are among the {k} "
        f"largest estimates (by chance {k / max(n, 1):.0%})"
    )

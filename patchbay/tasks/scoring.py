"""Scores: a task's metric at the end of each prompt, by name or by a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from patchbay.errors import PatchbayError, said
from patchbay.tasks.answers import continuations, steps_of

if TYPE_CHECKING:
    from torch import Tensor

METRICS = {
    "logit_diff": "logits",
    "logit_diff_best": "logits",
    "probability": "probability",
    "log_probability": "nats",
    "rank": "rank",
    "accuracy": "share of prompts",
    "option_accuracy": "share of prompts",
    "kl": "nats",
}
"""Metric -> unit. All but rank and kl are better when higher; rank is 0 at the top.

`logit_diff` compares the right answer with the MEAN of the wrong ones, as circuits are measured; `logit_diff_best` with the best of
them, which is above 0 where the right one wins. `option_accuracy` asks whether it wins among the options, as benchmarks of several
choices do; `accuracy` whether it wins over the whole vocabulary.
"""
COMPARING = ("logit_diff", "logit_diff_best", "option_accuracy")
"""Metrics that need a wrong answer for every prompt."""

COMPARED = {
    "logit_diff": "right less the mean of the wrong",
    "logit_diff_best": "right less the best of the wrong",
    "option_accuracy": "right above all of the wrong",
}
"""What they compare, in the words that stand beneath a Result."""

Metric = str | Callable[..., Any]
"""A name of METRICS, or a function of (logits [row, vocab] at the last position, prompt of each row [row]) -> [row].

With an attribute `tokens` (ids) it gets only these columns, in that order, and costs no more than a named metric; with an attribute
`positions = "all"` it gets logits [row, position, vocab]. `unit` names its unit.
"""


def score(task: Any, logits: Tensor, reference: Tensor | None = None) -> Tensor:
    """What `Task.score` documents."""
    import torch

    if not hasattr(logits, "ndim"):
        raise PatchbayError(f"score takes logits [prompt, vocab], got {said(logits)}")
    if callable(task.metric):
        return _own(task, task.metric, logits)
    if task.answers:
        return _whole(task, logits, reference)
    from patchbay import maths

    if logits.ndim != 2 or len(logits) != len(task):
        raise PatchbayError(
            f"task {task.name}: needs logits [prompt, vocab] of {len(task)} prompts, got shape {tuple(logits.shape)}"
        )
    task.check(logits.shape[1])
    if task.metric == "kl":
        if reference is None:
            raise PatchbayError(f"task {task.name}: kl compares two runs; pass the unedited run's logits as reference=")
        return maths.kl(reference, logits)
    right = torch.tensor(task.right, device=logits.device)
    if task.metric in COMPARING:
        widest = max(len(ids) for ids in task.wrong)
        padded = torch.tensor([ids + (-1,) * (widest - len(ids)) for ids in task.wrong], device=logits.device)
        compare = {"logit_diff": maths.logit_diff, "logit_diff_best": maths.logit_diff_best}
        return compare.get(task.metric, maths.accuracy)(logits, right, padded)  # wrong: [prompt, n_wrong]
    if task.metric == "accuracy":
        return maths.accuracy(logits, right)
    measure = {"probability": maths.probability, "log_probability": maths.log_probability, "rank": maths.rank}
    return measure[task.metric](logits, right)


ELSEWHERE = (
    "; possible where the model is run whole: pb.sweep, prove.ablation, prove.knockout_curve, prove.activation_patching, "
    "prove.attribution_patching, prove.path_patching, prove.cross_model_patching, prove.channel, or score of a whole run's"
)


def _own(task: Any, metric: Callable[..., Any], logits: Tensor) -> Tensor:
    """A metric that is a function, on the logits that it asks for."""
    import torch

    everywhere = getattr(metric, "positions", None) == "all"
    if logits.ndim != 2 + everywhere or len(logits) != len(task):
        axes = "[prompt, position, vocab]" if everywhere else "[prompt, vocab]"
        raise PatchbayError(
            f"task {task.name}: the metric {task.metric_name} reads logits {axes} of {len(task)} prompts, got shape "
            f"{tuple(logits.shape)}" + (ELSEWHERE if everywhere else "")
        )
    tokens = getattr(metric, "tokens", None)
    kept = logits if tokens is None else logits[..., torch.as_tensor(tokens, device=logits.device)]
    values = metric(kept, torch.tensor(task.places))
    if getattr(values, "shape", None) != (len(task),):
        raise PatchbayError(f"the metric {task.metric_name} gives one number for each row, got {_shape(values)}")
    return values  # type: ignore[no-any-return]


def _whole(task: Any, logits: Tensor, reference: Tensor | None) -> Tensor:
    """Metrics of whole answers from the logits of `continuations`, [continuation, vocab]."""
    import torch

    from patchbay import maths

    steps = steps_of(task.clean, task.answers)
    rows, at = continuations(steps)
    if logits.ndim != 2 or len(logits) != len(rows):
        raise PatchbayError(
            f"task {task.name} has answers of several tokens: score reads logits [continuation, vocab] of the {len(rows)} "
            f"task.continuations, got shape {tuple(logits.shape)}. Possible: pb.sweep, or task.steps() in any method"
        )
    task.check(logits.shape[1])
    if task.metric == "kl":
        if reference is None:
            raise PatchbayError(f"task {task.name}: kl compares two runs; pass the unedited run's logits as reference=")
        first = [at[i] for i, step in enumerate(steps) if step.answer == step.place == 0]
        return maths.kl(reference[first], logits[first])
    targets = torch.tensor([step.target for step in steps], device=logits.device)
    if task.metric == "accuracy":
        won = maths.accuracy(logits[at], targets)
        return torch.stack([won[[s.prompt == i and s.answer == 0 for s in steps]].amin() for i in range(len(task))])
    return task.of_steps(maths.log_probability(logits[at], targets))


def _shape(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if hasattr(value, "shape") else type(value).__name__

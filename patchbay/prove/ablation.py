"""Ablation: what is lost without these parts, against random parts of the same layers.

    effect(parts) = mean over prompts of score(model) - score(model without the parts)

in the task's unit, turned round for rank and kl, where more is worse: positive means that the model needs the parts. A part is
taken away at all positions at once, by its main signal (z of a head, activation of a neuron, output of an expert, of
attention or of an MLP; values of a key/value group):

- zero: the signal is 0;
- mean: its mean over the positions of all prompts of the task;
- resample: what it was on the corrupted twin, position by position; where the task has no twins of equal length, on
  another of its prompts, the two lined up at their ends (before its start, its first position again).

The parts are taken away together, and one by one. A draw of the control takes away as many other parts of the same kinds
in the same layers; where a layer has too few others, they come from any layer; for features, others of their dictionary that are active on these
prompts about as often. No two draws are the same, so a small model
may have fewer than were asked. `p` = (1 + draws that cost as much or more) / (1 + draws): with 20 it is at least 0.048. Intervals are 95 % bootstraps over prompts; `difference` is the joint effect
minus the mean of the draws, prompt by prompt, and its interval is against one more random draw: prompts and draws both vary. All runs go through the model as rows of shared batches:
(2 + n_parts + draws) forward passes.

The intervention is the usual one (Wang et al. 2022, "Interpretability in the Wild"; the random controls as in Wu et al.
2024, "Retrieval Head"). Single effects near 0 beside a large joint one mean that the parts stand in for one another. An effect
shows that the parts matter on these prompts, not what they do; zero and mean also take the stream where it never is.
"""

from __future__ import annotations

from torch import Tensor

from patchbay import maths
from patchbay.errors import one_of
from patchbay.model.model import Model
from patchbay.prove._cells import check_draws, ends, listed
from patchbay.prove._removal import WAYS, By, Set, activity, given_parts, measured, random_sets, too_few
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part
from patchbay.tasks.task import Task


@method(paper="wang2022")
def ablation(
    model: Model,
    task: Task,
    parts: Result | list[Part] | Part,
    *,
    by: By = "mean",
    top: int | None = None,
    draws: int = 20,
    batch_size: int = 64,
    seed: int = 0,
) -> Result:
    """The effect of taking `parts` away by `by`, together and one by one, against `draws` random sets of the same layers.

    `parts`: parts or their text ("L1.H2,L3.H0"), or a Result that ranks parts, of which the first `top` are taken.
    Main variable `effect` [part] with `low` and `high`; `joint`, `difference` and their ends, `p`, `random` [draw], `score`
    (nothing taken away), and the shares of right answers `accuracy`, `accuracy_joint` and `accuracy_random` [draw].

    `by`: what stands in the parts' place: "zero", their "mean" over the task, or "resample", their values on the twin.
    `top`: how many of the parts are taken; a Result needs it. `draws`: random sets of other parts that are taken away
    beside it.
    """
    one_of("by", by, WAYS)
    check_draws(draws)
    chosen = given_parts(parts, top, "take away")
    for part in chosen:
        model.require(part.port())
    active = activity(model, task, chosen, batch_size)
    sets = random_sets(model, chosen, draws, seed, active)
    conditions: list[Set] = [(), tuple(chosen), *((part,) for part in chosen), *sets]
    scores, right = measured(model, task, conditions, by, batch_size, seed)  # each [condition, prompt]
    lost = task.sign * (scores[0] - scores[1:])  # [condition, prompt]: together, one by one, drawn
    single, drawn = lost[1 : 1 + len(chosen)], lost[1 + len(chosen) :]
    joint, singles = maths.bootstrap_interval(lost[0]), [maths.bootstrap_interval(row) for row in single]
    difference, means = maths.beyond_draws(lost[0], drawn), drawn.mean(1)
    p = maths.draws_p(joint.mean, means)
    return Result(
        {
            "effect": ([one.mean for one in singles], ("part",), task.unit),
            "low": ([one.low for one in singles], ("part",), task.unit),
            "high": ([one.high for one in singles], ("part",), task.unit),
            "random": (means, ("draw",), task.unit),
            **ends("joint", joint, task.unit),
            **ends("difference", difference, task.unit),
            "score": (scores[0].mean(), (), task.unit),
            "p": (p, (), "probability"),
            "accuracy": (right[0].mean(), (), "share of prompts"),
            "accuracy_joint": (right[1].mean(), (), "share of prompts"),
            "accuracy_random": (right[2 + len(chosen) :].mean(1), ("draw",), "share of prompts"),
        },
        parts=chosen,
        notes=_notes(task, chosen, sets, draws, joint, difference, means, p)
        + ["random features are active on these prompts, about as often as those given"] * bool(active),
        tables={"random_parts": [{"draw": i, "parts": [str(p) for p in drawn]} for i, drawn in enumerate(sets)]},
    )


def _notes(
    task: Task,
    chosen: list[Part],
    sets: list[Set],
    draws: int,
    joint: maths.Interval,
    gap: maths.Interval,
    means: Tensor,
    p: float,
) -> list[str]:
    unit = task.unit
    notes = [
        f"without {listed(chosen)} together: {joint.mean:.3g} {unit} lost{maths.between(joint.low, joint.high)}; without "
        f"random ones {means.mean().item():.3g} (draws {means.min().item():.3g} to {means.max().item():.3g}); "
        f"difference {gap.mean:.3g}{maths.between(gap.low, gap.high, said='')}, p = {p:.3g}"
    ]
    notes += too_few(sets, draws)
    home = {(part.kind, part.layer) for part in chosen}
    if any((part.kind, part.layer) not in home for drawn in sets for part in drawn):
        notes.append("some random parts are from other layers: the layers of the given parts have too few others")
    return notes

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
in the same layers; where a layer has too few others, they come from any layer. No two draws are the same, so a small model
may have fewer than were asked. `p` = (1 + draws that cost as much or more) / (1 + draws): with 20 it is at least 0.048. Intervals are 95 % bootstraps over prompts; `difference` is the joint effect
minus the mean of the draws, paired prompt by prompt. All runs go through the model as rows of shared batches:
(2 + n_parts + draws) forward passes.

The intervention is the usual one (Wang et al. 2022, "Interpretability in the Wild"; the random controls as in Wu et al.
2024, "Retrieval Head"). Single effects near 0 beside a large joint one mean that the parts stand in for one another. An effect
shows that the parts matter on these prompts, not what they do; zero and mean also take the stream where it never is.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from patchbay import edit, maths
from patchbay.edit import Edit
from patchbay.method import method
from patchbay.model import Model
from patchbay.port import Part, PatchbayError, Port
from patchbay.result import Result
from patchbay.run import run
from patchbay.task import Task

By = Literal["zero", "mean", "resample"]
WAYS = ("zero", "mean", "resample")
WORSE_WHEN_HIGHER = ("rank", "kl")
Set = tuple[Part, ...]


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
    """
    chosen = _chosen(model, parts, by, top, draws)
    sets = _random_sets(model, chosen, draws, seed)
    conditions: list[Set] = [(), tuple(chosen), *((part,) for part in chosen), *sets]
    scores, right = _measure(model, task, conditions, by, batch_size, seed)  # each [condition, prompt]
    sign = -1.0 if task.metric in WORSE_WHEN_HIGHER else 1.0
    lost = sign * (scores[0] - scores[1:])  # [condition, prompt]: together, one by one, drawn
    single, drawn = lost[1 : 1 + len(chosen)], lost[1 + len(chosen) :]
    joint, singles = maths.bootstrap_interval(lost[0]), [maths.bootstrap_interval(row) for row in single]
    difference = maths.paired_interval(lost[0], drawn.mean(0))
    means = drawn.mean(1)
    p = (1 + int((means >= joint.mean - 1e-9).sum())) / (1 + len(sets))
    ends = zip(("joint", "difference"), (joint, difference), strict=True)
    return Result(
        {
            "effect": ([one.mean for one in singles], ("part",), task.unit),
            "low": ([one.low for one in singles], ("part",), task.unit),
            "high": ([one.high for one in singles], ("part",), task.unit),
            "random": (means, ("draw",), task.unit),
            **{
                f"{n}{end}": (v, (), task.unit)
                for n, i in ends
                for end, v in zip(("", "_low", "_high"), i, strict=True)
            },
            "score": (scores[0].mean(), (), task.unit),
            "p": (p, (), "probability"),
            "accuracy": (right[0].mean(), (), "share of prompts"),
            "accuracy_joint": (right[1].mean(), (), "share of prompts"),
            "accuracy_random": (right[2 + len(chosen) :].mean(1), ("draw",), "share of prompts"),
        },
        parts=chosen,
        notes=_notes(task, chosen, sets, draws, joint, difference, means, p),
        tables={"random_parts": [{"draw": i, "parts": [str(p) for p in drawn]} for i, drawn in enumerate(sets)]},
    )


# --- the parts ------------------------------------------------------------------------------------


def _chosen(model: Model, parts: Result | list[Part] | Part, by: str, top: int | None, draws: int) -> list[Part]:
    """The parts to take away, each one once and each one there."""
    if by not in WAYS:
        raise PatchbayError(f"by={by!r}; possible are {', '.join(WAYS)}")
    if draws < 1:
        raise PatchbayError(f"draws={draws}: a proof needs random controls, at least 1")
    if isinstance(parts, Result):
        if top is None:
            raise PatchbayError("parts is a Result: say how many of its parts, top=3, or pass result.top(3)")
        parts = parts.top(top)
    listed = [parts] if isinstance(parts, Part) else list(parts)[:top]
    if not listed:
        raise PatchbayError("no parts to take away were given")
    for part in listed:
        model.require(part.port())
    return list(dict.fromkeys(listed))


def _others(model: Model, kind: str, layer: int, without: set[Part]) -> list[Part]:
    """Parts of that kind in that layer that were not chosen."""
    if Part(layer, kind, None).port().signal not in model.signals(layer):
        return []
    if kind in ("attn", "mlp"):
        every = [Part(layer, kind)]
    else:
        count = {"head": model.n_heads, "group": model.n_groups, "neuron": model.n_neurons, "expert": model.n_experts}[
            kind
        ]
        every = [Part(layer, kind, i) for i in range(count(layer))]
    return [part for part in every if part not in without]


def _random_sets(model: Model, chosen: list[Part], draws: int, seed: int) -> list[Set]:
    """Up to `draws` different sets of as many other parts, of the same kinds, of the same layers where these have enough."""
    rng, without = random.Random(f"ablation-{seed}"), set(chosen)
    places = sorted({(part.kind, part.layer or 0) for part in chosen})
    sets: dict[Set, None] = {}
    for _ in range(20 * draws):
        drawn: list[Part] = []
        for kind, layer in places:
            n = sum((part.kind, part.layer) == (kind, layer) for part in chosen)
            pool = _others(model, kind, layer, without | set(drawn))
            if len(pool) < n:
                pool = [part for i in range(model.n_layers) for part in _others(model, kind, i, without | set(drawn))]
            if len(pool) < n:
                raise PatchbayError(
                    f"{sum(part.kind == kind for part in chosen)} parts of kind {kind} were given, and the model has too few "
                    "others for a random control of as many; give fewer"
                )
            drawn += rng.sample(pool, n)
        sets[tuple(sorted(drawn))] = None
        if len(sets) == draws:
            break
    return list(sets)


# --- the runs -------------------------------------------------------------------------------------


def _measure(
    model: Model, task: Task, conditions: Sequence[Set], by: By, batch_size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Score and rightness of every prompt without each condition's parts: two times [condition, prompt]."""
    task.check(model.vocab_size)
    needed = [{part.port() for part in parts} for parts in conditions]
    ports = sorted(set().union(*needed))
    means = _means(model, task, ports, batch_size) if by == "mean" else {}
    twins = _twins(task, seed) if by == "resample" else ()
    scores, right = torch.zeros(2, len(conditions), len(task), dtype=torch.float64)
    for prompts, which in _batches(task, len(conditions), batch_size):
        taken = {port: rows for port in ports if (rows := [i for i, at in enumerate(which) if port in needed[at]])}
        donors = _donors(model, task, prompts, twins, list(taken)) if by == "resample" and taken else {}
        edits = [_edit(port, by, rows, means, donors) for port, rows in taken.items()]
        trace = run(model, [list(task.clean[i]) for i in prompts], edits=edits, logits="last")
        some, logits = task[prompts], trace.last_logits
        reference = run(model, some, logits="last").last_logits if task.metric == "kl" else None
        scores[which, prompts] = some.score(logits, reference).double().cpu()
        right[which, prompts] = some.with_metric("accuracy").score(logits).double().cpu()
    return scores, right


def _batches(task: Task, n_conditions: int, size: int) -> Iterator[tuple[list[int], list[int]]]:
    """(prompt, condition) of the rows of each batch; all prompts of a batch have one length, so that nothing is padded."""
    for length in sorted({len(ids) for ids in task.clean}):
        rows = [(i, c) for i, ids in enumerate(task.clean) if len(ids) == length for c in range(n_conditions)]
        for start in range(0, len(rows), size):
            prompts, which = zip(*rows[start : start + size], strict=True)
            yield list(prompts), list(which)


def _edit(port: Port, by: By, rows: list[int], means: dict[Port, Tensor], donors: dict[Port, Tensor]) -> Edit:
    if by == "zero":
        return edit.zero(port, rows=rows)
    if by == "mean":
        return edit.mean(port, means[port], rows=rows)
    return edit.replace(port, donors[port][rows], rows=rows)  # [row, position, ...]


def _means(model: Model, task: Task, ports: Sequence[Port], batch_size: int) -> dict[Port, Tensor]:
    """Each signal's mean over the positions of all prompts, [...feature]."""
    sums, count = dict.fromkeys(ports, torch.zeros(())), sum(map(len, task.clean))
    for start in range(0, len(task), batch_size):
        trace = run(model, task[start : start + batch_size], taps=ports, logits="last")
        for port in ports:
            sums[port] = sums[port] + _by_position(trace[port], port).double().nansum((0, 1)).cpu()
    return {port: (total / count).float() for port, total in sums.items()}


def _twins(task: Task, seed: int) -> tuple[tuple[int, ...], ...]:
    """The prompt from which each prompt's signals are taken: its corrupted twin, or another prompt of the task."""
    if task.corrupted is not None and task.options.get("aligned", True):
        return task.corrupted
    if len(task) < 2:
        raise PatchbayError(
            f"resample needs corrupted twins of equal length, or a second prompt; task {task.name} has neither"
        )
    order = list(range(len(task)))
    random.Random(f"ablation-twins-{seed}").shuffle(order)
    after = dict(zip(order, [*order[1:], order[0]], strict=True))
    return tuple(task.clean[after[i]] for i in range(len(task)))


def _donors(
    model: Model, task: Task, prompts: list[int], twins: Sequence[Sequence[int]], ports: list[Port]
) -> dict[Port, Tensor]:
    """Signals of each row's twin, lined up with the row's prompt at the end: [row, position, ...feature]."""
    unique = list(dict.fromkeys(prompts))
    trace = run(model, [list(twins[i]) for i in unique], taps=ports, logits="last")
    rows = torch.tensor([unique.index(i) for i in prompts])[:, None]  # [row, 1]
    n = len(task.clean[prompts[0]])
    place = (trace.lengths[rows] - n + torch.arange(n)).clamp_min(0)  # [row, position]
    return {port: _by_position(trace[port], port)[rows, place] for port in ports}


def _by_position(signal: Tensor, port: Port) -> Tensor:
    """[prompt, position, ...feature], the axes in which edits take values."""
    return signal.movedim(next(i for i, axis in enumerate(port.axes) if axis in ("position", "query", "key")), 1)


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
    together = f"{', '.join(map(str, chosen[:6]))}{', ...' if len(chosen) > 6 else ''}"
    notes = [
        f"without {together} together: {joint.mean:.3g} {unit} lost (95 % {joint.low:.3g} to {joint.high:.3g}); without "
        f"random ones {means.mean().item():.3g} (draws {means.min().item():.3g} to {means.max().item():.3g}); "
        f"difference {gap.mean:.3g} ({gap.low:.3g} to {gap.high:.3g}), p = {p:.3g}"
    ]
    if len(sets) < draws:
        notes.append(
            f"{draws} draws were asked; {len(sets)} different random sets were found: there are few other parts"
        )
    home = {(part.kind, part.layer) for part in chosen}
    if any((part.kind, part.layer) not in home for drawn in sets for part in drawn):
        notes.append("some random parts are from other layers: the layers of the given parts have too few others")
    return notes

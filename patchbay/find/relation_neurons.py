"""Relation neurons: neurons whose activation tells one relation's prompts from all others'.

    AP[relation, neuron] = average precision of the neuron's activation as a score for "this prompt asks for the relation"

with prompts of equal activation (a ReLU's zeros) counted as every order of them would on average. A neuron's activation
on a prompt is that of the port `act` (what the down projection multiplies; in a gated MLP gate times up) at its last
token, or pooled over its tokens. Entities are split at random into halves: AP is found on one, and `held_out` is the same
on the other, so that a neuron that knows certain subjects is not taken for one that knows a relation. Null: random orders
of as many prompts, `null_mean` and `null_high` (99th percentile) for each relation; `p` is the share of random orders
with an AP as high (ties only narrow it), adjusted over all neurons and relations (Benjamini and Hochberg). Prompts count
as independent, and p is of one relation: without `relation` it is the smallest of as many as there are, and `p_adjusted`, over
all of them, is the one to read. Several wordings of one pair of relation and entity make p too small, `held_out` stays fair.

Then the first `shares` of all neurons of each relation (of equal AP, those whose mean activation differs most) are set to 0 at all positions, on prompts of held-out entities:

    change[deactivated, measured, share] = mean of log p(right answer) without them - with them, on the measured relation

against `DRAWS` sets of as many other random neurons of the same layers (`random`, with `random_low` and `random_high`, the
lowest and highest draw; `z`, the change less their mean over their spread; `p_change` of
Student's t, z / sqrt(1 + 1 / DRAWS) with DRAWS - 1 degrees of freedom, two-sided, and adjusted); `accuracy_change` and `accuracy_random` are the same in accuracy, the paper's measure, which does
not move where a model is sure. Three claims of the paper are read off it: cumulative (the
diagonal falls as the share grows: `cumulative`, its rank correlation), versatile (relations share neurons: `overlap`
against `overlap_null`; other relations fall too), interfering (another relation rises above its random sets).

Liu et al. 2025, "On Relation-Specific Neurons in Large Language Models". The paper also leaves out neurons that chance
controls pick, for which the held-out half stands here; it scores the gate of gated MLPs.

A high AP says that a neuron goes along with the relation's wording; that answers need it, only the curves say.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits import edit
from patchbay.edits.edit import Edit
from patchbay.errors import one_of
from patchbay.find._groups import Groups, groups_of, label_of
from patchbay.find._neurons import POOLS, Pool, activations, neuron_layers
from patchbay.find._statistics import average_precision, random_average_precision, student_p
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port
from patchbay.tasks.task import Task

DRAWS = 10  # random sets of neurons for every deactivated one
ORDERS = 20_000  # random orders of prompts in the null of AP
TILE = 4096  # neurons ranked at a time
NAME = "relation_neurons"


@method(paper="liu2025b", unit="average precision")
def relation_neurons(
    model: Model,
    task: Task,
    *,
    labels: Sequence[str] = ("relation", "subject"),
    relation: str | None = None,
    pool: Pool = "last",
    shares: Sequence[float] = (0.01, 0.03, 0.05, 0.1),
    batch_size: int = 32,
    seed: int = 0,
) -> Result:
    """Average precision of every neuron for `relation` (without: for the relation it is best at), and what it costs
    to switch the best neurons of each relation off.

    `labels`: the task's labels that name each prompt's relation and its entity. Main variable `average_precision`
    [layer, neuron] with `held_out`, `p`, `p_adjusted`, `difference` and `relation` (its number in `condition`); `each` [condition,
    layer, neuron] for all relations. With `shares`: `change` with `change_low`, `change_high`, `random`, `random_low`,
    `random_high`, `z`, `p_change`, `p_change_adjusted` [edit, condition, n_parts], `overlap` [edit, condition],
    `overlap_null`, `cumulative` [edit], `accuracy` [condition].

    `relation`: the relation that ranks the neurons; without, each neuron's best. `pool`: how a neuron's activations
    over a prompt become one number: last, mean, max, median. `shares`: shares of all neurons that are switched off,
    from 0 to 1.
    """
    one_of("pool", pool, POOLS)
    groups, found, unseen = _split(model, task, labels, seed)
    layers, notes = neuron_layers(model, NAME)
    names = groups.names
    if relation is not None and relation not in names:
        raise PatchbayError(
            f"{NAME}: no relation {relation!r} among the values of {labels[0]!r}: {', '.join(names[:12])}"
        )
    counts = _counts(model, shares, layers)
    seen = activations(model, groups.prompts, layers, pool, batch_size)  # [prompt, layer, neuron]
    each, p, held_out = _score(seen, groups, found, seed)  # [relation, layer, neuron]
    apart = torch.stack([_difference(seen[found], groups.members(name)[found]) for name in names])
    adjusted = maths.benjamini_hochberg(p)
    best = each.nan_to_num(-1.0).argmax(0) if relation is None else torch.full(each.shape[1:], names.index(relation))
    grid = ("layer", "neuron")

    def of_best(values: Tensor) -> Tensor:
        return values.gather(0, best[None])[0]

    real = each[0].isfinite()
    values: dict[str, Any] = {
        "average_precision": (of_best(each), grid, "average precision"),
        "held_out": (of_best(held_out), grid, "average precision"),
        "p": (of_best(p), grid, "probability"),
        "p_adjusted": (of_best(adjusted), grid, "probability"),
        "difference": (of_best(apart), grid, "activation"),
        "relation": (best.double().where(real, torch.nan), grid, "number of the relation"),
        "each": (each, ("condition", *grid), "average precision"),
    }
    values |= _null(groups, found, seed)
    coords: dict[str, Sequence[Any]] = {"condition": names}
    if counts:
        ranked = [_ranking(each[i], apart[i]) for i in range(len(names))]
        trial = Trial(model, task, groups, unseen, ranked, counts, layers, batch_size, seed)
        values |= _curves(trial, int(real.sum()))
        coords |= {"edit": names, "n_parts": counts}
        notes += _claims(trial, values)
    notes.insert(0, f"found on {int(found.sum())} prompts, tested on {int(unseen.sum())} of other entities")
    return Result(values, coords=coords, notes=notes)


# --- prompts ----------------------------------------------------------------------------------------


def _split(model: Model, task: Task, labels: Sequence[str], seed: int) -> tuple[Groups, Tensor, Tensor]:
    """The prompts by relation, and which of them find and which test: halves without an entity in common."""
    if isinstance(labels, str) or len(labels) != 2:
        raise PatchbayError(f"{NAME}: labels names two labels of the task, of relation and entity; got {labels!r}")
    groups = groups_of(model, task, labels[0], NAME)
    entities = label_of(task, labels[1], NAME)
    order = sorted(set(entities))
    random.Random(f"{NAME}-{seed}").shuffle(order)
    counts = torch.zeros(2, len(groups.names))
    half: dict[str, int] = {}
    for entity in order:  # to the half that has had less of this entity's relations
        has = torch.zeros(len(groups.names))
        for i, own in enumerate(entities):
            if own == entity:
                has[groups.of[i]] += 1
        half[entity] = int((counts @ has).argmin())
        counts[half[entity]] += has
    if not bool((counts > 0).all()):
        poor = groups.names[int((counts == 0).nonzero()[0, 1])]
        raise PatchbayError(
            f"{NAME}: relation {poor!r} has prompts of one half of the entities only: each relation needs two entities or "
            f"more ({len(order)} values of {labels[1]!r} in {len(task)} prompts)"
        )
    found = torch.tensor([half[entity] == 0 for entity in entities])
    return groups, found, ~found


def _counts(model: Model, shares: Sequence[float], layers: Sequence[int]) -> list[int]:
    """Shares of all neurons as numbers of neurons, each once."""
    if isinstance(shares, str) or not all(0.0 < share <= 0.5 for share in shares):
        raise PatchbayError(f"{NAME}: shares={shares!r}: shares of all neurons above 0 and up to 0.5; none: no curves")
    total = sum(model.n_neurons(i) for i in layers)
    return sorted({max(1, round(share * total)) for share in shares})


# --- scores -----------------------------------------------------------------------------------------


def _score(seen: Tensor, groups: Groups, found: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """AP and its p on the finding half, and AP on the other, for each relation: [relation, layer, neuron]."""
    flat = seen.flatten(1)  # [prompt, layer * neuron]
    real = flat.isfinite().all(0)
    out = torch.full((3, len(groups.names), flat.shape[1]), torch.nan, dtype=torch.float64)
    for i, name in enumerate(groups.names):
        for row, half in ((0, found), (2, ~found)):
            positive, scores = groups.members(name)[half], flat[half][:, real].T  # [neuron, prompt]
            pieces = [average_precision(scores[at : at + TILE], positive) for at in range(0, len(scores), TILE)]
            out[row, i, real] = torch.cat(pieces)
        null = _random_orders(groups, found, name, seed)
        below = torch.searchsorted(null, out[0, i, real] - 1e-9)  # equal up to rounding counts as high
        out[1, i, real] = (1.0 + (len(null) - below).double()) / (1 + len(null))
    each, p, held_out = out.unflatten(2, seen.shape[1:])
    return each, p, held_out


def _random_orders(groups: Groups, found: Tensor, name: str, seed: int) -> Tensor:
    return random_average_precision(int(found.sum()), int(groups.members(name)[found].sum()), ORDERS, seed)


def _null(groups: Groups, found: Tensor, seed: int) -> dict[str, Any]:
    """Mean and 99th percentile of AP over random orders of the finding half, for each relation."""
    nulls = torch.stack([_random_orders(groups, found, name, seed) for name in groups.names])  # [relation, order]
    return {
        "null_mean": (nulls.mean(1), ("condition",), "average precision"),
        "null_high": (nulls.quantile(0.99, dim=1), ("condition",), "average precision"),
    }


def _difference(seen: Tensor, positive: Tensor) -> Tensor:
    """Mean activation on the relation's prompts less that on all others, [layer, neuron]."""
    return (seen[positive].mean(0) - seen[~positive].mean(0)).double()


def _ranking(scores: Tensor, apart: Tensor) -> list[tuple[int, int]]:
    """(layer, neuron) from the highest AP down; of equal AP, first those whose activation differs most."""
    flat = scores.flatten().nan_to_num(-1.0)
    order = apart.flatten().nan_to_num(-torch.inf).argsort(descending=True, stable=True)
    order = order[(flat[order] * 1e9).round().argsort(descending=True, stable=True)]  # equal up to rounding
    return [divmod(place, scores.shape[1]) for place in order[: int(scores.isfinite().sum())].tolist()]


# --- curves -----------------------------------------------------------------------------------------


class Trial(NamedTuple):
    """What the curves are made of: the ranked neurons of each relation, and the prompts they are tested on."""

    model: Model
    task: Task
    groups: Groups
    unseen: Tensor
    ranked: list[list[tuple[int, int]]]
    counts: list[int]
    layers: list[int]
    batch_size: int
    seed: int

    def answers(self, off: Sequence[tuple[int, int]]) -> Tensor:
        """Log-probability of the right answer and 1.0 where it is on top, without these neurons: [2, held-out prompt]."""
        test = self.task[self.unseen.nonzero()[:, 0].tolist()]
        edits = switched_off(self.model, off)
        out = run(self.model, test, edits=edits, logits="last", batch_size=self.batch_size).last_logits
        right = torch.tensor(test.right, device=out.device)
        both = torch.stack([maths.log_probability(out, right), maths.accuracy(out, right)])
        return both.double().cpu()

    def by_relation(self, values: Tensor) -> Tensor:
        """Mean over the held-out prompts of each relation: [..., held-out prompt] -> [..., relation]."""
        of = self.groups.of[self.unseen]
        return torch.stack([values[..., of == i].mean(-1) for i in range(len(self.groups.names))], -1)

    def random_set(self, off: Sequence[tuple[int, int]], draw: int) -> list[tuple[int, int]]:
        """As many random other neurons of the same layers; any of them where a layer has too few others."""
        rng, tested = random.Random(f"{NAME}-{self.seed}-{draw}"), set(off)
        layers, drawn = [layer for layer, _ in off], []
        for layer in self.layers:
            every, n = range(self.model.n_neurons(layer)), layers.count(layer)
            rest = [neuron for neuron in every if (layer, neuron) not in tested]
            drawn += [(layer, neuron) for neuron in rng.sample(rest if len(rest) >= n else every, n)]
        return drawn


def switched_off(model: Model, neurons: Sequence[tuple[int, int]]) -> list[Edit]:
    """One edit for each layer that has some of the neurons: they are multiplied by 0, the others by 1."""
    edits = []
    for layer in sorted({layer for layer, _ in neurons}):
        keep = torch.ones(model.n_neurons(layer))
        keep[[neuron for where, neuron in neurons if where == layer]] = 0.0
        edits.append(edit.scale(Port("mlp.act", layer), keep))
    return edits


def _curves(trial: Trial, n_neurons: int) -> dict[str, Any]:
    """Changes when more and more neurons of each relation are off, beside random ones."""
    names, counts = trial.groups.names, trial.counts
    of = trial.groups.of[trial.unseen]
    whole = trial.answers([])  # [2, prompt]
    shape = (len(names), len(names), len(counts))
    change, low, high, accuracy = (torch.full(shape, torch.nan, dtype=torch.float64) for _ in range(4))
    drawn = torch.full((DRAWS, 2, *shape), torch.nan, dtype=torch.float64)
    for i, ranked in enumerate(trial.ranked):
        for k, count in enumerate(counts):
            without = trial.answers(ranked[:count])
            accuracy[i, :, k] = trial.by_relation(without - whole)[1]
            for j in range(len(names)):
                interval = maths.paired_interval(without[0, of == j], whole[0, of == j], seed=trial.seed)
                change[i, j, k], low[i, j, k], high[i, j, k] = interval
            for draw in range(DRAWS):
                apart = trial.answers(trial.random_set(ranked[:count], draw))
                drawn[draw, :, i, :, k] = trial.by_relation(apart - whole)
    grid, nats = ("edit", "condition", "n_parts"), "nats"
    mean, spread = drawn[:, 0].mean(0), drawn[:, 0].std(0)
    z = (change - mean) / spread.clamp_min(1e-6)
    t = z / (1.0 + 1.0 / DRAWS) ** 0.5  # one more against DRAWS, whose mean and spread are estimates
    p = student_p(t, torch.tensor(DRAWS - 1.0))
    steps = torch.tensor(counts).double()
    slopes = [maths.spearman(steps, change[i, i]) if len(counts) > 1 else torch.nan for i in range(len(names))]
    share, (sure, correct) = counts[-1] / n_neurons, trial.by_relation(whole)
    return {
        "change": (change, grid, nats),
        "change_low": (low, grid, nats),
        "change_high": (high, grid, nats),
        "random": (mean, grid, nats),
        "random_low": (drawn[:, 0].amin(0), grid, nats),
        "random_high": (drawn[:, 0].amax(0), grid, nats),
        "z": (z, grid, "standard deviations"),
        "p_change": (p, grid, "probability"),
        "p_change_adjusted": (maths.benjamini_hochberg(p), grid, "probability"),
        "accuracy_change": (accuracy, grid, "share of prompts"),
        "accuracy_random": (drawn[:, 1].mean(0), grid, "share of prompts"),
        "cumulative": (torch.tensor(slopes), ("edit",), "rank correlation"),
        "overlap": (_overlap(trial), ("edit", "condition"), "Jaccard index"),
        "overlap_null": (torch.tensor(share / (2.0 - share)), (), "Jaccard index"),
        "log_probability": (sure, ("condition",), nats),
        "accuracy": (correct, ("condition",), "share of prompts"),
    }


def _overlap(trial: Trial) -> Tensor:
    """Jaccard index of the largest sets of neurons of two relations."""
    sets = [set(ranked[: trial.counts[-1]]) for ranked in trial.ranked]
    return torch.tensor([[len(a & b) / len(a | b) for b in sets] for a in sets], dtype=torch.float64)


def _claims(trial: Trial, values: dict[str, Any]) -> list[str]:
    """What the curves say of the three claims, in numbers of cells."""
    change, low, high = (values[name][0] for name in ("change", "random_low", "random_high"))
    own = torch.eye(len(change), dtype=torch.bool)
    n = f"of {int((~own).sum())} pairs of relations at the largest share"
    worst, best = (change < low)[..., -1], (change > high)[..., -1]
    return [
        f"log p falls below all {DRAWS} random sets on the deactivated relation itself in {int(worst[own].sum())} of "
        f"{len(change)}, on another in {int(worst[~own].sum())} {n}, and rises above them (interference) in "
        f"{int(best[~own].sum())}"
    ]

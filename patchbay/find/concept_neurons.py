"""Concept neurons: the functional localiser, neurons that respond more to one set of prompts than to another.

    t[layer, neuron] = (mean_A - mean_B) / sqrt(var_A / n_A + var_B / n_B)        Welch's t over prompts

of the neuron's activation, pooled over each prompt's tokens. A and B are the prompts whose `label` is `value` and all
others, or, without a label, the prompts and their corrupted twins (as two sets: pairs are not used). `p` is Student's
with Welch's degrees of freedom, two-sided, adjusted over all neurons (Benjamini and Hochberg). Four controls:

- `first` and `held_out`: t on random halves of the prompts. The `TOP` share of neurons that the first half selects
  is measured on the second (`held_out_mean`), and the two halves' selections are compared: `dice` against `dice_null`.
- shuffled groups: `null_high`, the 95th percentile over `SHUFFLES` shuffles of the largest |t| of all neurons: one
  neuron above it in 20 models without any, whatever the shape of the activations. Where a group is small, Student's p
  is too small for skewed activations: `above_null` neurons stand, and `found` may be many more.
- A against A: the prompts of A in two random halves; no neuron should be found (`found`, same).
- an untrained network of the same architecture (`control`): what the wording alone does to random weights. `found` and
  `strongest` (mean |t| of its `TOP` share) stand beside those of the model; where they are no less, training has no part
  in the selectivity.

Two forward passes over the prompts, one of them untrained.

AlKhamissi et al. 2024, "Brain-Like Language Processing via a Shallow Untrained Multihead Attention Network", after the
localiser of brain imaging: 240 sentences against 240 lists of non-words. There units are those of block outputs; here
neurons.

Selective is not needed: a neuron may follow anything that goes along with the contrast (length, a word). Match the two
sets, then `prove.ablation`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from patchbay import maths
from patchbay.errors import one_of
from patchbay.find._groups import Groups, groups_of, halves, value_of
from patchbay.find._neurons import POOLS, Pool, activations, neuron_layers
from patchbay.find._statistics import student_p, welch
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.results.untrained import untrained
from patchbay.tasks.task import Task

TOP = 0.01
SHUFFLES = 100
LEVEL = 0.05
NAME = "concept_neurons"
Control = Literal["untrained", "none"]


@method(paper="alkhamissi2024", unit="Welch's t")
def concept_neurons(
    model: Model,
    task: Task,
    *,
    label: str | None = None,
    value: str | None = None,
    pool: Pool = "mean",
    control: Control = "untrained",
    batch_size: int = 32,
    seed: int = 0,
) -> Result:
    """Welch's t of every neuron between the prompts whose `label` is `value` (without: its first) and all others.

    Without `label`: the task's prompts against their corrupted twins. Main variable `t` [layer, neuron] with `p`,
    `p_adjusted`, `difference` (of means), `first` and `held_out` (t on halves); `found` and `strongest` [condition: model,
    same, untrained]; `dice`, `dice_null`, `held_out_mean`, `null_high` and `above_null` (neurons with |t| above it).

    `label`: the task's label that makes the two groups. `value`: the label's value of the first group. `pool`: how a
    neuron's activations over a prompt become one number: last, mean, max, median. `control`: compare with an untrained
    network of the same architecture ("untrained"), or not ("none").
    """
    one_of("pool", pool, POOLS)
    one_of("control", control, ("untrained", "none"))
    layers, notes = neuron_layers(model, NAME)
    groups = groups_of(model, task, label, NAME)
    chosen = value_of(groups, value, label, NAME) or groups.names[0]
    pair = two_groups(groups, chosen)
    pair.need(4, f"{NAME} (halves have a variance too)")
    seen = activations(model, pair.prompts, layers, pool, batch_size)  # [prompt, layer, neuron]
    inside = pair.of == 0
    t, df = welch(seen[inside], seen[~inside])
    p = student_p(t, df)
    adjusted = maths.benjamini_hochberg(p)
    grid = ("layer", "neuron")
    values: dict[str, Any] = {
        "t": (t, grid, "Welch's t"),
        "p": (p, grid, "probability"),
        "p_adjusted": (adjusted, grid, "probability"),
        "difference": (seen[inside].mean(0) - seen[~inside].mean(0), grid, "activation"),
    }
    values |= _halved(seen, pair, seed)
    conditions, rows = ["model", "same"], [_strength(t, adjusted), _same(seen[inside], seed)]
    if control == "untrained":
        made = untrained(model, seed)
        if isinstance(made, Model):
            fresh = activations(made, pair.prompts, layers, pool, batch_size)
            t_fresh, df_fresh = welch(fresh[inside], fresh[~inside])
            conditions.append("untrained")
            rows.append(_strength(t_fresh, maths.benjamini_hochberg(student_p(t_fresh, df_fresh))))
        else:
            notes.append(f"no untrained control: {made}")
    for name, unit, column in (("found", "neurons", 0), ("strongest", "Welch's t", 1)):
        values[name] = (torch.tensor([row[column] for row in rows]), ("condition",), unit)
    high = _shuffled(seen, inside, seed)
    values["null_high"] = (high, (), "Welch's t")
    values["above_null"] = ((t.abs() > high).sum().double(), (), "neurons")
    notes.insert(
        0, f"{int(inside.sum())} prompts of {pair.names[0]!r} against {int((~inside).sum())} of {pair.names[1]!r}"
    )
    return Result(values, coords={"condition": conditions}, notes=notes)


def two_groups(groups: Groups, chosen: str) -> Groups:
    """The chosen group first, all other prompts as the second."""
    others = [name for name in groups.names if name != chosen]
    of = (groups.of != groups.names.index(chosen)).long()
    return Groups(groups.prompts, of, [chosen, others[0] if len(others) == 1 else "all others"])


def _strength(t: Tensor, adjusted: Tensor) -> tuple[float, float]:
    """How many neurons are found, and the mean |t| of the strongest."""
    real = t[t.isfinite()]
    return float((adjusted < LEVEL).sum()), float(real.abs().sort(descending=True).values[: _n_top(real)].mean())


def _n_top(real: Tensor) -> int:
    return max(1, round(TOP * len(real)))


def _halved(seen: Tensor, pair: Groups, seed: int) -> dict[str, Any]:
    """t on two halves of the prompts, and how far the one's selection holds on the other."""
    first = halves(pair, seed)
    scores = [welch(seen[half & (pair.of == 0)], seen[half & (pair.of == 1)])[0] for half in (first, ~first)]
    flat = [score[score.isfinite()] for score in scores]  # the same places in both: finite where there is a neuron
    n = _n_top(flat[0])
    picked = [set(score.argsort(descending=True, stable=True)[:n].tolist()) for score in flat]
    grid = ("layer", "neuron")
    return {
        "first": (scores[0], grid, "Welch's t"),
        "held_out": (scores[1], grid, "Welch's t"),
        "held_out_mean": (flat[1][sorted(picked[0])].mean(), (), "Welch's t"),
        "dice": (torch.tensor(len(picked[0] & picked[1]) / n), (), "Dice coefficient"),
        "dice_null": (torch.tensor(n / len(flat[0])), (), "Dice coefficient"),
        "reliability": (torch.tensor(maths.spearman(*flat)), (), "rank correlation"),
    }


def _same(seen: Tensor, seed: int) -> tuple[float, float]:
    """The strength of the contrast between two random halves of one group: nothing should be found."""
    order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(seed))
    half = len(seen) // 2
    t, df = welch(seen[order[:half]], seen[order[half:]])
    return _strength(t, maths.benjamini_hochberg(student_p(t, df)))


def _shuffled(seen: Tensor, inside: Tensor, seed: int) -> Tensor:
    """95th percentile of the largest |t| of all neurons when prompts are dealt to the groups at random."""
    generator = torch.Generator().manual_seed(seed)
    flat = seen.flatten(1)
    flat = flat[:, flat.isfinite().all(0)]
    dealt = torch.stack([inside[torch.randperm(len(inside), generator=generator)] for _ in range(SHUFFLES)])
    largest = []
    for some in dealt.split(max(1, 2**22 // max(1, flat.numel()))):  # [shuffle, prompt], as many at once as are small
        own, other = (flat[group.nonzero()[:, 1].reshape(len(some), -1)].movedim(1, 0) for group in (some, ~some))
        largest.append(welch(own, other)[0].abs().amax(1))
    return torch.cat(largest).quantile(0.95)

"""Knockout curve: what is lost as more and more parts are taken away together, the ranked ones against random ones.

    effect[k]  = mean over prompts of score(model) - score(model without the first k parts)
    random[k]  = the same for k random parts: a draw is one random order of parts of the same kinds and layers, place by
                 place, the ranked ones among them (attentions and MLPs, of which a layer has one: of any layer)
    singles[k] = sum of the effects of the first k parts, each taken away alone

turned round for rank and kl, where more is worse. Parts that stand in for one another show in the gap between `effect`
and `singles`: any one alone costs nothing, all together the answer. So a ranking is proved by the joint curve, not by
its single effects. `p` at k is (1 + draws that cost as much or more) / (1 + draws): were the ranking arbitrary, it
would be one draw like the others. A layer with few parts cannot give a small p at small k. `p_adjusted` holds the
share of false finds over all k. Parts are taken away as in `prove.ablation`: by zero, by their mean, or by their
values on the twin. Intervals are 95 % bootstraps over prompts. All runs are rows of shared batches: sizes * (1 +
draws) + parts forward passes.

What ranked the parts must not be what proves them: prompts on which a Result ranked them are left out where others
remain, and `order="effect"` ranks by single effects on half of the prompts and draws the curves on the other half.

Top heads against random heads as in Zhang et al. 2024, "Interpreting and Improving Large Language Models in Arithmetic
Calculation". The curve shows that the parts matter together on these prompts, not what each of them does.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from patchbay import maths
from patchbay.errors import one_of
from patchbay.model.model import Model
from patchbay.prove._cells import check_draws, held_out, intervals
from patchbay.prove._removal import WAYS, By, measured, others
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError
from patchbay.tasks.task import Task

Order = Literal["given", "effect"]
MOST = 32  # parts of a ranking that are taken when nobody says how many


@method(paper="zhang2024")
def knockout_curve(
    model: Model,
    task: Task,
    parts: Result | list[Part],
    *,
    by: By = "mean",
    sizes: list[int] | None = None,
    draws: int = 20,
    order: Order = "given",
    batch_size: int = 64,
    seed: int = 0,
) -> Result:
    """The effect of taking away the first k of `parts` together, k in `sizes`, against `draws` random orders.

    `parts`: best first, or a Result that ranks parts. `sizes`: without, every k up to 8 and then ever wider steps, to
    the end of a list, or to 32 (at most half of all parts of their kind) of a Result. `order="effect"`: rank the parts
    first by single effects on half of the prompts. Main variable `effect` [n_parts] with `low` and `high`;
    `null_mean`, `null_low`, `null_high` and `random` [draw, n_parts]; `difference` with its ends, `singles`,
    `accuracy`, `accuracy_random`, `p`, `p_adjusted`, `score`.

    `by`: what stands in the parts' place: "zero", their "mean" over the task, or "resample", their values on the twin.
    `draws`: random orders of parts of the same kinds and layers, the ranking's own among them. `order`: take the parts as "given", or by their single
    "effect" on half of the prompts.
    """
    ranked = _ranked(model, parts, sizes, by, draws, order)
    task, notes = held_out(task, parts)
    if order == "effect":
        dev, task = task.split()
        alone, _ = _lost(model, dev, [(part,) for part in ranked], by, batch_size, seed)
        ranked = [ranked[i] for i in alone.mean(1).argsort(descending=True, stable=True).tolist()]
        notes.append(f"ranked by single effects on {len(dev)} prompts, curves on the other {len(task)}")
    steps = _sizes(len(ranked), sizes)
    ranked = ranked[: steps[-1]]
    orders = _random_orders(model, ranked, draws, seed)
    curves = _curves(model, task, ranked, orders, steps, by, batch_size, seed)
    return _result(task, ranked, orders, steps, curves, notes)


# --- the parts ----------------------------------------------------------------------------------------


def _ranked(
    model: Model, parts: Result | list[Part], sizes: list[int] | None, by: str, draws: int, order: str
) -> list[Part]:
    """The parts in their order, each once, each one there."""
    one_of("by", by, WAYS)
    one_of("order", order, ("given", "effect"))
    check_draws(draws)
    if sizes is not None and (not sizes or min(sizes) < 1):
        raise PatchbayError(f"sizes={sizes}: numbers of parts, each 1 or more")
    if isinstance(parts, Result):
        most = max(sizes) if sizes else MOST
        found = parts.top(most)
        ranked = found if sizes else found[: max(1, min(most, _total(model, found) // 2))]
    else:
        ranked = list(dict.fromkeys(parts))
    if not ranked:
        raise PatchbayError("no parts to take away were given")
    if sizes and max(sizes) > len(ranked):
        raise PatchbayError(f"sizes go up to {max(sizes)}, {len(ranked)} parts were given")
    for part in ranked:
        model.require(part.port())
    return ranked


def _total(model: Model, parts: Sequence[Part]) -> int:
    """How many parts of these kinds the model has."""
    return sum(
        len(others(model, kind, i, set())) for kind in {part.kind for part in parts} for i in range(model.n_layers)
    )


def _sizes(n: int, sizes: list[int] | None) -> list[int]:
    """Every size up to 8, then steps of about a fifth, and the last."""
    if sizes is not None:
        return sorted(set(sizes))
    steps = list(range(1, min(n, 8) + 1))
    while steps[-1] < n:
        steps.append(min(n, steps[-1] + max(1, round(steps[-1] / 5))))
    return steps


def _random_orders(model: Model, ranked: list[Part], draws: int, seed: int) -> list[list[Part]]:
    """Orders of random parts, each place of the kind and layer of the ranking's (attention and MLP: of its kind)."""
    rng = random.Random(f"knockout_curve-{seed}")
    places: dict[tuple[str, int | None], list[int]] = {}
    for i, part in enumerate(ranked):
        places.setdefault((part.kind, None if part.kind in ("attn", "mlp") else part.layer), []).append(i)
    orders = []
    for _ in range(draws):
        drawn = list(ranked)
        for (kind, layer), at in places.items():
            layers = range(model.n_layers) if layer is None else (layer,)
            pool = [part for one in layers for part in others(model, kind, one, set())]
            for i, part in zip(at, rng.sample(pool, len(at)), strict=True):
                drawn[i] = part
        orders.append(drawn)
    return orders


# --- the curves ---------------------------------------------------------------------------------------


@dataclass
class Curves:
    """What is lost, prompt by prompt, and how many prompts are right, at each size."""

    score: Tensor  # [prompt]
    right: float
    joint: Tensor  # [size, prompt]
    single: Tensor  # [part, prompt]
    drawn: Tensor  # [draw, size, prompt]
    accuracy: Tensor  # [size]
    accuracy_drawn: Tensor  # [draw, size]


def _lost(
    model: Model, task: Task, sets: list[tuple[Part, ...]], by: By, batch_size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Loss [set, prompt] without each set; scores and rightness [2, 1 + set, prompt], of the plain run first."""
    scores, right = measured(model, task, [(), *sets], by, batch_size, seed)
    return task.sign * (scores[0] - scores[1:]), torch.stack([scores, right])


def _curves(
    model: Model,
    task: Task,
    ranked: list[Part],
    orders: list[list[Part]],
    steps: list[int],
    by: By,
    size: int,
    seed: int,
) -> Curves:
    """Every different set is run once."""
    top = [tuple(sorted(ranked[:k])) for k in steps]
    singles: list[tuple[Part, ...]] = [(part,) for part in ranked]
    drawn = [[tuple(sorted(order[:k])) for k in steps] for order in orders]
    every = list(dict.fromkeys([*top, *singles, *(one for row in drawn for one in row)]))
    lost, seen = _lost(model, task, every, by, size, seed)
    right = seen[1, 1:].mean(1)  # [set]
    at = {one: i for i, one in enumerate(every)}
    top_at, drawn_at = [at[one] for one in top], torch.tensor([[at[one] for one in row] for row in drawn])
    joint, single, random_ = lost[top_at], lost[[at[one] for one in singles]], lost[drawn_at]
    return Curves(seen[0, 0], float(seen[1, 0].mean()), joint, single, random_, right[top_at], right[drawn_at])


def _result(
    task: Task, ranked: list[Part], orders: list[list[Part]], steps: list[int], curves: Curves, notes: list[str]
) -> Result:
    mean, low, high = intervals(curves.joint.T)
    means = curves.drawn.mean(2)  # [draw, size]
    beside = [maths.beyond_draws(curves.joint[i], curves.drawn[:, i]) for i in range(len(steps))]
    gap, gap_low, gap_high = torch.tensor(beside, dtype=torch.float64).T
    p = (1.0 + (means >= mean - 1e-9).sum(0)) / (1.0 + len(means))
    singles = curves.single.mean(1).cumsum(0)[[k - 1 for k in steps]]
    ends = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    over, unit, share = ("n_parts",), task.unit, "share of prompts"
    named = {
        "effect": mean,
        "low": low,
        "high": high,
        "null_mean": means.mean(0),
        "null_low": ends[0],
        "null_high": ends[1],
    }
    named |= {"singles": singles}
    beyond = {
        "difference": gap,
        "difference_low": gap_low,
        "difference_high": gap_high,
    }  # another unit: not drawn beside
    at_last = [float(x[-1]) for x in (mean, low, high, singles, means.mean(0), p)]
    said = "the first {} together cost {:.3g} {}{}, one by one {:.3g} in sum, random ones {:.3g}; p = {:.3g}"
    said = said.format(steps[-1], at_last[0], unit, maths.between(at_last[1], at_last[2]), *at_last[3:])
    return Result(
        {name: (value, over, unit) for name, value in named.items()}
        | {name: (value, over, f"{unit} beyond random") for name, value in beyond.items()}
        | {"random": (means, ("draw", "n_parts"), unit)}
        | {"p": (p, over, "probability"), "p_adjusted": (maths.benjamini_hochberg(p), over, "probability")}
        | {"accuracy": (curves.accuracy, over, share), "accuracy_random": (curves.accuracy_drawn.mean(0), over, share)}
        | {"score": (curves.score.mean(), (), unit), "accuracy_whole": (curves.right, (), share)},
        coords={"n_parts": steps},
        notes=[said, *notes],
        tables={
            "ranking": [{"rank": i, "part": str(part)} for i, part in enumerate(ranked, start=1)],
            "random_parts": [{"draw": i, "parts": [str(part) for part in row]} for i, row in enumerate(orders)],
        },
    )

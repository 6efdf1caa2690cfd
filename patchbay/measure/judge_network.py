"""Judge network: whether several judges that vote are right more often than one of them.

    value = mean over items of 1 where most judges choose the right answer (ties share)

A judge is the model behind a role, a text in front of the question. With two `layers` every judge is asked again, with all votes of the first before it, and the votes of the
second count. `null`: one judge alone, mean over the judges, p by sign flips over items. `independent`: what the majority would reach if the judges
were as good and their votes had nothing to do with one another; `correlation`, the mean correlation of two judges' being right, says why it is not reached.
`kappa`: agreement of the majority with the right answers beyond chance; `kappa_judges`, of two judges, mean over pairs. One forward pass for each layer.

Zhang et al. 2023, "Wider and Deeper LLM Networks are Fairer LLM Evaluators". Higher is better. Agreement with labels is as good as the labels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from patchbay.measure import _estimates as estimates
from patchbay.measure._answers import outcomes
from patchbay.measure._asked import Asked, asked_of, picked
from patchbay.measure._items import resolved
from patchbay.measure._meter import reading
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError

SHARE = "share of items"


@method(paper="zhang2023")
def judge_network(
    model: Model,
    items: str | list[dict[str, Any]],
    roles: list[str] | tuple[str, ...],
    *,
    layers: Literal[1, 2] = 1,
    told: str = "Votes: {}\n",
    boundary: Literal["refuse", "back_up"] = "refuse",
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """How often the majority of a model's answers in several roles is right, beside one role alone.

    `independent`, `correlation`, `kappa`, `kappa_judges`, `mass` (the mean probability of all choices); `single` [prompt], the share of judges that are right; table `judges`.

    `items`: rows with the fields prompt, choices and answer. `roles`: texts that stand before the prompt, one for each judge; an empty one is the model as it
    is. `layers`: 1, or 2 to ask every judge again after all votes. `told`: how votes are told, {} where they stand.
    `boundary`: refuse a choice that the tokenizer joins with its prompt, or back_up to before it for all choices.
    """
    asked = asked_of(resolved(model, items))
    if len(roles) < 2 or isinstance(roles, str) or layers not in (1, 2) or told.count("{}") != 1:
        raise PatchbayError(
            f"roles={roles!r:.60}: two texts or more; layers={layers} is 1 or 2, told={told!r} holds {{}} once"
        )
    if not all(isinstance(prompt, str) for prompt in asked.prompts):
        raise PatchbayError("judges read texts: the items' prompts are token ids")
    votes, mass = _votes(model, asked, [list(roles)] * len(asked.prompts), boundary, seed, batch_size)  # [item, judge]
    if layers == 2:
        seen = [told.replace("{}", ", ".join(str(asked.choices[i][at]).strip() for at in row)) for i, row in enumerate(votes.tolist())]  # fmt: skip
        votes, mass = _votes(
            model, asked, [[f"{role}{text}" for role in roles] for text in seen], boundary, seed + 1, batch_size
        )
    right = torch.tensor(asked.right)
    one = (votes == right[:, None]).double()  # [item, judge]
    most = majority(votes, right, max(map(len, asked.choices)))
    numbers: dict[str, tuple[float, str]] = {"independent": (independent(one.mean(0)), SHARE)}
    numbers["mass"] = (mass, "probability")
    numbers["correlation"] = (_correlation(one), "correlation")
    size = max(map(len, asked.choices))
    numbers["kappa_judges"] = (_mean([_kappa(votes[:, i], votes[:, k], size) for i, k in itertools.combinations(range(len(roles)), 2)]), "kappa")  # fmt: skip
    numbers["kappa"] = (_kappa(votes.mode(1).values, right, size), "kappa")
    return reading(
        {"per_item": most},
        SHARE,
        better="higher",
        null_items=one.mean(1),
        more={name: (x, (), unit) for name, (x, unit) in numbers.items() if x == x},
        tables={"judges": [{"role": role or "none", "accuracy": float(one[:, i].mean())} for i, role in enumerate(roles)]},
        notes=[*asked.said, f"{len(roles)} judges in {layers} layer{'s' if layers > 1 else ''}"],
        seed=seed,
    )  # fmt: skip


def _votes(
    model: Model, asked: Asked, roles: Sequence[Sequence[str]], boundary: str, seed: int, batch_size: int
) -> tuple[Tensor, float]:
    """The place of each judge's choice, [item, judge], and the mean probability of all choices."""
    prompts = [f"{role}{prompt}" for prompt, each in zip(asked.prompts, roles, strict=True) for role in each]
    n = len(roles[0])
    choices = [each for each in asked.choices for _ in range(n)]
    where = [f"{name}, judge {k}" for name in asked.where for k in range(n)]
    found = outcomes(model, prompts, choices, where=where, boundary=boundary, batch_size=batch_size)
    return picked(found.logp, seed).view(len(asked.prompts), n), float(found.mass.mean())


def majority(votes: Tensor, right: Tensor, n_choices: int) -> Tensor:
    """1 where the right choice has the most votes, shared with those that have as many, [item]."""
    counts = torch.nn.functional.one_hot(votes, n_choices).sum(1)  # [item, choice]
    best = counts == counts.amax(1, keepdim=True)
    return best[torch.arange(len(right)), right].double() / best.sum(1)


def independent(p: Tensor) -> float:
    """How often more than half of judges are right who are right with p [judge] and independent of one another; half of them counts half."""
    ways = torch.ones(1, dtype=torch.float64)  # [number right]
    for one in p.double():
        ways = torch.cat([ways * (1 - one), torch.zeros(1)]) + torch.cat([torch.zeros(1), ways * one])
    n = len(p)
    counts = torch.arange(n + 1)
    return float((ways * ((2 * counts > n).double() + 0.5 * (2 * counts == n).double())).sum())


def _correlation(one: Tensor) -> float:
    return _mean([estimates.matthews(one[:, i], one[:, k]) for i, k in itertools.combinations(range(one.shape[1]), 2)])


def _kappa(a: Tensor, b: Tensor, size: int) -> float:
    table = torch.zeros(size, size).index_put_((a, b), torch.ones(len(a)), accumulate=True)
    return estimates.kappa(table.tolist())


def _mean(values: Sequence[float]) -> float:
    known = [x for x in values if x == x]
    return sum(known) / len(known) if known else math.nan

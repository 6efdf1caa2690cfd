"""Calibration: whether a model is right as often as it is sure of its choice.

    value = expected calibration error: the mean over items of |accuracy - confidence| by bins of equally many items

confidence is the probability of the likeliest choice among the choices. Equal confidences share a bin. The error of a perfectly
calibrated model is not 0 on few items, and its bootstrap is biased upward; so in place of an interval stands `null`, the
mean error when right answers are drawn with the model's own confidences, `null_high` its 95th percentile, and p the share of draws as
large as what was seen. Beside it: `one_bin`, |mean accuracy - mean confidence|; `area`, the mean accuracy among the i most confident over all
i; `accuracy_10`, that of the most confident tenth; `platt`, the error on one half after a logistic fit of confidences on the other;
`accuracy` and `confidence`. One forward pass.

Liang et al. 2022, "Holistic Evaluation of Language Models". Lower is better. Dividing all logits by a number changes the error and no answer: a
low one says nothing of how good the answers are.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from patchbay import maths
from patchbay.measure import _estimates as estimates
from patchbay.measure._answers import outcomes
from patchbay.measure._asked import asked_of, hit
from patchbay.measure._items import Items, resolved
from patchbay.measure._meter import reading
from patchbay.measure._runs import comparing
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError

LEAST = 20  # items
DRAWS = 500
UNIT = "probability"


@method(paper="liang2022")
def calibration(
    model: Model,
    items: Items,
    *,
    bins: int = 10,
    boundary: Literal["refuse", "back_up"] = "refuse",
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """Expected calibration error of the likeliest choice, against a perfectly calibrated model with the same confidences.

    `confident` [prompt] and `right` [prompt] are what it is made of.

    `items`: a Task, or rows with the fields prompt, choices and answer (the choice, or its place from 0). `bins`: bins of equally many
    items. `boundary`: refuse a choice that the tokenizer joins with its prompt, or back_up to before it for all choices.
    """
    asked = asked_of(resolved(model, items))
    if len(asked.prompts) < LEAST or not 1 <= bins <= len(asked.prompts):
        raise PatchbayError(
            f"{len(asked.prompts)} items in {bins} bins: a calibration error needs {LEAST} items or more, and one in each bin"
        )
    logp = outcomes(
        model, asked.prompts, asked.choices, where=asked.where, boundary=boundary, batch_size=batch_size
    ).logp
    confident = logp.nan_to_num(nan=-torch.inf).softmax(1).amax(1)
    right = hit(logp, torch.tensor(asked.right))
    value = estimates.calibration_error(confident, right, bins)
    drawn = torch.zeros(1) if comparing() else _perfect(confident, bins, seed)
    numbers = {
        "null_high": float(drawn.quantile(0.95)),
        "one_bin": abs(float((right - confident).mean())),
        "area": estimates.selective_area(confident, right),
        "accuracy_10": estimates.selective_accuracy(confident, right),
        "platt": platt(confident, right, bins, seed),
        "accuracy": float(right.mean()),
        "confidence": float(confident.mean()),
    }
    more: dict[str, Any] = {name: (x, (), UNIT) for name, x in numbers.items() if x == x}
    return reading(
        {"confident": confident, "right": right},
        UNIT,
        better="lower",
        made="calibration_error",
        null=float(drawn.mean()),
        p=maths.draws_p(value, drawn),
        interval=maths.Interval(value, float("nan"), float("nan")),
        more=more,
        notes=[*asked.said, "bootstraps of this error are biased upward: read it against null and null_high"],
        seed=seed,
    )


def _perfect(confident: Tensor, bins: int, seed: int) -> Tensor:
    """Errors of a model that is right as often as it is sure, [draw]."""
    generator = torch.Generator().manual_seed(seed)
    coins = torch.rand(DRAWS, len(confident), generator=generator, dtype=torch.float64)
    found = [estimates.calibration_error(confident, (coin < confident).double(), bins) for coin in coins]
    return torch.tensor(found, dtype=torch.float64)


def platt(confident: Tensor, right: Tensor, bins: int, seed: int) -> float:
    """The error on one half of the items when confidences are rescaled by a logistic fit on the other."""
    order = torch.randperm(len(confident), generator=torch.Generator().manual_seed(seed))
    fit, test = order[: len(order) // 2], order[len(order) // 2 :]
    if bins > len(test):
        return math.nan
    odds = confident.clamp(1e-9, 1 - 1e-9).logit()[:, None]
    bias, slope = estimates.logistic(odds[fit], right[fit])
    return estimates.calibration_error((bias + slope * odds[test, 0]).sigmoid(), right[test], bins)

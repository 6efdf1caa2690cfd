"""Incoherence: how often a question and its reverse, which have opposite answers, are not answered as such.

    value = share of pairs of which exactly one is right

A model that says one thing whatever is asked is right in one of each pair: 1. One that orders all that it is asked about is right in both or
in neither: 0. A coin: 1/2. `both`: the share right in both, with its interval (of a constant answer, 0). `null`: the
share when reverses are dealt to the questions at random, which leaves both accuracies as they are; p, how many of `DRAWS` deals give so small
a share. Choices are scored whole, so every question has an answer. One forward pass.

Qiu et al. 2023, "Are Large Language Models Temporally Grounded?" ("before" and "after" of two events). Lower is better. Coherent answers can all be
wrong: read `both` too.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from patchbay import maths
from patchbay.measure._answers import outcomes
from patchbay.measure._asked import hit, place_of
from patchbay.measure._items import resolved, rows_of, texts_only
from patchbay.measure._meter import reading
from patchbay.measure._runs import comparing
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.table import Row

DRAWS = 2000
SHARE = "share of pairs"


@method(paper="qiu2023")
def incoherence(
    model: Model,
    items: str | list[dict[str, Any]],
    *,
    boundary: Literal["refuse", "back_up"] = "refuse",
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """Share of pairs of a question and its reverse of which exactly one is answered right.

    `accuracy` and `accuracy_reverse`; `both` with its interval; by pair `right` and `right_reverse`; `mass`, the mean
    probability of all choices.

    `items`: rows with the fields prompt, reverse (the question the other way round), choices, answer and, where there are more than two choices,
    reverse_answer (of two it is the other one). `boundary`: refuse a choice that the tokenizer joins with its prompt, or back_up to
    before it for all choices.
    """
    rows, said = rows_of(
        resolved(model, items), ("prompt", "reverse", "choices", "answer"), ("reverse_answer",), lists=("choices",)
    )
    texts_only(rows, ("prompt", "reverse"))
    places = [_places(row) for row in rows]
    prompts = [row.values[side] for side in ("prompt", "reverse") for row in rows]
    where = [row.where + side for side in ("", ", reverse") for row in rows]
    choices = [row.values["choices"] for row in rows] * 2
    found = outcomes(model, prompts, choices, where=where, boundary=boundary, batch_size=batch_size)
    right = hit(found.logp, torch.tensor([place[side] for side in (0, 1) for place in places]))  # fmt: skip
    ahead, back = right[: len(rows)], right[len(rows) :]
    one = exactly_one(ahead, back)
    dealt = torch.full((1,), torch.nan) if comparing() or len(rows) < 2 else _dealt(ahead, back, seed)
    both = maths.bootstrap_interval(ahead * back, seed=seed)
    more: dict[str, Any] = {
        "both" + end: (x, (), SHARE) for end, x in zip(("", "_low", "_high"), both, strict=True) if x == x
    }
    more |= {"accuracy": (ahead.mean(), (), "share of items"), "accuracy_reverse": (back.mean(), (), "share of items")}
    more["mass"] = (found.mass.mean(), (), "probability")
    more |= {"right": (ahead, ("prompt",), "right"), "right_reverse": (back, ("prompt",), "right")}
    known = bool(dealt.isfinite().all())
    return reading(
        {"per_item": one},
        SHARE,
        better="lower",
        null=float(dealt.mean()) if known else None,
        p=maths.draws_p(-float(one.mean()), -dealt) if known else None,
        more=more,
        notes=said,
        seed=seed,
    )


def exactly_one(ahead: Tensor, back: Tensor) -> Tensor:
    """How likely exactly one of two answers is right, where equal scores share an answer."""
    return ahead * (1.0 - back) + back * (1.0 - ahead)


def _places(row: Row) -> tuple[int, int]:
    """The places of the right answer of the question and of its reverse."""
    choices = row.values["choices"]
    right = place_of(row.values["answer"], choices, row.where)
    if "reverse_answer" in row.values:
        other = place_of(row.values["reverse_answer"], choices, f"{row.where}, reverse")
    elif len(choices) == 2:
        other = 1 - right
    else:
        raise PatchbayError(f"{row.where} has {len(choices)} choices and no reverse_answer: of two it is the other one")
    if other == right:
        raise PatchbayError(f"{row.where}: the question and its reverse have the same answer {choices[right]!r}")
    return right, other


def _dealt(ahead: Tensor, back: Tensor, seed: int) -> Tensor:
    """Shares when reverses are dealt to questions at random, [draw]."""
    order = torch.rand(DRAWS, len(back), generator=torch.Generator().manual_seed(seed)).argsort(1)
    return exactly_one(ahead, back[order]).mean(1)

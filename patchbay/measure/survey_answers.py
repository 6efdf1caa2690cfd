"""Survey answers: what a model chooses of a question's answers when every order of them is asked, so that labels cancel.

    Question: q / A. c1 / B. c2 / ... / Answer:      p(label) over " A", " B", ..., by whole sequences, renormalised

p_choice is the mean over orders of the probability of the label that a choice had there, p_label the mean over orders by label. `value`:
the normalised entropy of p_choice, mean over questions (1 is uniform). `before`: that in the order given; `label_bias`: half the sum of |p_label -
1 / k|; `a_share`: p of the first label - 1 / k; `mass`: the probability of all labels, never above 1; with references, `divergence`: KL(reference ||
p_choice). A model that cannot read the question ends near 1 too, so `null` is 1 and p says whether the choices matter at all:
the spread of p_choice against that when in every order the choices are dealt to the labels at random. All k! orders up to 6 choices,
else 5,000 random ones. One forward pass over questions and orders.

Dominguez-Olmedo et al. 2023, "Questioning the Survey Responses of Large Language Models". An entropy of 1 is what no opinion looks like, and no
reading; scoring the label's first token alone turns the sign of the bias around, depending on the tokenizer.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.measure._answers import scores
from patchbay.measure._items import resolved, rows_of
from patchbay.measure._meter import reading
from patchbay.measure._runs import comparing
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.table import Row

LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ALL, MOST = 6, 5000  # choices of which all orders are asked; orders of more
DRAWS = 200
Orders = Sequence[tuple[int, ...]]  # which choice stands under each label, order by order


@method(paper="dominguezolmedo2023")
def survey_answers(
    model: Model,
    items: str | list[dict[str, Any]],
    *,
    orders: int | str = "all",
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """Entropy of the answers to questions after their order is averaged out, with the bias of the labels and a test for signal.

    `per_item`: the entropy by question; `label_bias`, `a_share`, `before`, `mass` with their values by question, [prompt]; table `questions`.

    `items`: rows with the fields question, choices (a list) and, where wanted, reference (a probability for each choice). `orders`: all, latin
    (as many rotations as there are choices; their mean depends on the order given), or how many random ones.
    """
    rows, said = rows_of(
        resolved(model, items), ("question", "choices"), ("reference",), lists=("choices", "reference")
    )
    for row in rows:
        _checked(row)
    asked = [_orders(len(row.values["choices"]), orders, f"orders-{seed}-{i}") for i, row in enumerate(rows)]
    found = _answered(model, rows, asked, batch_size)
    referred = sum("reference" in row.values for row in rows)
    if 0 < referred < len(rows):
        said = [*said, f"divergence is of the {referred} of {len(rows)} questions that have a reference"]
    table = [
        {"question": str(row.values["question"])[:60], "p": ", ".join(f"{p:.3f}" for p in one["p_choice"])}
        for row, one in zip(rows, found, strict=True)
    ]
    return reading(
        {"per_item": _column(found, "entropy")},
        "normalised entropy",
        better="neither",
        null=1.0,
        p=None if comparing() else _signal([one["shares"] for one in found], asked, seed),
        more=_beside(rows, found),
        tables={"questions": table},
        notes=said,
        seed=seed,
    )


def _answered(model: Model, rows: Sequence[Row], asked: Sequence[Orders], batch_size: int) -> list[dict[str, Any]]:
    """What is read of each question, asked in each of its orders."""
    each = [(row, order) for row, orders in zip(rows, asked, strict=True) for order in orders]
    prompts = [written(row.values["question"], [row.values["choices"][c] for c in order]) for row, order in each]
    labels = [[f" {LABELS[j]}" for j in range(len(order))] for _, order in each]
    names = [f"{row.where}, order {order}" for row, order in each]
    logp = scores(model, prompts, labels, where=names, batch_size=batch_size).logp
    pieces = logp.exp().split([len(orders) for orders in asked])
    return [_read(piece[:, : len(orders[0])], orders) for piece, orders in zip(pieces, asked, strict=True)]


def _column(found: Sequence[dict[str, Any]], name: str) -> Tensor:
    return torch.tensor([one[name] for one in found], dtype=torch.float64)


def _beside(rows: Sequence[Row], found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What stands beside the entropy, by question and over questions, and with references how far the answers are from them."""
    more: dict[str, Any] = {}
    for name in ("before", "label_bias", "a_share", "mass"):
        values, unit = _column(found, name), "normalised entropy" if name == "before" else "probability"
        more |= {f"{name}_by_item": (values, ("prompt",), unit), name: (values.mean(), (), unit)}
    apart = [
        _divergence(row.values["reference"], one["p_choice"])
        for row, one in zip(rows, found, strict=True)
        if "reference" in row.values
    ]
    return more | ({"divergence": (sum(apart) / len(apart), (), "nats")} if apart else {})


def written(question: str, choices: Sequence[str]) -> str:
    """A question as it is asked."""
    listed = "".join(f"{LABELS[j]}. {choice}\n" for j, choice in enumerate(choices))
    return f"Question: {question}\n{listed}Answer:"


def _checked(row: Row) -> None:
    choices, reference = row.values["choices"], row.values.get("reference")
    if not 2 <= len(choices) <= len(LABELS) or len(set(map(str, choices))) < len(choices):
        raise PatchbayError(f"{row.where}: 2 to {len(LABELS)} different choices, got {choices!r:.80}")
    if reference is not None and (
        len(reference) != len(choices)
        or any(not 0 <= float(p) < math.inf for p in reference)
        or not sum(map(float, reference)) > 0
    ):
        raise PatchbayError(
            f"{row.where}: reference is a probability for each of {len(choices)} choices, got {reference!r:.80}"
        )


def _orders(k: int, orders: int | str, seed: str) -> list[tuple[int, ...]]:
    """Which choice stands under each label, order by order; the one given first."""
    if orders == "latin":
        return [tuple((j + shift) % k for j in range(k)) for shift in range(k)]
    if orders == "all":
        if k <= ALL:
            return list(itertools.permutations(range(k)))
        n = MOST
    elif str(orders).isdigit() and int(orders) >= 1:
        n = int(orders)
        if k <= ALL and n >= math.factorial(k):
            return list(itertools.permutations(range(k)))
    else:
        raise PatchbayError(f"orders={orders!r}: all, latin, or a number of 1 or more")
    chance, found = random.Random(seed), [tuple(range(k))]
    while len(found) < n:
        found.append(tuple(chance.sample(range(k), k)))
    return found


def _read(p: Tensor, orders: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """What is read off the probabilities [order, label] of one question."""
    k = p.shape[1]
    mass = p.sum(1)
    shares = p / mass[:, None]  # [order, label]
    choice = _by_choice(shares, torch.tensor(orders))
    label = shares.mean(0)
    return {
        "shares": shares,
        "p_choice": choice.tolist(),
        "entropy": _entropy(choice),
        "before": _entropy(shares[0]),
        "label_bias": float((label - 1 / k).abs().sum()) / 2,
        "a_share": float(label[0]) - 1 / k,
        "mass": float(mass.mean()),
    }


def _by_choice(shares: Tensor, orders: Tensor) -> Tensor:
    """Mean over orders of what each choice got, [choice]."""
    return torch.zeros_like(shares).scatter_(1, orders, shares).mean(0)


def _entropy(p: Tensor) -> float:
    return float(-(p * p.clamp_min(1e-300).log()).sum()) / math.log(len(p))


def _divergence(reference: Sequence[Any], p: Sequence[float]) -> float:
    r = torch.tensor([float(x) for x in reference], dtype=torch.float64)
    r = r / r.sum()
    return float((r * (r.clamp_min(1e-300).log() - torch.tensor(p, dtype=torch.float64).clamp_min(1e-300).log())).sum())


def _signal(shares: Sequence[Tensor], orders: Sequence[Sequence[tuple[int, ...]]], seed: int) -> float:
    """p that choices matter no more than when each order deals them to its labels at random."""

    def spread(dealt: Sequence[Tensor]) -> float:
        return sum(float(_by_choice(s, o).var(unbiased=False)) for s, o in zip(shares, dealt, strict=True))

    generator = torch.Generator().manual_seed(seed)
    seen = spread([torch.tensor(each) for each in orders])
    drawn = [spread([torch.rand(s.shape, generator=generator).argsort(1) for s in shares]) for _ in range(DRAWS)]
    return maths.draws_p(seen, torch.tensor(drawn, dtype=torch.float64))

"""Incoherence: a constant answer is 1, an order 0 and a coin 1/2; equals loops; reverses that are dealt anew are the null."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import patchbay as pb
from tests.measure.test_text_loss import constant
from tests.measure.words import NAMES, by_hand, reader

module: Any = importlib.import_module("patchbay.measure.incoherence")
FEW = [("cat", "dog"), ("hat", "sun"), ("man", "hen"), ("mat", "see"), ("on", "ran"), ("big", "red")]


def items(choices: list[str]) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{a} before {b}?", "reverse": f"{b} before {a}?", "choices": choices, "answer": choices[i % 2]}
        for i, (a, b) in enumerate(FEW)
    ]


def test_planted() -> None:
    """ "yes" whatever is asked: one of each pair is right. No choice above the other: a coin, half of the pairs."""
    always = pb.measure.incoherence(constant({"y": 5.0, "n": 0.0}), items(["y", "n"]))
    assert float(always.values) == 1.0
    assert float(always["both"]) == 0.0
    assert float(always["accuracy"]) == float(always["accuracy_reverse"]) == 0.5
    coin = pb.measure.incoherence(constant({"y": 0.0, "n": 0.0}), items(["y", "n"]))
    assert float(coin.values) == 0.5
    ahead = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    assert module.exactly_one(ahead, ahead).tolist() == [0.0, 0.0, 0.0]  # an order: right in both or in neither


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str) -> None:
    model = reader(name)
    some = items([" yes", " no"])
    found = pb.measure.incoherence(model, some)
    one = []
    for item in some:
        right = []
        for side in ("prompt", "reverse"):
            [own] = model.encode([item[side]])
            logp = [by_hand(model, model.encode([item[side] + c])[0], len(own)) for c in item["choices"]]
            said = item["choices"][logp.index(max(logp))]
            right.append((said == item["answer"]) == (side == "prompt"))
        one.append(float(right[0] != right[1]))
    assert found["per_item"].tolist() == one
    three = [
        {"prompt": "a", "reverse": "b", "choices": [" a", " be", " no"], "answer": 0, "reverse_answer": 2},
        {"prompt": "b", "reverse": "a", "choices": [" a", " be", " no"], "answer": 2, "reverse_answer": 0},
    ]
    both = pb.measure.incoherence(model, three)  # the same two questions, the other way round
    assert both["right"].tolist() == both["right_reverse"].tolist()[::-1]


def test_null() -> None:
    """Answers that do not go with their reverses: as often exactly one right as when dealt anew, and p is uniform or above."""
    generator = torch.Generator().manual_seed(0)
    flagged = 0
    for seed in range(60):
        ahead, back = torch.randint(2, (2, 30), generator=generator).double()
        dealt = module._dealt(ahead, back, seed)
        flagged += pb.maths.draws_p(-float(module.exactly_one(ahead, back).mean()), -dealt) <= 0.05
    assert flagged <= 7
    order = torch.randint(2, (30,), generator=generator).double()
    assert pb.maths.draws_p(-0.0, -module._dealt(order, order, 0)) < 0.01  # all coherent


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"choices": [" a", " be", " no"]}, "items, row 0 has 3 choices and no reverse_answer"),
        ({"reverse_answer": " yes"}, "items, row 0: the question and its reverse have the same answer ' yes'"),
        ({"answer": " maybe"}, "items, row 0: the answer ' maybe' is none of the choices"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], said: str) -> None:
    row = {**items([" yes", " no"])[0], **change}
    row["answer"] = row["answer"] if row["answer"] in (*row["choices"], " maybe") else 0
    with pytest.raises(pb.PatchbayError, match=said):
        pb.measure.incoherence(reader("characters"), [row])

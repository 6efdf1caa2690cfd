"""Boolean functions: teaching sequences leave one function, readers equal loops, an answer does not know what comes after it."""

from __future__ import annotations

import importlib
import itertools
import random
from typing import Any

import pytest
import torch

import patchbay as pb
from tests.measure.test_text_loss import constant
from tests.measure.words import NAMES, by_hand, reader

module: Any = importlib.import_module("patchbay.measure.boolean_functions")


def test_planted() -> None:
    """After a teaching sequence elimination never errs; before the first positive example it says 0; parity is of some of the bits."""
    for seed in range(40):
        chance = random.Random(seed)
        signs = module.literals(6, chance)
        x = tuple(chance.randrange(2) for _ in range(6))
        taught = [(a, module.holds(signs, a)) for a in module.teaching(signs, x)]
        assert [answer for _, answer in taught] == [1, 1, *[0] * sum(map(abs, signs))]
        for other in itertools.product((0, 1), repeat=6):
            assert module.elimination(taught, other) == module.holds(signs, other)
    assert module.elimination([((0, 0), 0)], (1, 1)) == 0.0
    told = [((1, 0), 1), ((0, 0), 0), ((1, 1), 1)]
    assert [module.written(told, n) for n in (0, 1, 2)] == ["1 0 is", "1 0 is 1. 0 0 is", "1 0 is 1. 0 0 is 0. 1 1 is"]
    told = module.examples("disjunction", 5, 400, random.Random(0))
    assert sum(answer == 0 for _, answer in told) / 400 > 0.15
    found = pb.measure.boolean_functions(
        constant({" ": 2.0, "0": 0.0, "1": 1.0}), kind="parity", functions=20, pairs=4, bits=3
    )
    ones = (
        sum(a for i in range(20) for _, a in module.examples("parity", 3, 4, random.Random(f"parity-0-{i}"))[2:]) / 40
    )
    assert float(found.values) == pytest.approx(ones)  # it always says 1


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str) -> None:
    model = reader(name)
    found = pb.measure.boolean_functions(model, bits=2, pairs=4, functions=3)
    near = []
    for i in range(3):
        told = module.examples("conjunction", 2, 4, random.Random(f"conjunction-0-{i}"))
        right, close = [], []
        for at in (2, 3):
            text = "".join(f"{a} {b} is {y}. " for (a, b), y in told[:at])
            text += f"{told[at][0][0]} {told[at][0][1]} is"
            [own] = model.encode([text])
            zero, one = (by_hand(model, model.encode([text + c])[0], len(own)) for c in (" 0", " 1"))
            right.append(float((one > zero) == bool(told[at][1])))
            common = [(a == told[at][0][0]) + (b == told[at][0][1]) for (a, b), _ in told[:at]]
            mean = [y for (_, y), n in zip(told[:at], common, strict=True) if n == max(common)]
            said = sum(mean) / len(mean)
            close.append(0.5 if said == 0.5 else float((said > 0.5) == bool(told[at][1])))
        assert float(found["per_item"][i]) == sum(right) / 2
        near.append(sum(close) / 2)
    assert found["nearest"].tolist() == near
    assert len(found.tables["curves"]) == 16


def test_null() -> None:
    """Always the more frequent answer is no more than the null, and what comes later in a prompt changes no earlier answer."""
    found = pb.measure.boolean_functions(constant({" ": 2.0, "0": 0.0, "1": 0.0}), functions=12, pairs=4, bits=3)
    assert float(found.values) == 0.5
    assert float(found["p"]) > 0.05
    told = module.examples("dnf", 4, 6, random.Random(0))
    assert module.written(told, 3) == module.written(told[:4], 3)
    assert module.majority([((0,), 1), ((1,), 0)], (0,)) == 0.5 == module.nearest([], (0,))
    long = pb.measure.boolean_functions(reader("characters"), functions=2, pairs=4, bits=2)
    short = pb.measure.boolean_functions(reader("characters"), functions=2, pairs=3, bits=2)
    both = [[row["accuracy"] for row in one.tables["curves"] if row["reader"] == "model"][:3] for one in (long, short)]
    assert both[0] == both[1]


@pytest.mark.parametrize("given", [{"kind": "xor"}, {"bits": 0}, {"pairs": 1}, {"functions": 0}])
def test_bad_input_is_named(given: dict[str, Any]) -> None:
    with pytest.raises(
        pb.PatchbayError, match="is one of conjunction, disjunction, dnf, parity, majority, taught; bits="
    ):
        pb.measure.boolean_functions(reader("characters"), **given)
    assert torch.equal(module._shared(torch.tensor([[2.0, -1.0, 0.0]]), torch.tensor([[1, 1, 0]])), torch.tensor([[1.0, 0.0, 0.5]]).double())  # fmt: skip

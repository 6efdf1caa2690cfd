"""Cross-task shots: examples that are the answer raise it, prompts are laid out as by hand, dealt answers are the null."""

from __future__ import annotations

import importlib
import random
from typing import Any

import pytest
import torch

import patchbay as pb
from tests.given import lent
from tests.measure.test_text_loss import constant
from tests.measure.words import NAMES, by_hand, reader
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.measure.cross_task")
TARGET = [{"prompt": f"is {x}", "choices": [" a", " be"], "answer": i % 2} for i, x in enumerate(("on", "in", "up", "at"))]  # fmt: skip
SOURCE = [
    {"prompt": f"was {x}", "choices": [" he", " she", " it"], "answer": i % 3} for i, x in enumerate(("x", "y", "z"))
]


def test_planted() -> None:
    """Layout by hand, in text and in ids with one start token; one's own task leaves the prompt itself out."""
    model = reader("characters")
    shots = [("was x", " he"), ("was y", " she")]
    assert module.with_shots(model, shots, "is on", "\n") == "was x he\nwas y she\nis on"
    start, a, b, c = 1, [1, 5, 6], [1, 7], [1, 8, 9]
    assert module.with_shots(model, [(a, [3]), (b, [4])], c, "\n") == [start, 5, 6, 3, 7, 4, 8, 9]
    pool = [("is on", " a"), ("is in", " be"), ("is up", " a")]
    for seed in range(20):
        assert pool[0] not in module.drawn("is on", pool, 2, str(seed))
    deaf = pb.measure.cross_task(constant({" ": 1.0, "a": 0.5, "b": 0.0, "e": 0.0}), TARGET, SOURCE)
    assert close(deaf["per_item"], torch.zeros(4).double(), of=1.0)  # it does not read its examples


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str) -> None:
    model = reader(name)
    found = pb.measure.cross_task(model, TARGET, SOURCE, k=2)
    pool = [(row["prompt"], row["choices"][row["answer"]]) for row in SOURCE]
    nulls = []
    for i, row in enumerate(TARGET):
        shots = random.Random(f"shots-0-{i}").sample(pool, 2)
        swapped = [(shots[0][0], shots[1][1]), (shots[1][0], shots[0][1])]
        own = []
        for examples in ([], shots, swapped):
            prompt = "".join(f"{asked}{answer}\n" for asked, answer in examples) + row["prompt"]
            [ids] = model.encode([prompt])
            logp = torch.tensor([by_hand(model, model.encode([prompt + c])[0], len(ids)) for c in row["choices"]])
            own.append(float(logp.log_softmax(0)[row["answer"]]))
        assert close(float(found["zero"][i]), own[0], of=10.0)
        assert close(float(found["per_item"][i]), own[1] - own[0], of=10.0)
        nulls.append(own[2] - own[0])
    assert close(float(found["null"]), sum(nulls) / 4, of=10.0)


def test_null() -> None:
    """Examples whose answers are all one: dealing them changes nothing, and p is 1. A Task's ids are taken as they are."""
    same = [{**row, "answer": 0} for row in SOURCE]
    found = pb.measure.cross_task(reader("characters"), TARGET, same)
    assert close(float(found["null"]), float(found.values))
    assert float(found["p"]) == 1.0
    assert float(pb.measure.cross_task(reader("characters"), TARGET, TARGET)["similarity"]) == pytest.approx(1.0)
    task = pb.tasks.repeated_tokens(lent("gpt2"), 6, max_period=3, max_offset=2)
    assert pb.measure.cross_task(lent("gpt2"), task, task, k=1)["per_item"].shape == (6,)


@pytest.mark.parametrize("k", [0, 3])
def test_bad_input_is_named(k: int) -> None:
    with pytest.raises(pb.PatchbayError, match=f"k={k} of 3 examples: 1 or more and fewer than there are"):
        pb.measure.cross_task(reader("characters"), TARGET, SOURCE, k=k)

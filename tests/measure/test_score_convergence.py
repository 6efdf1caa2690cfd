"""Score convergence: planted scores correlate, accuracies equal loops over tasks, unrelated scores do not."""

from __future__ import annotations

import importlib
import math
import random
from typing import Any

import pytest
import scipy.stats
import torch

import patchbay as pb
from patchbay.measure._deals import dealt_p
from tests.measure.words import NAMES, by_hand, reader
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.measure.score_convergence")
TASKS = ("on", "in", "up", "at")
ITEMS = [{"prompt": f"{x} {task}", "choices": [" a", " be"], "answer": (i + k) % 2, "group": task} for k, task in enumerate(TASKS) for i, x in enumerate(("he", "it", "we"))]  # fmt: skip


def test_planted() -> None:
    """p of a rank correlation by every order of tasks: of four in one order 2/24; it does not change when scores are stretched."""
    a = torch.tensor([0.1, 0.2, 0.5, 0.9], dtype=torch.float64)
    assert dealt_p(a, 3 * a + 1, 0) == pytest.approx(2 / 24)
    assert dealt_p(a, -a, 0) == pytest.approx(2 / 24)
    assert module._pearson(a, 2 * a + 3) == pytest.approx(1.0)
    b = torch.tensor([0.3, 0.1, 0.4, 0.2], dtype=torch.float64)
    assert pb.maths.spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    many = torch.arange(12).double()
    assert dealt_p(many, many, 0) == pytest.approx(1 / 2001)


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str) -> None:
    base, tuned = reader(name), reader(name, "gpt2", 1)
    found = pb.measure.score_convergence(base, ITEMS, tuned, k=1)

    masses: list[float] = []  # of the base model's prompts with their examples

    def right(model: pb.Model, prompt: str, row: dict[str, Any]) -> float:
        [own] = model.encode([prompt])
        logp = [by_hand(model, model.encode([prompt + c])[0], len(own)) for c in row["choices"]]
        masses.extend([sum(map(math.exp, logp))] if model is base else [])
        return float(logp.index(max(logp)) == row["answer"])

    for k, task in enumerate(TASKS):
        few, zero = [], []
        for i, row in enumerate(ITEMS):
            if row["group"] == task:
                pool = [(one["prompt"], one["choices"][one["answer"]]) for one in ITEMS if one["group"] == task and one is not row]  # fmt: skip
                [(asked, answer)] = random.Random(f"shots-0-{i}").sample(pool, 1)
                few.append(right(base, f"{asked}{answer}\n{row['prompt']}", row))
                zero.append(right(tuned, row["prompt"], row))
        assert float(found["base"][k]) == pytest.approx(sum(few) / 3)
        assert float(found["tuned"][k]) == pytest.approx(sum(zero) / 3)
    assert close(found["mass"], sum(masses) / len(masses), dtype=torch.float32)


def test_null() -> None:
    """Scores of two models that have nothing in common: p is small as often as it says."""
    generator = torch.Generator().manual_seed(0)
    flagged = 0
    for seed in range(40):
        a, b = torch.rand(2, 6, generator=generator, dtype=torch.float64)
        flagged += dealt_p(a, b, seed) <= 0.05
    assert flagged <= 6


def test_bad_input_is_named() -> None:
    model = reader("characters")
    with pytest.raises(pb.PatchbayError, match="2 tasks, the least of 3 items, k=2"):
        pb.measure.score_convergence(model, ITEMS[:6], model)
    with pytest.raises(pb.PatchbayError, match="4 tasks, the least of 3 items, k=3"):
        pb.measure.score_convergence(model, ITEMS, model, k=3)

"""Judge network: majorities of independent judges, votes equal loops, judges that are all one gain nothing."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.measure import _estimates as estimates
from tests.measure.test_text_loss import constant
from tests.measure.words import NAMES, by_hand, reader
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.measure.judge_network")
ROLES = ["", "he: ", "she: "]
ITEMS = [{"prompt": f"is {x}", "choices": [" a", " be", " no"], "answer": i % 3} for i, x in enumerate(("on", "in", "up"))]  # fmt: skip


def test_planted() -> None:
    """Five judges right with .7, independent: .837; one judge five times over: .7. Kappa of (20, 5; 10, 15) is .4."""
    assert module.independent(torch.full((5,), 0.7)) == pytest.approx(0.83692)
    assert module.independent(torch.tensor([0.7, 0.7])) == pytest.approx(0.7)
    assert estimates.kappa([[20, 5], [10, 15]]) == pytest.approx(0.4)
    tied = torch.tensor([[0, 1], [1, 1], [0, 0]])
    assert module.majority(tied, torch.zeros(3, dtype=torch.long), 2).tolist() == [0.5, 0.0, 1.0]
    generator = torch.Generator().manual_seed(0)
    votes = (torch.rand(4000, 5, generator=generator) >= 0.7).long()
    most = module.majority(votes, torch.zeros(4000, dtype=torch.long), 2)
    assert float(most.mean()) == pytest.approx(0.837, abs=0.02)
    assert module.majority(votes[:, :1].repeat(1, 5), torch.zeros(4000, dtype=torch.long), 2).equal((votes[:, 0] == 0).double())  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str) -> None:
    """Votes of both layers by loops; ties share; the choices' probability after what each layer reads."""
    model = reader(name)
    masses: list[float] = []  # of every call of `said`

    def said(prompt: str, choices: list[str]) -> int:
        [own] = model.encode([prompt])
        logp = [by_hand(model, model.encode([prompt + c])[0], len(own)) for c in choices]
        masses.append(sum(map(math.exp, logp)))
        return logp.index(max(logp))

    one, two = (pb.measure.judge_network(model, ITEMS, ROLES, layers=layers) for layers in (1, 2))
    single = []
    for i, row in enumerate(ITEMS):
        votes = [said(role + row["prompt"], row["choices"]) for role in ROLES]
        single.append(votes.count(row["answer"]) / 3)
        told = f"Votes: {', '.join(row['choices'][at].strip() for at in votes)}\n"
        again = [said(role + told + row["prompt"], row["choices"]) for role in ROLES]
        for found, each in ((one, votes), (two, again)):
            counts = [each.count(at) for at in range(3)]
            best = [at for at in range(3) if counts[at] == max(counts)]
            assert float(found["per_item"][i]) == pytest.approx((row["answer"] in best) / len(best))
    assert float(one["null"]) == pytest.approx(sum(single) / len(ITEMS))
    for layer, found in enumerate((one, two)):  # an item's three judges, then they again after the votes
        own = [mass for i, mass in enumerate(masses) if i // 3 % 2 == layer]
        assert close(found["mass"], sum(own) / len(own), dtype=torch.float32)


def test_equal_choices_get_votes_alike() -> None:
    """A model that tells no choice apart is right by chance, wherever the right one stands, and however often it is asked."""
    rows = [{"prompt": f"is {i}", "choices": ["a", "b"], "answer": 0} for i in range(60)]
    same = constant({"a": 1.0, "b": 1.0})
    found = pb.measure.judge_network(same, rows, ROLES)
    assert float(found.values) == pytest.approx(0.5, abs=0.25)
    assert 0.25 < float(found["null"]) < 0.75
    assert pb.measure.judge_network(same, rows, ROLES)["per_item"].equal(found["per_item"])
    assert not pb.measure.judge_network(same, rows, ROLES, seed=1)["per_item"].equal(found["per_item"])


def test_null() -> None:
    """Judges that do not read their roles are one judge: no gain, p of 1, correlation 1."""
    rows = [{"prompt": f"is {i}", "choices": ["a", "b"], "answer": int(i > 5)} for i in range(8)]
    found = pb.measure.judge_network(constant({"a": 1.0, "b": 0.0}), rows, ROLES)
    assert float(found.values) == float(found["null"]) == 0.75
    assert float(found["p"]) == 1.0
    assert float(found["correlation"]) == pytest.approx(1.0)
    assert float(found["independent"]) > 0.8


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"roles": ["he"]}, r"roles=\['he'\]: two texts or more"),
        ({"layers": 3}, "layers=3 is 1 or 2"),
        ({"told": "votes"}, r"told='votes' holds \{\} once"),
        ({"items": [{**ITEMS[0], "prompt": [5, 6], "choices": [[7], [8]], "answer": 0}]}, "judges read texts"),
    ],
)
def test_bad_input_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(pb.PatchbayError, match=said):
        pb.measure.judge_network(reader("characters"), **{"items": ITEMS, "roles": ROLES, **given})

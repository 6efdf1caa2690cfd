"""Routing: states that say which model is better are used, costs equal Hugging Face's, without a signal nothing is gained."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import patchbay as pb
from tests.measure.words import NAMES, by_hand, reader
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.measure.routing")
TEXTS = [f"{a} {b}" for a in ("the cat", "a dog", "it") for b in ("ran", "sat", "is", "sees")]


def test_planted() -> None:
    """One state coordinate says which of two costs is lower: the router is nearly the oracle; each text's own fit has not seen it."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(200, 8, generator=generator, dtype=torch.float64)
    cost = torch.stack([states[:, 3], -states[:, 3]], 1)
    chosen = module.routed(states, cost, 0.1, 0)
    assert float((chosen == cost.argmin(1)).double().mean()) > 0.95
    for far in (-1e6, 1e6):  # one text's own cost does not choose for it, whichever model it is for
        told = cost.clone()
        told[7] = torch.tensor([far, -far])
        assert module.routed(states, told, 0.1, 0)[7] == chosen[7]


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str) -> None:
    model, other = reader(name), reader(name, "gpt2", 1)
    found = pb.measure.routing(model, TEXTS, other, size_weight=0.5)
    sizes = [sum(p.numel() for p in one.hf.parameters()) for one in (model, other)]
    costs: list[list[float]] = [[], []]
    for k, one in enumerate((model, other)):
        for text in TEXTS:
            ids = [one.tokenizer.bos_token_id, *one.tokenizer(text, add_special_tokens=False)["input_ids"]]
            costs[k].append(-by_hand(one, ids, 1) / len(text) + 0.5 * sizes[k] / max(sizes))
    assert close(found["cost"], torch.tensor(costs[0]).double(), dtype=torch.float32)
    assert close(found["cost_other"], torch.tensor(costs[1]).double(), dtype=torch.float32)
    single = min(sum(each) for each in costs) / 12
    oracle = sum(map(min, *costs)) / 12
    assert close(float(found["single"]), single)
    assert close(float(found["oracle"]), oracle)
    assert float(found.values) == pytest.approx((single - float(found["router"])) / (single - oracle), rel=1e-3)
    assert float(found["null"]) == pytest.approx((single - float(found["random"])) / (single - oracle), rel=1e-3)


def test_a_token_that_is_not_scored_brings_no_bytes() -> None:
    """Without a start token the first token has no loss: its bytes would make the model cheaper than it is."""
    bare = reader("pairs").tokenizer
    other = pb.load(reader("pairs", "gpt2", 1).hf, type(bare)(tokenizer_object=bare.backend_tokenizer))
    found = pb.measure.routing(reader("pairs"), TEXTS, other)
    for i, text in enumerate(TEXTS):
        [ids] = other.encode([text])
        scored = len(text) - len(other.decode(ids[:1]))
        assert close(float(found["cost_other"][i]), -by_hand(other, ids, 1) / scored, dtype=torch.float32)


def test_null() -> None:
    """Costs that the states say nothing of: the router gains nothing over the better model in most of twenty draws."""
    generator, gained = torch.Generator().manual_seed(1), 0
    for seed in range(20):
        states, cost = (torch.randn(40, k, generator=generator, dtype=torch.float64) for k in (4, 2))
        chosen = module.routed(states, cost, 1.0, seed)
        single = cost[:, int(cost.mean(0).argmin())]
        gained += float((single - cost.gather(1, chosen[:, None])[:, 0]).mean()) > 0.15
    assert gained <= 3
    model = reader("characters")
    same = pb.measure.routing(model, TEXTS, model, size_weight=9.0)
    assert "null" not in same
    assert any("there is nothing to gain" in note for note in same.notes)
    assert float(same["single"]) == float(same["oracle"])


@pytest.mark.parametrize(("given", "said"), [({"items": TEXTS[:9]}, "9 items: 10 texts or more"), ({"ridge": 0.0}, "ridge=0.0 is above 0"), ({"items": [[5, 6, 7]] * 12}, "as text")])  # fmt: skip
def test_bad_input_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(pb.PatchbayError, match=said):
        pb.measure.routing(reader("characters"), **{"items": TEXTS, "other": reader("pairs"), **given})

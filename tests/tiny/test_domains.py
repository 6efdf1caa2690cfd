"""Four domains: their laws, what is chosen and told of on which texts, and what experts of a domain cost when they are off."""

from __future__ import annotations

import pytest
import torch

import patchbay as pb
from patchbay.blocks import monet
from patchbay.signal.port import PatchbayError
from patchbay.tiny import domains


def test_texts_follow_their_law_and_nobody_can_do_better_than_the_floor() -> None:
    ids = domains.texts(2, 400, seed=3)
    assert set(ids[:, 0].tolist()) == {domains.N_TOKENS + 2}
    assert int(ids[:, 1:].max()) < domains.N_TOKENS
    counts = torch.zeros(domains.N_TOKENS, domains.N_TOKENS)
    for before, after in zip(ids[:, 1:-1].flatten().tolist(), ids[:, 2:].flatten().tolist(), strict=True):
        counts[before, after] += 1
    ordered = (counts / counts.sum(1, keepdim=True)).sort(1, descending=True).values.mean(0)
    assert float((ordered[:3] - torch.tensor(domains.CHANCES)).abs().max()) < 0.03
    assert float(ordered[3:].sum()) == 0.0
    assert round(domains.FLOOR, 3) == 0.802
    assert torch.equal(ids, domains.texts(2, 400, seed=3))
    other = [domains.texts(at, 400, seed=3)[:, 1:] for at in (1, 2)]
    assert not torch.equal(*other)


def test_random_experts_are_as_many_and_none_of_the_domains_own() -> None:
    own = {0: [(1, 2), (3, 4)], 1: [(0, 0)]}
    made = domains._random(own, torch.Generator().manual_seed(0))
    assert {at: len(set(pairs)) for at, pairs in made.items()} == {0: 2, 1: 1}
    assert not any(set(made[at]) & set(own[at]) for at in own)


def test_what_is_off_is_off_for_its_own_reading_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that has learned nothing: no domain has experts of its own, nothing is lost, and nothing stays off."""
    hf = domains.train("horizontal", steps=1)
    found = domains.effects(hf, n=4)
    assert found.own.shape == found.others.shape == found.random.shape == (4, 4)
    assert float(found.own.abs().mean()) < 0.05
    assert not any(layer.off.any() for layer in monet.layers(hf))
    pairs = [{0: [(i, j) for i in range(32) for j in range(32)]}] * 4
    monkeypatch.setattr(monet, "own_of", lambda *a, **o: pairs)
    assert bool((domains.effects(hf, n=4).own != found.own).any())


def test_the_claim_is_asked_of_a_model_of_these_domains() -> None:
    from patchbay.papers import claims

    with pytest.raises(PatchbayError, match="patchbay.tiny.domains horizontal"):
        claims.known("park2024").measure(pb.load("tiny"), 0)


@pytest.mark.slow  # a minute of training each
@pytest.mark.parametrize("form", monet.FORMS)
def test_a_domains_experts_hold_it(form: str) -> None:
    """Park et al. 2024 with four laws of 48 tokens: near the floor; without its experts a domain is lost, the others are not."""
    hf = domains.train(form)
    found = domains.effects(hf)
    assert float(found.loss.max()) < domains.FLOOR + 0.06
    own, others, random = (part.mean(1) for part in (found.own, found.others, found.random))
    assert float(own.min()) > 1.0
    assert float(others.max()) < 0.1
    assert float(random.max()) < 0.3
    assert all(50 < n < 800 for n in found.n)

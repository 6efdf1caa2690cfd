"""Diachronic: nats by loops, changes by plain medians, a planted swap first, slices that are the same without any, and what cannot be told refused."""

from __future__ import annotations

import statistics

import pytest
import torch

import patchbay as pb
from patchbay.corpus.diachronic import changes, judged, matrix, surprisals
from patchbay.tiny import lab
from tests.given import lent
from tests.tolerance import close

TOKENS, USES = 40, 30


def nats(seed: int, planted: int | None = None, *, models: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Early and late nats [model, use] with noise of texts that all models share, and of models; a planted token costs the early ones 3 nats more."""
    draw = torch.Generator().manual_seed(seed)
    used = torch.arange(TOKENS).repeat(USES)
    shared = torch.rand(len(used), generator=draw, dtype=torch.float64) * 4
    word = torch.randn(2, models, TOKENS, generator=draw, dtype=torch.float64) * 0.3
    noise = torch.randn(2, models, len(used), generator=draw, dtype=torch.float64) * 0.5
    found = shared + word[:, :, used] + noise + torch.tensor([0.2, 0.0], dtype=torch.float64)[:, None, None]
    if planted is not None:
        found[0, :, used == planted] += 3.0
    return found[0], found[1], used


def test_planted() -> None:
    for seed in range(5):
        found = judged(*nats(seed, planted=7))
        assert found[0].token == 7
        assert found[0].q < 0.05
        assert found[0].change == pytest.approx(3.0, abs=0.7)
        assert sum(one.q < 0.05 for one in found) == 1


def test_reference() -> None:
    """Change, z and p of each token by loops."""
    early, late, tokens = nats(3, planted=5, models=2)
    found, used = {one.token: one for one in judged(early, late, tokens, bands=1)}, tokens.tolist()

    def by_token(a: list[float], b: list[float]) -> list[float]:
        medians = [
            statistics.median(a[i] - b[i] for i in range(len(used)) if used[i] == token) for token in range(TOKENS)
        ]
        return [one - statistics.median(medians) for one in medians]

    def mean(of: torch.Tensor) -> list[float]:
        return [(x + y) / 2 for x, y in zip(of[0].tolist(), of[1].tolist(), strict=True)]

    change = by_token(mean(early), mean(late))
    null = [abs(x) for of in (early, late) for x in by_token(of[0].tolist(), of[1].tolist())]
    scale = 1.4826 * statistics.median(null)
    for token in range(TOKENS):
        assert close(found[token].change, change[token], of=10.0, dtype=torch.float64)
        assert close(found[token].z, change[token] / scale, of=100.0, dtype=torch.float32)
        assert close(
            found[token].p,
            2 * (1 - statistics.NormalDist().cdf(abs(change[token]) / scale)),
            of=1.0,
            dtype=torch.float32,
        )
        assert found[token].uses == USES


def test_null() -> None:
    """Slices that are the same: none in twenty draws but one at most, and the p of tokens are not small too often."""
    told = [judged(*nats(100 + seed)) for seed in range(20)]
    assert sum(any(one.q < 0.05 for one in found) for found in told) <= 1
    assert sum(one.p < 0.05 for found in told for one in found) < 0.05 * 20 * TOKENS


def test_nats_of_slices_by_loops() -> None:
    models = [[lent("llama")], [lab.small(lent("llama").vocab_size)]]
    texts = [[[5, 6, 7], [8, 9]], [[10, 11, 12, 13]]]
    found = matrix(models, texts)
    for i, [model] in enumerate(models):
        for j, some in enumerate(texts):
            losses = []
            for ids in some:
                logp = torch.log_softmax(model.hf(torch.tensor([ids])).logits[0].detach().double(), -1)
                losses += [-float(logp[t, ids[t + 1]]) for t in range(len(ids) - 1)]
            assert close(float(found[i, j]), sum(losses) / len(losses), of=10.0, dtype=torch.float32)
    assert len(surprisals(models[0][0], texts[0])) == 3


def test_models_and_their_texts_together() -> None:
    """From models: what `judged` says of their nats, early and late not taken for one another."""
    texts = [[1 + (3 * i + j * j) % 11 for j in range(20)] for i in range(16)]
    late, early = ([lab.small(12, width=16, heads=2, mlp=16, seed=seed) for seed in range(at, at + 2)] for at in (0, 5))
    with torch.no_grad():
        for model in early:
            model.hf.lm_head.weight[4] = 0.0  # of the likelihood of the average token
            model.hf.lm_head.weight[:4] *= 30
    found = changes(early, late, texts, bands=1)
    used = torch.tensor([token for ids in texts for token in ids[1:]])
    nats_ = [torch.stack([surprisals(model, texts) for model in models]) for models in (early, late)]
    assert found == judged(*nats_, used, bands=1)
    assert float(nats_[0].mean()) > float(nats_[1].mean()) + 0.1
    back = {one.token: one.change for one in changes(late, early, texts, bands=1)}
    assert all(one.change == pytest.approx(-back[one.token]) for one in found)


def test_refusals() -> None:
    model, other = lent("llama"), lab.small(12, width=16, heads=2, mlp=16)
    for call, says in (
        (lambda: changes([model], [model] * 2, [[1, 2]]), "two or more of each"),
        (lambda: changes([model] * 2, [other] * 2, [[1, 2]]), "one vocabulary for all"),
        (lambda: changes([model] * 2, [model] * 2, []), "no late texts"),
        (lambda: changes([model] * 2, [model] * 2, [[5, 6, 7]]), "0 tokens with 10 uses"),
        (lambda: matrix([[model]], []), "as many of both"),
    ):
        with pytest.raises(pb.PatchbayError, match=says):
            call()

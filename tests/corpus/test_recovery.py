"""PASER: divergences by loops and within their bounds, budgets that sum, planted damage gets the budget, nothing depends on order."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch

import patchbay as pb
from patchbay.corpus.recovery import budgets, clustered, contradicting, divergence, pick
from patchbay.tiny import lab
from tests.given import lent
from tests.tolerance import close


def kinds(n: int = 12, seed: int = 0) -> list[list[int]]:
    """Texts of tokens 5..14, then as many of tokens 25..34, of several lengths."""
    rng = random.Random(seed)
    return [[rng.randrange(first, first + 10) for _ in range(rng.randint(4, 9))] for first in (5, 25) for _ in range(n)]


def cut_model(first: int = 5) -> pb.Model:
    """The twin with other rows for ten tokens: what reads others is as it was."""
    hf = copy.deepcopy(lent("llama").hf)
    with torch.no_grad():
        hf.get_input_embeddings().weight[first : first + 10] *= -3.0
    return pb.load(hf)


def test_planted() -> None:
    """What was cut is of the first kind's tokens: its texts get the whole budget, whichever kind comes first."""
    model, texts = lent("llama"), kinds()
    for first, mine in ((5, range(12)), (25, range(12, 24))):
        found = pick(model, texts, 8, cut=cut_model(first), clusters=2)
        assert set(found.texts) <= set(mine)
        assert sum(found.budgets) == 8 == len(set(found.texts))
        assert all((found.divergence[i] > 0) == (i in mine) for i in range(24))
        for name, share in enumerate(found.budgets):
            inside = [i for i, own in enumerate(found.clusters) if own == name]
            best = sorted(inside, key=lambda i: -found.divergence[i] / math.log(len(texts[i]) + 1))[:share]
            assert [i for i in found.texts if i in inside] == best


def test_reference() -> None:
    """The divergence of each text by loops over places and tokens."""
    model, other, texts = lent("llama"), cut_model(), kinds(2)
    found = divergence(model, texts, cut=other, batch_size=3)
    for i, text in enumerate(texts):
        total = 0.0
        p, q = (torch.softmax(one.hf(torch.tensor([text])).logits[0].detach().double(), -1) for one in (model, other))
        for a, b in zip(p, q, strict=True):
            for x, y in zip(a.tolist(), b.tolist(), strict=True):
                total += 0.5 * x * math.log(2 * x / (x + y)) + 0.5 * y * math.log(2 * y / (x + y))
        assert close(float(found[i]), total / len(text), of=1.0, dtype=torch.float32)
    assert float(found.max()) <= math.log(2)
    head = pb.zero(model.layers[0].heads[0].z)
    assert float(divergence(model, texts, cut=[head]).min()) > 0


def test_null() -> None:
    """The same weights differ nowhere, and there is nothing to recover; two that say opposite things differ by ln 2 at most."""
    model = lent("llama")
    assert float(divergence(model, kinds(3), cut=pb.load(copy.deepcopy(model.hf))).abs().max()) < 1e-12
    with pytest.raises(pb.PatchbayError, match="nothing to recover"):
        pick(model, kinds(3), 2, cut=[pb.scale(model.layers[0].heads[0].z, 1.0)], clusters=2)


def test_longer_texts_do_not_win_by_length() -> None:
    """A text said twice over has the divergence of a place, not of a sum."""
    model, other = lent("llama"), cut_model()
    text = [5, 6, 7, 8]
    one, long = divergence(model, [text, text * 6], cut=other).tolist()
    assert long < 2 * one


def test_budgets_are_whole_and_sum() -> None:
    assert budgets([1.0, 1.0, 1.0], [9, 9, 9], 10) == [4, 3, 3]
    assert budgets([3.0, 1.0], [9, 9], 8) == [6, 2]
    assert budgets([9.0, 1.0, 1.0], [2, 9, 9], 8) == [2, 3, 3]  # what the first has not got
    assert budgets([1.0, 0.0], [2, 5], 4) == [2, 2]
    for seed in range(50):
        rng = random.Random(seed)
        sizes = [rng.randint(0, 6) for _ in range(5)]
        n = rng.randint(1, max(1, sum(sizes)))
        if sum(sizes) >= n:
            found = budgets([rng.random() + 0.01 for _ in sizes], sizes, n)
            assert sum(found) == n
            assert all(0 <= a <= b for a, b in zip(found, sizes, strict=True))


def test_clusters_are_those_of_the_points_in_any_order() -> None:
    draw = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 6.0]]).repeat_interleave(8, 0)
    rows, order = centres + torch.randn(24, 2, generator=draw) * 0.4, torch.randperm(24, generator=draw)
    for found in (clustered(rows, 3), [clustered(rows[order], 3)[int(i)] for i in order.argsort()]):
        assert [len({*found[i : i + 8]}) for i in (0, 8, 16)] == [1, 1, 1]
        assert len(set(found)) == 3
    assert clustered(rows, 1) == [0] * 24


def test_texts_that_contradict_the_pool_whatever_their_order() -> None:
    said = [
        {"sun", "warm"},
        {"sun", "warm"},
        {"snow", "cold"},
        {"snow", "cold"},
        {"sun", "warm", "rare"},
        {"snow", "cold"},
        {"sun", "cold"},
    ]
    assert contradicting(said) == [6]
    assert contradicting(said[::-1]) == [0]
    assert contradicting([*said, {"sun", "cold"}]) == []
    model, texts = lent("llama"), kinds()
    words = {0: ["a", "b"], **{i: [("a", "c")[i % 2], "d"] for i in range(1, 24)}, 1: ["b"], 2: ["b"]}
    found = pick(model, texts, 8, cut=cut_model(), clusters=2, concepts=lambda text: words[texts.index(text)])
    assert found.left_out == [0]
    assert 0 not in found.texts


def test_refusals() -> None:
    model = lent("llama")
    with pytest.raises(pb.PatchbayError, match="an empty pool"):
        pick(model, [], 1, cut=cut_model())
    with pytest.raises(pb.PatchbayError, match="no more than there are"):
        pick(model, kinds(2), 5, cut=cut_model(), clusters=2)
    with pytest.raises(pb.PatchbayError, match="the cut model has"):
        divergence(model, kinds(2), cut=lab.small(20))
    with pytest.raises(pb.PatchbayError, match="clusters of 3 texts"):
        clustered(torch.zeros(3, 2), 4)

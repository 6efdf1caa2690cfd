"""Claims that train blocks: pairs begin and read alike, shares and costs are counted by hand, a half chooses and the other is told, a network that broke counts as failed."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from patchbay.papers.claims import _grown, symbols, variants
from patchbay.tiny import lab
from tests.tolerance import close


class Saying:
    """A Hugging Face model that says what a function makes of its ids."""

    def __init__(self, logits: Any) -> None:
        self.logits = logits

    def __call__(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.logits(input_ids))


def next_token(ids: Tensor) -> Tensor:
    """Certain of every token that comes next, and of 0 behind the last."""
    return 20.0 * torch.nn.functional.one_hot(torch.nn.functional.pad(ids[:, 1:], (0, 1)), 32).float()


def test_arms_of_a_seed_begin_alike_and_read_the_same_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What both have is the same to the bit, batches are the same ones; those of another seed differ; all that is learned is trained."""
    read: list[list[Tensor]] = []

    def steps_of(hf: Any, loss: Any, steps: int, *, rate: float, of: Any) -> None:
        seen: list[Tensor] = []
        for step in range(steps):
            loss(lambda input_ids, labels, use_cache: seen.append(input_ids) or SimpleNamespace(loss=input_ids), step)
        read.append(seen)
        assert {id(one) for one in of} == {id(one) for one in hf.parameters()}
        assert all(one.requires_grad for one in of)

    monkeypatch.setattr(lab, "steps_of", steps_of)
    network, texts = lab.small(32, layers=1, width=16, heads=2, mlp=8), [ids for ids, _ in lab.recalls(50, 0)]
    plain, bent, other = (
        _grown.grown(network, texts, blocks, seed, steps=3, rate=0.1)
        for blocks, seed in (({}, 1), ({"turned": True}, 1), ({}, 2))
    )
    own = {name.replace(".inner", ""): value for name, value in bent.state_dict().items()}
    for name, value in plain.state_dict().items():
        assert torch.equal(value, own[name]), name
    assert not torch.equal(plain.lm_head.weight, other.lm_head.weight)
    assert all(torch.equal(one, same) for one, same in zip(read[0], read[1], strict=True))
    assert not torch.equal(read[0][0], read[0][1])
    assert not torch.equal(read[0][0], read[2][0])


def test_shares_and_costs_are_counted_at_the_tokens_that_come() -> None:
    held = [([1, 5, 2, 6, 1, 5], [5]), ([1, 7, 1, 7, 1, 8], [3, 5])]
    assert variants._right(Saying(next_token), held).tolist() == [1.0, 1.0]

    def one_wrong(ids: Tensor) -> Tensor:
        made = next_token(ids)
        made[1, 4] = next_token(torch.tensor([[0, 9]]))[0, 0]
        return made

    assert variants._right(Saying(one_wrong), held).tolist() == [1.0, 0.5]
    logits, texts = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), [[1, 3, 0], [2, 2, 1]]
    expected = [
        [-float(logits[i, t].double().log_softmax(0)[ids[t + 1]]) for t in range(2)] for i, ids in enumerate(texts)
    ]
    assert close(_grown.nats(logits, texts), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("says", "fails"),
    [
        (lambda ids: next_token(ids)[..., :19], 0.0),
        (lambda ids: torch.zeros(*ids.shape, 19), 1.0),
        (lambda ids: torch.full((*ids.shape, 19), math.nan), 1.0),
    ],
)
def test_a_network_that_learned_no_order_or_broke_has_failed(
    monkeypatch: pytest.MonkeyPatch, says: Any, fails: float
) -> None:
    monkeypatch.setattr(variants, "grown", lambda *_, **__: Saying(says))
    found = variants._steady.__wrapped__(0, "plain")
    assert found.shape == (len(variants.RATES), 64)
    assert float(found.mean()) == fails


def test_words_by_how_often_they_come_have_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is below what frequencies alone cost."""
    texts = torch.tensor([ids for ids, _ in lab.phrases(500, 3)])
    often = torch.bincount(texts[:, 1:].flatten(), minlength=19).double()
    monkeypatch.setattr(
        variants, "grown", lambda *_, **__: Saying(lambda ids: (often + 0.01).log().expand(*ids.shape, 19))
    )
    assert float(variants._steady.__wrapped__(0, "plain").mean()) == 1.0


def test_a_plain_network_of_as_many_weights_as_the_gated_one(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, int] = {}
    monkeypatch.setattr(lab, "steps_of", lambda *_, **__: None)
    monkeypatch.setattr(variants, "RATES", (0.1,))

    def grown(network: Any, texts: Any, blocks: Any, seed: int, **options: Any) -> Any:
        sizes[name] = sum(one.numel() for one in _grown.grown(network, texts, blocks, seed, **options).parameters())
        return Saying(lambda ids: torch.zeros(*ids.shape, 19))

    monkeypatch.setattr(variants, "grown", grown)
    for name in ("gated", "wide", "plain"):
        variants._steady.__wrapped__(0, name)
    assert sizes["wide"] == pytest.approx(sizes["gated"], rel=0.02)
    assert sizes["plain"] < 0.8 * sizes["gated"]


def test_a_head_is_chosen_on_one_half_and_told_of_the_other() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.9, 0.2], [0.3, 1.0], [0.4, 1.0]])
    assert symbols._chosen(scores).tolist() == pytest.approx([0.3, 0.4])


def test_trees_without_heads_are_those_of_the_sentences_that_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbols, "TREES", 20)
    right, middle, most = symbols._without_heads(0)
    golds = [gold for _, gold in lab.phrases(96, 1000)[48:]]
    shared = [len({(first, 10) for first in range(1, 10)} & set(gold)) for gold in golds]
    assert right.tolist() == pytest.approx([2 * n / (9 + 9) for n in shared])
    assert 0.0 < middle < most < 0.5


def test_beginning_end_and_frequencies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends are means over twelve characters; frequencies cost the same at both, on average, and less than even chances."""
    costs = torch.arange(47.0).expand(2, 47)
    assert symbols._ends(costs).tolist() == [[5.5, 40.5]] * 2
    monkeypatch.setattr(symbols, "TEXTS", 200)
    texts, held = symbols._stretches.__wrapped__(0, True)
    assert sorted(texts[0]) == sorted(symbols._stretches.__wrapped__(0, False)[0][0]) != texts[0]
    monkeypatch.setattr(symbols, "_stretches", lambda *_: (texts, held))
    found = symbols._frequencies(0)
    assert len(found) == len(held)
    assert abs(float((found[:, 0] - found[:, 1]).mean())) < 0.1
    assert float(found.mean()) < math.log(len(lab.ALPHABET)) - 0.3


def few(monkeypatch: pytest.MonkeyPatch, name: str) -> list[dict[str, Any]]:
    """At most 64 texts of the lab's at a time; what was asked."""
    made, calls = getattr(lab, name), list[dict[str, Any]]()

    def some(n: int, seed: int, **options: Any) -> Any:
        calls.append({"n": n, "seed": seed, **options})
        return made(min(n, 64), seed, **options)

    monkeypatch.setattr(lab, name, some)
    return calls


def told_by(n: int, wrong: int | None = None) -> Any:
    """Logits over n tokens: certain of what comes, or at every place of one text of another token."""

    def says(ids: Tensor) -> Tensor:
        coming = torch.nn.functional.pad(ids[:, 1:], (0, 1))
        if wrong is not None:
            coming[wrong] = (coming[wrong] + 1) % n
        return 30.0 * torch.nn.functional.one_hot(coming, n).float()

    return says


@pytest.mark.parametrize("name", list(variants.META_ARMS))
def test_planted_values_are_recalled_at_three_lengths_with_meta_tokens_behind_pairs(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A network that knows what comes recalls all, one that errs in one text all of the others'; which arm has which texts, layers and blocks, and that other texts are told."""
    asked, read = few(monkeypatch, "recalls"), list[Any]()

    def grown(network: Any, texts: Any, blocks: Any, seed: int, **_: Any) -> Saying:
        read.append((network.n_layers, texts, blocks, seed))
        return Saying(told_by(variants.META + 1, wrong))

    monkeypatch.setattr(variants, "grown", grown)
    for wrong in (None, 5):
        found = variants._bookmarked.__wrapped__(3, name)
        assert [len(one) for one in found] == [64] * 3
        for one in found:
            assert one.tolist() == [float(i != wrong) for i in range(64)]
    layers, texts, blocks, seed = read[0]
    assert (layers, blocks, seed) == (*variants.META_ARMS[name], 3)
    assert {len(ids) for ids in texts} == {24 if name == "plain" else 36}
    assert all((ids[2::3] == [variants.META] * 12) == (name != "plain") for ids in texts)
    assert [one["pairs"] for one in asked[:4]] == [4, 4, 8, 12]
    assert [one["length"] // asked[0]["length"] for one in asked[:4]] == [1, 1, 2, 3]
    assert [one["seed"] for one in asked[:4]] == [3, 1003, 1003, 1003]


def test_planted_costs_of_bent_angles_and_arms_that_read_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even chances cost ln 64 a token, certain ones nothing but in the text that is said wrong; all arms read the same texts and are told of others."""
    asked, read = few(monkeypatch, "mentions"), list[Any]()

    def grown(network: Any, texts: Any, blocks: Any, seed: int, **_: Any) -> Saying:
        read.append((texts, blocks))
        return Saying(says)

    monkeypatch.setattr(variants, "grown", grown)
    for name, blocks in variants.ANGLES.items():
        says = lambda ids: torch.zeros(*ids.shape, 64)  # noqa: E731
        assert close(variants._bent.__wrapped__(2, name), torch.full((64,), math.log(64), dtype=torch.float64))
        assert read[-1][1] == blocks
    assert all(texts == read[0][0] for texts, _ in read)
    assert [(one["n"], one["seed"]) for one in asked[:2]] == [(4096, 2), (96, 1002)]
    says = told_by(64, 7)
    found = variants._bent.__wrapped__(2, "bent")
    assert found[7] > 29.0
    assert float(found.sum() - found[7]) < 0.01

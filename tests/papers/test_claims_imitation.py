"""The claim of training with rewards: runs by hand, the better of the other ways is what counts, arms are trained alike and taken at one held-out loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.papers.claims import CLAIMS, imitation
from patchbay.tiny import lab
from patchbay.train._objectives import objective
from tests.tolerance import close


def test_it_is_of_five_seeds_whose_weight_and_smoothing_are_in_the_lab() -> None:
    entry = CLAIMS["wulfmeier2024"]
    assert (entry.kind, entry.seeds) == ("made", 5)
    rewards, plain, smoothed = (objective(text) for text in imitation.ARMS.values())
    assert [getattr(rewards, name) for name in ("weight", "gamma", "smooth")] == [0.1, 1.0, 0.0]
    assert [getattr(smoothed, name) for name in ("weight", "smooth")] == [0.0, 0.07]
    assert plain == objective("ntp")


@pytest.mark.parametrize(
    ("rewards", "plain", "smoothed", "losses", "verdict"),
    [
        (0.9, 0.8, 0.85, (1.5, 1.49, 1.5), "confirmed"),
        (0.9, 0.8, 0.95, (1.5, 1.49, 1.5), "not confirmed"),
        (0.9, 0.95, 0.8, (1.5, 1.49, 1.5), "not confirmed"),
        (0.9, 0.8, 0.9, (1.5, 1.49, 1.5), "inconclusive"),
        (0.9, 0.8, 0.85, (1.5, 1.47, 1.5), "not testable here"),
    ],
)
def test_the_better_of_the_other_ways_at_one_loss_is_what_counts(
    monkeypatch: pytest.MonkeyPatch,
    rewards: float,
    plain: float,
    smoothed: float,
    losses: tuple[float, ...],
    verdict: str,
) -> None:
    draw = torch.Generator().manual_seed(0)
    found = {
        name: imitation.Written(loss, value + 0.01 * torch.randn(16, generator=draw, dtype=torch.float64), loss)
        for name, value, loss in zip(imitation.ARMS, (rewards, plain, smoothed), losses, strict=True)
    }
    monkeypatch.setattr(imitation, "_written", lambda seed: found)
    claim = imitation.wulfmeier2024(None, 0)  # type: ignore[arg-type]
    assert claim.verdict == verdict
    assert claim.bound == 0.0
    assert claim.value == pytest.approx(rewards - max(plain, smoothed), abs=0.01)


def test_runs_that_are_different_by_hand() -> None:
    assert imitation.different([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]]) == 3 / 4
    assert imitation.different([[7] * 6, [7] * 6]) == 1 / 6
    assert imitation.different([[1, 2, 3, 4], [4, 3, 2, 1]]) == 1.0


SMALL = {"READ": 24, "HELD": 8, "SETS": 2, "SET": 3, "LENGTH": 12, "BEGUN": 4, "SAID": 8, "STEPS": 24, "EVERY": 2, "BATCH": 4}  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(imitation, name, value)


def test_arms_read_the_same_and_are_taken_where_losses_are_equal(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are stood in for: each arm reads the same texts, of which none is held out or begun, and is taken where it first is as low as the worst ends."""
    asked, of = list[Any](), list[Any]()
    losses = {"rewards": [1.9, 1.7, 1.6], "plain": [1.8, 1.55, 1.4], "smoothed": [2.0, 1.59, 1.61]}
    taken = {"rewards": 1.6, "plain": 1.55, "smoothed": 1.59}
    names = {text: name for name, text in imitation.ARMS.items()}

    def path(vocab: int, texts: Any, held: Any, text: str, seed: int) -> Any:
        asked.append((texts, held, seed))
        return [(loss, {"of": loss}) for loss in losses[names[text]]]

    def distinct(loss: Any, begun: Any) -> Any:
        of.append(begun)
        return loss

    monkeypatch.setattr(imitation, "path", path)
    monkeypatch.setattr(imitation, "network", lambda vocab, state: state["of"])
    monkeypatch.setattr(imitation, "distinct", distinct)
    found = imitation._written.__wrapped__(3)
    assert {name: one.loss for name, one in found.items()} == taken
    assert {name: one.distinct for name, one in found.items()} == taken  # samples of these weights
    assert [one.last for one in found.values()] == [one[-1] for one in losses.values()]
    assert len(asked) == 3
    assert all(one == asked[0] for one in asked)
    assert all(one == of[0] for one in of)
    every = lab.pieces(pb.load("tiny"), 38, 3, [12])
    texts, held, seed = asked[0]
    assert seed == 3
    assert every == held + [next(ids for ids in every if ids[:4] == one) for one in of[0]] + texts
    assert (len(held), len(of[0]), len(texts)) == (8, 6, 24)


def test_a_path_is_of_held_out_texts_and_of_the_objective_alone(small: None) -> None:
    """A weight of 0 is the plain path to the bit, rewards and smoothing are not; losses by loops."""
    draw = torch.Generator().manual_seed(0)
    texts, held = (torch.randint(30, (n, 12), generator=draw).tolist() for n in (24, 8))
    plain, same, rewards, smoothed = (
        imitation.path(30, texts, held, text, 5)
        for text in ("ntp", "inverse-rl:weight=0", *(imitation.ARMS[name] for name in ("rewards", "smoothed")))
    )
    assert [one[0] for one in plain] == [one[0] for one in same]
    assert len({one[-1][0] for one in (plain, rewards, smoothed)}) == 3
    loss, state = plain[-1]
    with torch.no_grad():
        logits = imitation.network(30, state).hf(torch.tensor(held)).logits.double().log_softmax(-1)
    each = [-float(logits[i, t - 1, ids[t]]) for i, ids in enumerate(held) for t in range(1, 12)]
    assert close(loss, sum(each) / len(each), of=9.0, dtype=torch.float32)
    assert not torch.equal(plain[0][1]["lm_head.weight"], plain[-1][1]["lm_head.weight"])  # kept, not a view


def test_samples_are_of_the_models_own_chances_with_draws_that_all_have(small: None) -> None:
    model = lab.small(30, width=48, mlp=96)
    begun = [[i, i + 1, i + 2, i + 3] for i in range(6)]
    first = imitation.distinct(model, begun)
    assert first.shape == (2,)
    assert torch.equal(first, imitation.distinct(model, begun))
    assert float(first.min()) > 0.9  # nearly even chances
    with torch.no_grad():
        model.hf.lm_head.weight.zero_()
        model.hf.lm_head.weight[7] = 9.0
        model.hf.model.norm.weight.fill_(1.0)
        for map_ in (model.hf.model.layers[i].mlp.down_proj for i in range(2)):
            map_.weight.zero_()
        model.hf.model.embed_tokens.weight.fill_(1.0)
        for i in range(2):
            model.hf.model.layers[i].self_attn.o_proj.weight.zero_()
    assert imitation.distinct(model, begun).tolist() == [1 / 15] * 2  # one token over and over

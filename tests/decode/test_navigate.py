"""Navigation: answers behind a crowd of neighbours are found, the pushed state as loops, the plain ranking where nothing pushes."""

from __future__ import annotations

import pytest
import torch

import patchbay as pb
from patchbay.decode.navigate import answer_of, listed, pushed
from patchbay.tiny import twins
from tests.decode.shared_stories import new_tokens, stories
from tests.tolerance import close

PROMPTS = [[5, 9, 7, 11], [8, 6, 7]]
RIGHT, CROWD = [30, 31, 32, 33], list(range(10, 20))


def state(model: pb.Model, prompt: list[int]) -> torch.Tensor:
    return pb.run(model, [prompt], taps=["final_norm"])["final_norm"][0, -1].detach()


def crowded(prompt: list[int]) -> pb.Model:
    """A model that answers with ten tokens of one key, and less strongly with four of other keys: its head is written for that."""
    hf = twins.twin("llama")
    h = state(pb.load(hf), prompt)
    wanted = torch.zeros(len(h), dtype=torch.float64)
    wanted[:5] = torch.tensor([0.6, 0.4, 0.4, 0.4, 0.4])
    v = wanted - h.double() / h.double().norm()
    turned = torch.eye(len(h), dtype=torch.float64) - 2 * torch.outer(v, v) / (
        v @ v
    )  # takes `wanted` to the state's direction
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        head = -turned[:, 0].expand(96, -1).clone()
        head[RIGHT] = turned[:, 1:5].T
        head[CROWD] = turned[:, 0] + 0.01 * torch.randn(10, len(h), generator=noise, dtype=torch.float64)
        hf.lm_head.weight.copy_(head.float())
    return pb.load(hf)


def firsts(found: pb.Result) -> list[list[int]]:
    return [[tokens[0] for tokens in drafts if tokens] for drafts in new_tokens(found)]


def test_planted() -> None:
    """Pushed away from one token of the crowd, the four answers come next; by rank alone the crowd comes first."""
    model = crowded(PROMPTS[0])
    found = pb.decode.navigate(model, [PROMPTS[0]], push=1.0, per_round=1, rounds=5, max_new_tokens=1)
    assert firsts(found)[0][0] in CROWD
    assert sorted(firsts(found)[0][1:]) == RIGHT
    plain = pb.decode.navigate(model, [PROMPTS[0]], push=0.0, per_round=1, rounds=5, max_new_tokens=1)
    assert set(firsts(plain)[0]) <= set(CROWD)
    assert float(found["near"][0, 1:].max()) < 0.1 < 0.9 < float(plain["near"][0, 1:].min())


def test_reference() -> None:
    """The ranking by loops: the state less its part in each direction of an orthogonal basis of the explored keys."""
    model = pb.load(twins.twin("llama"))
    found = pb.decode.navigate(model, PROMPTS, push=0.7, per_round=2, rounds=3, max_new_tokens=3)
    keys = model.hf.lm_head.weight.detach().double()
    for i, prompt in enumerate(PROMPTS):
        h, explored = state(model, prompt).double(), list[int]()
        for number in range(3):
            basis: list[torch.Tensor] = []
            for token in explored:
                left = keys[token].clone()
                for one in basis:
                    left = left - (left @ one) * one
                basis.append(left / left.norm())
            q = h.clone()
            for one in basis:
                q = q - 0.7 * (h @ one) * one
            ranked = [t for t in (keys @ q).argsort(descending=True).tolist() if t not in explored]
            explored += ranked[:2]
            said = torch.log_softmax(keys @ q, -1)
            for at in (2 * number, 2 * number + 1):
                assert close(found["score"][i, at], said[explored[at]], of=10.0, dtype=torch.float32)
        assert firsts(found)[i] == explored
        for tokens in new_tokens(found)[i]:
            assert tokens[1:] == model.generate([prompt + tokens[:1]], 2, new_only=True)[0]


def test_null() -> None:
    """Nothing pushed: the likeliest tokens in their order, each with its own greedy text; a full push leaves explored logits at 0."""
    model = pb.load(twins.twin("llama"))
    found = pb.decode.navigate(model, PROMPTS, push=0.0, per_round=2, rounds=2, max_new_tokens=3)
    logits = pb.run(model, PROMPTS, logits="last").last_logits
    assert firsts(found) == logits.topk(4).indices.tolist()
    assert close(found["score"], found["logp"][..., 0], of=10.0, dtype=torch.float32)
    keys = model.hf.lm_head.weight.detach()
    with model.edited(pushed(keys[[3, 8]], 1.0)):
        gone = pb.run(model, [PROMPTS[0]], logits="last").last_logits[0]
    assert close(gone[[3, 8]], 0.0, of=10.0)


def test_a_list_is_written_into_the_prompt_and_answers_end_at_a_quote() -> None:
    model = stories()
    found = pb.decode.navigate(model, ["Tom said"], per_round=2, rounds=2, max_new_tokens=6)
    answers = [answer_of(model, tokens) for tokens in new_tokens(found)[0]]
    assert listed("Tom said", answers[:2]) == f'Tom said 1. "{answers[0]}" 2. "{answers[1]}" 3. "'
    ids = model.encode([listed("Tom said", answers[:2])])
    law = torch.log_softmax(pb.run(model, ids).last_logits[0], -1)
    assert close(
        found["score"][0, 2:], law[[tokens[0] for tokens in new_tokens(found)[0][2:]]], of=10.0, dtype=torch.float32
    )
    start = model.encode([listed("Tom said", [])])
    plain = torch.log_softmax(pb.run(model, start).last_logits[0], -1)
    assert close(found["logp"][0, :, 0], plain[[t[0] for t in new_tokens(found)[0]]], of=10.0, dtype=torch.float32)
    for tokens in new_tokens(found)[0]:
        assert '"' not in model.decode(tokens[1:-1])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"push": 1.0, "rounds": 0}, "rounds=0: each one or more"),
        ({"push": float("nan"), "per_round": 2}, "push=nan: a finite share"),
        ({"push": 1.0, "per_round": 50, "rounds": 2}, "together at most the vocabulary's 96"),
        ({}, "answers are listed in text: give questions as texts"),
    ],
)
def test_refusals(options: dict[str, float], says: str) -> None:
    with pytest.raises(pb.PatchbayError, match=says):
        pb.decode.navigate(pb.load(twins.twin("llama")), PROMPTS, **options)  # type: ignore[arg-type]

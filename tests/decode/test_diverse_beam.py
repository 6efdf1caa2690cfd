"""Diverse beam search: the public implementation's texts, the formula as loops, groups alike where nothing pushes them apart."""

from __future__ import annotations

import pytest
import torch

import patchbay as pb
from patchbay.tiny import twins
from tests.decode.shared_stories import FIVE, digest, new_tokens, stories
from tests.tolerance import close

PROMPTS = [[5, 9, 7, 11], [8, 6, 7], [12, 5, 30, 9]]


def model_of(name: str = "llama") -> pb.Model:
    return pb.load(twins.twin(name))


@pytest.mark.parametrize(
    ("beams", "groups", "penalty", "expected"),
    [
        (6, 3, 0.5, "6761789e0476"),
        (6, 3, 1.0, "518fd7f1956d"),
        (6, 6, 0.5, "5e7bc6ef4798"),
        pytest.param(6, 1, 0.0, "f4973f319d71", marks=pytest.mark.slow),
    ],
)
def test_planted(beams: int, groups: int, penalty: float, expected: str) -> None:
    """On a trained model the texts are those that were measured, which hold the public release's as sets of each group."""
    found = pb.decode.diverse_beam(
        stories(), FIVE, beams=beams, groups=groups, penalty=penalty, max_new_tokens=24, ends=[]
    )
    width = beams // groups
    lists = [[drafts[g * width : (g + 1) * width] for g in range(groups)] for drafts in new_tokens(found)]
    assert digest(lists) == expected


def naive(model: pb.Model, prompt: list[int], width: int, groups: int, penalty: float, n: int) -> list[list[list[int]]]:
    """Loops over steps, groups, beams and tokens."""
    beams: list[list[tuple[float, list[int]]]] = [[(0.0, [])] for _ in range(groups)]
    for _ in range(n):
        used: dict[int, int] = {}
        for group in range(groups):
            found = []
            for score, tokens in beams[group]:
                with torch.no_grad():
                    logits = model.hf(torch.tensor([prompt + tokens])).logits[0, -1]
                for token, logp in enumerate(torch.log_softmax(logits.double(), -1).tolist()):
                    found.append((score + logp - penalty * used.get(token, 0), [*tokens, token]))
            beams[group] = sorted(found, key=lambda one: -one[0])[:width]
            for _, tokens in beams[group]:
                used[tokens[-1]] = used.get(tokens[-1], 0) + 1
    return [[tokens for _, tokens in group] for group in beams]


def test_reference() -> None:
    model = model_of()
    found = pb.decode.diverse_beam(model, PROMPTS, beams=8, groups=2, penalty=0.5, max_new_tokens=3)
    for i, prompt in enumerate(PROMPTS):
        drafts = new_tokens(found)[i]
        first = [tokens[1] for tokens in drafts[:4]]
        assert i or len(set(first)) < 4, "two beams of a group choose one token at a step"
        assert [drafts[:4], drafts[4:]] == naive(model, prompt, 4, 2, 0.5, 3)


def test_null() -> None:
    """Nothing pushes: every group is a beam search of its width. And nothing pushes the first group."""
    model = model_of()
    alike = new_tokens(pb.decode.diverse_beam(model, PROMPTS, beams=6, groups=3, penalty=0.0, max_new_tokens=4))
    alone = new_tokens(pb.decode.beam(model, PROMPTS, beams=2, max_new_tokens=4))
    pushed = new_tokens(pb.decode.diverse_beam(model, PROMPTS, beams=6, groups=3, penalty=3.0, max_new_tokens=4))
    for i in range(len(PROMPTS)):
        assert alike[i] == alone[i] * 3
        assert pushed[i][:2] == alone[i]
        assert pushed[i][2:4] != alone[i]


def test_both_ledgers_are_there() -> None:
    """The score holds the penalties; the sum of logp does not; the rank by each is told."""
    model = model_of()
    found = pb.decode.diverse_beam(model, PROMPTS, beams=4, groups=4, penalty=2.0, max_new_tokens=4)
    plain = found["logp"].sum(-1)
    assert close(found["score"][:, 0], plain[:, 0], of=30.0, dtype=torch.float32)
    paid = (plain - found["score"]) / 2.0
    assert close(paid, paid.round(), of=30.0, dtype=torch.float32)
    assert bool((paid.round() >= 0).all())
    assert paid.round()[:, 1:].sum() > 0
    order = plain.argsort(dim=1, descending=True).argsort(dim=1) + 1
    assert torch.equal(found["rank_by_logp"], order.double())
    assert found["group"].tolist() == [[0.0, 1.0, 2.0, 3.0]] * 3


def test_a_text_that_ends_in_one_group_ends_no_other() -> None:
    model = model_of("gpt2")
    with model.edited(pb.add("logits", 6.0 * torch.nn.functional.one_hot(torch.tensor(2), 96).float(), positions=-1)):
        found = pb.decode.diverse_beam(model, [PROMPTS[0]], beams=4, groups=2, penalty=20.0, max_new_tokens=4, ends=[2])
    drafts = new_tokens(found)[0]
    assert [2] in drafts[:2]
    assert all(len(tokens) == 4 for tokens in drafts if tokens != [2])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"beams": 6, "groups": 4}, "groups=4: a number that divides the 6 beams"),
        ({"penalty": -1.0}, "penalty=-1.0: 0 or more"),
    ],
)
def test_refusals(options: dict[str, float], says: str) -> None:
    with pytest.raises(pb.PatchbayError, match=says):
        pb.decode.diverse_beam(model_of(), PROMPTS, **options)  # type: ignore[arg-type]

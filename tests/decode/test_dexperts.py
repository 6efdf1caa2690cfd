"""DExperts: the formula token by token, an expert that was planted, the model's own law where experts agree."""

from __future__ import annotations

import math

import pytest
import torch

import patchbay as pb
from patchbay.decode._loop import draw, generators
from patchbay.knobs.knob import Knob
from patchbay.tiny import twins
from tests.decode.shared_stories import new_tokens
from tests.tolerance import close

PROMPTS = [[5, 9, 7, 11], [8, 6, 7], [12, 5, 30, 9]]
NEW = 5


def three() -> list[pb.Model]:
    return [pb.load(twins.twin("llama", seed=seed)) for seed in range(3)]


def push(strength: float, token: int = 60) -> Knob:
    return Knob("says", [pb.add("logits", torch.nn.functional.one_hot(torch.tensor(token), 96).float())], strength)


def law(model: pb.Model, text: list[int]) -> list[float]:
    with torch.no_grad():
        return [float(x) for x in model.hf(torch.tensor([text])).logits[0, -1].double()]


def test_reference() -> None:
    """`logq` of each token by loops: the nucleus of the model's own law, then the difference, then the sum."""
    own, expert, anti = three()
    found = pb.decode.dexperts(own, expert, anti, PROMPTS, alpha=0.7, top_p=0.8, max_new_tokens=NEW)
    for i, prompt in enumerate(PROMPTS):
        text = list(prompt)
        for at, token in enumerate(new_tokens(found)[i][0]):
            z, up, down = law(own, text), law(expert, text), law(anti, text)
            total = sum(math.exp(x) for x in z)
            kept, mass = [], 0.0
            for v in sorted(range(96), key=lambda v: -z[v]):
                if mass < 0.8:
                    kept.append(v)
                mass += math.exp(z[v]) / total
            raised = {v: z[v] + 0.7 * (up[v] - down[v]) for v in kept}
            expected = raised[token] - math.log(sum(math.exp(x) for x in raised.values()))
            assert close(found["logq"][i, 0, at], expected, of=10.0, dtype=torch.float32)
            text.append(token)
    assert close(found["score"], found["logq"].sum(-1), of=30.0, dtype=torch.float32)
    assert int(found["other_calls"]) == 2 * int(found["calls"])


def test_planted() -> None:
    """An expert that likes a token, or an anti-expert that does not: the token comes; the other way round it never does."""
    model = three()[0]
    for pair, comes in (
        ((push(9.0), push(0.0)), True),
        ((push(0.0), push(-9.0)), True),
        ((push(0.0), push(9.0)), False),
    ):
        found = pb.decode.dexperts(model, *pair, PROMPTS, alpha=2.0, top_p=1.0, max_new_tokens=NEW)
        said = [60 in drafts[0] for drafts in new_tokens(found)]
        assert said == [comes] * len(PROMPTS)
        assert "other_calls" not in found


def test_null() -> None:
    """No weight, or an expert that is its own anti-expert: nucleus sampling of the model, from the same chance."""
    own, expert, anti = three()
    one = pb.decode.dexperts(own, expert, anti, PROMPTS, alpha=0.0, top_p=0.7, max_new_tokens=NEW, seed=4)
    same = pb.decode.dexperts(own, anti, anti, PROMPTS, alpha=2.0, top_p=0.7, max_new_tokens=NEW, seed=4)
    assert torch.equal(one["tokens"], same["tokens"])
    other = pb.decode.dexperts(own, anti, anti, PROMPTS, alpha=2.0, top_p=0.7, max_new_tokens=NEW, seed=5)
    assert not torch.equal(one["tokens"], other["tokens"])
    free = pb.decode.dexperts(own, expert, anti, PROMPTS, alpha=0.0, top_p=1.0, max_new_tokens=NEW)
    assert close(free["logq"], free["logp"], of=10.0, dtype=torch.float32)
    greedy = pb.decode.dexperts(own, expert, anti, PROMPTS, alpha=0.5, top_p=1e-6, max_new_tokens=NEW)
    assert [drafts[0] for drafts in new_tokens(greedy)] == own.generate(PROMPTS, NEW, new_only=True)


def test_draws_follow_their_law() -> None:
    """20,000 draws from a law of six tokens, by chi-square; the same chance gives the same draws whatever the batch."""
    law_of = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.04, 0.01], dtype=torch.float64)
    n = 20_000
    chance = [one for [one] in generators(0, [[i] for i in range(n)])]
    drawn = draw(law_of.log().expand(n, -1), chance)
    counts = torch.bincount(drawn, minlength=6).double()
    assert float(((counts - n * law_of).square() / (n * law_of)).sum()) < 20.5  # 99.9 % of chi-square with 5 degrees
    again = [one for [one] in generators(0, [[i] for i in range(7)])]
    assert torch.equal(draw(law_of.log().expand(7, -1), again), drawn[:7])
    twice = generators(0, [[1], [1], [2]], drafts=2)
    seen = {float(torch.rand(1, generator=one)) for several in twice for one in several}
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"top_p": 0.0}, "top_p=0.0: the share"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"alpha": math.nan}, "alpha=nan: a finite"),
    ],
)
def test_refusals(options: dict[str, float], says: str) -> None:
    own, expert, anti = three()
    with pytest.raises(pb.PatchbayError, match=says):
        pb.decode.dexperts(own, expert, anti, PROMPTS, **options)  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="antiexpert takes a Model .* or a Knob"):
        pb.decode.dexperts(own, expert, "anti", PROMPTS)  # type: ignore[arg-type]

"""Best of n: planted votes, expectations by all subsets, and one draft alone."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

import patchbay as pb
from patchbay.decode._scorers import certainty
from patchbay.decode.best_of_n import Vote, expected, vote_of, votes
from patchbay.tiny.twins import twin
from tests.decode.shared_stories import FIVE, new_tokens, stories
from tests.tolerance import close

PROMPTS = [[5, 9, 7, 11], [8, 6, 7], [12, 5, 30, 9]]
NEW = 4


def model_of() -> pb.Model:
    return pb.load(twin("llama"))


def test_planted() -> None:
    """Five drafts, their answers and certainties: a majority, and a few certain ones that outvote it."""
    answers, certain = ["a", "b", "a", None, "b", "a"], [1.0, 9.0, 2.0, 10.0, 8.0, 3.0]
    assert votes(answers, certain, 0.0) == [3.0, 2.0, 3.0, 0.0, 2.0, 3.0]
    assert votes(answers, certain, 1.0) == [6.0, 9.0, 6.0, 0.0, 9.0, 6.0]  # ranks from below: 1 5 2 6 4 3
    order = [4, 2, 0, 5, 3, 1]
    moved = votes([answers[i] for i in order], [certain[i] for i in order], 1.0)
    assert moved == [votes(answers, certain, 1.0)[i] for i in order]
    vote = vote_of(r"vote(r'answer is (\w+)', power=0.5)")
    assert vote == Vote(r"answer is (\w+)", 0.5)
    assert [vote.of(text) for text in ("the answer is 4. no, the answer is 7.", "none")] == ["7", None]
    assert certainty(torch.zeros(3, 50)) == 0.0
    model = stories()
    found = pb.decode.best_of_n(model, FIVE[:2], scorer="vote", drafts=12, chain=["top_k(2)"], max_new_tokens=2)
    for i in range(2):
        texts = [tuple(row) for row in new_tokens(found)[i]]
        most = max(texts.count(text) for text in texts)
        assert texts.count(texts[0]) == most
        assert float(found["score"][i, 0]) == most


def test_reference() -> None:
    """Drafts are those of the samplers, in the order of a scorer that loops compute; the expected best by all subsets."""
    model = model_of()
    found = pb.decode.best_of_n(model, PROMPTS, drafts=5, max_new_tokens=NEW, seed=3)
    pool = pb.decode.samplers(model, PROMPTS, chain=[], drafts=5, max_new_tokens=NEW, seed=3)
    for i, prompt in enumerate(PROMPTS):
        scores = []
        for new in new_tokens(pool)[i]:
            with torch.no_grad():
                law = model.hf(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1].double().softmax(-1)
            scores.append(float(-(law * 96).log().mean()))
        order = sorted(range(5), key=lambda at: -scores[at])
        assert new_tokens(found)[i] == [new_tokens(pool)[i][at] for at in order]
        assert found["drawn"][i].tolist() == order
        assert close(found["score"][i], torch.tensor(sorted(scores, reverse=True)), of=5.0, dtype=torch.float32)
    scores = found["score"]
    for n in range(1, 6):
        each = [scores[:, list(some)].max(1).values.mean() for some in combinations(range(5), n)]
        assert close(found["expected"][n - 1], torch.stack(each).mean(), of=5.0, dtype=torch.float32)


def test_null() -> None:
    """One draft is the draw; of equal scores the best of n is no better; expectations never fall with n."""
    model = model_of()
    one = pb.decode.best_of_n(model, PROMPTS, drafts=1, max_new_tokens=NEW)
    assert new_tokens(one) == new_tokens(pb.decode.samplers(model, PROMPTS, chain=[], max_new_tokens=NEW))
    flat = expected(torch.full((2, 6), 3.0))
    assert close(torch.tensor(flat), torch.full((6,), 3.0), dtype=torch.float32)
    rising = expected(torch.randn(4, 7, generator=torch.Generator().manual_seed(0)))
    assert rising == sorted(rising)
    alike = pb.decode.best_of_n(
        model, PROMPTS, drafts=4, max_new_tokens=1
    )  # one law for all drafts: all are as certain
    assert alike["drawn"].tolist() == [[0.0, 1.0, 2.0, 3.0]] * 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"drafts": 0}, "drafts=0: one or more"),
        ({"scorer": "best"}, "scorer='best': one of logp, pmi"),
        ({"scorer": "vote('(')"}, "scorer=.*vote.answer='pattern', power=0"),
        ({"scorer": r"vote('\w')"}, "a pattern is r'...'"),
        ({"scorer": "vote(power='x')"}, "the power a finite number"),
        ({"scorer": "voted"}, "scorer='voted': vote"),
        ({"chain": ["top"]}, "chain: 'top' is none of"),
    ],
)
def test_refusals(options: dict[str, object], says: str) -> None:
    with pytest.raises(pb.PatchbayError, match=says):
        pb.decode.best_of_n(model_of(), PROMPTS, **options)  # type: ignore[arg-type]

"""Rerank: a scorer that was planted wins, segments are beam search where all are drawn, one of one is sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.decode import _scorers
from patchbay.decode._loop import asked
from patchbay.decode.rerank import decode
from patchbay.tiny import twins
from tests.decode.shared_stories import new_tokens
from tests.tolerance import close

PROMPTS = [[5, 9, 7, 11], [8, 6, 7], [12, 5, 30, 9]]
NEW = 6


def model_of(seed: int = 0) -> pb.Model:
    return pb.load(twins.twin("llama", seed=seed))


def count_of(token: int) -> Any:
    return lambda prompt, texts: [text.count(token) for text in texts]


def sampled(call_scorer: Any, **options: Any) -> list[list[int]]:
    """The best draft of each prompt by a scorer that is a function."""
    call = asked(model_of(), PROMPTS, NEW, [], 8)
    return [drafts[0].tokens for drafts in decode(call, scorer=call_scorer, **options)]


def test_planted() -> None:
    """A scorer that counts a token: what is kept has more of it than what is drawn, and never less than the mean of the pool."""
    model = model_of()
    draws = pb.decode.rerank(model, PROMPTS, scorer="logp", pool=[20, 1, NEW], max_new_tokens=NEW)
    common = torch.bincount(draws["tokens"].flatten().clamp(min=0)).argmax().item()
    seen: list[float] = []

    def scorer(prompt: Sequence[int], texts: Sequence[Sequence[int]]) -> list[float]:
        counts = [float(list(text).count(int(common))) for text in texts]
        seen.append(sum(counts) / len(counts))
        return counts

    for pool in ([1, 20, NEW], [2, 10, 2]):
        seen.clear()
        best = sampled(scorer, pool=pool)
        means = [seen[(i + 1) * len(seen) // 3 - 1] for i in range(3)]  # of the last pool of each prompt
        assert all(tokens.count(int(common)) >= mean for tokens, mean in zip(best, means, strict=True))
        assert sum(tokens.count(int(common)) for tokens in best) > sum(means)


def test_reference() -> None:
    """The loop by hand, on the same chance: one beam, three samples, segments of two, what ended kept as it is."""
    from patchbay.decode._loop import draw, generators
    from patchbay.decode._sampling import nucleus

    model, end = model_of(), [int(t) for t in range(75, 96)]
    call = asked(model, PROMPTS, NEW, end, 8)
    scorer = lambda prompt, texts: [0.1 * text[0] + 0.01 * sum(text) for text in texts]  # noqa: E731
    found = decode(call, scorer=scorer, pool=[2, 3, 2], top_p=0.9, seed=3)
    chance = generators(3, PROMPTS, 6)
    for i, prompt in enumerate(PROMPTS):
        kept, ended = [list[int]()], list[list[int]]()
        while kept and len(kept[0]) < NEW:
            drawn = [list(tokens) for tokens in kept for _ in range(3)]
            for _ in range(2):
                for row, tokens in enumerate(drawn):
                    done = bool(tokens) and tokens[-1] in end
                    with torch.no_grad():
                        logits = model.hf(torch.tensor([prompt + tokens])).logits[:, -1].float()
                    token = int(draw(torch.log_softmax(nucleus(logits, 0.9), -1), [chance[i][row]]))
                    if not done:
                        tokens.append(token)
                if all(tokens[-1] in end for tokens in drawn):
                    break
            pool = [*ended, *drawn]
            scores = scorer(prompt, pool)
            best = [pool[at] for at in sorted(range(len(pool)), key=lambda at: -scores[at])[:2]]
            ended, kept = [t for t in best if t[-1] in end], [t for t in best if t[-1] not in end]
        assert [one.tokens for one in found[i]] == best


def test_null() -> None:
    """One beam of one sample is nucleus sampling from the same chance, whatever the segment and the scorer."""
    model = model_of()
    texts = [
        new_tokens(pb.decode.rerank(model, PROMPTS, scorer=scorer, pool=[1, 1, segment], max_new_tokens=NEW, seed=2))
        for scorer, segment in (("pmi", NEW), ("logp", 1), ("unigram_overlap", 4))
    ]
    assert texts[0] == texts[1] == texts[2]
    plain = pb.decode.dexperts(model, model_of(1), model_of(1), PROMPTS, top_p=0.9, max_new_tokens=NEW, seed=2)
    assert texts[0] == new_tokens(plain)


def test_scorers_are_what_they_say() -> None:
    """Each by loops over runs of the whole text; another model's; self-certainty 0 of a law that says nothing."""
    model, texts = model_of(), [[3, 8, 11], [7, 7, 9]]
    call = asked(model, PROMPTS, NEW, [], 8)

    def logp(of: pb.Model, prompt: list[int], text: list[int]) -> float:
        with torch.no_grad():
            logits = of.hf(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1].double()
        return sum(float(torch.log_softmax(row, -1)[t]) for row, t in zip(logits, text, strict=True))

    own = [logp(model, PROMPTS[1], text) for text in texts]
    assert close(_scorers.logp(call, 1, texts), own, of=30.0, dtype=torch.float32)
    free = [logp(model, [1], text) for text in texts]
    assert close(
        _scorers.pmi(call, 1, texts), [a - b for a, b in zip(own, free, strict=True)], of=30.0, dtype=torch.float32
    )
    assert _scorers.unigram_overlap(call, 1, texts) == [1 / 3, 2 / 3]
    other = _scorers.scorer_of(call, model_of(1))(call, 1, texts)
    assert close(other, [logp(model_of(1), PROMPTS[1], text) for text in texts], of=30.0, dtype=torch.float32)
    flat = torch.zeros(3, 96)
    assert close(_scorers.certainty(flat), 0.0, of=1.0)
    law = torch.tensor([[math.log(0.7), math.log(0.3)]])
    expected = -0.5 * (math.log(2 * 0.7) + math.log(2 * 0.3))
    assert close(_scorers.certainty(law), expected)
    assert (call.calls, call.fed) == (3, 3 * 2 * 6 - 2 * 2)
    with model.edited(pb.scale("L0.attn.out", -2.0)):
        assert _scorers.logp(asked(model, PROMPTS, NEW, [], 8), 1, texts) != own


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scorer": "best"}, "scorer='best': one of logp, pmi"),
        ({"pool": [2, 2]}, "pool=.2, 2.: beams, samples of each"),
        ({"pool": [2, 0, 1]}, "pool=.2, 0, 1."),
        ({"top_p": 0.0}, "top_p=0.0"),
    ],
)
def test_refusals(options: dict[str, Any], says: str) -> None:
    with pytest.raises(pb.PatchbayError, match=says):
        pb.decode.rerank(model_of(), PROMPTS, **options)
    with pytest.raises(pb.PatchbayError, match="a finite number for each of"):
        sampled(lambda prompt, texts: [math.nan] * len(texts), pool=[1, 2, 2])

"""Superposed decoding: the loop as the paper writes it, a sentence that tables give back, greedy where there is one draft."""

from __future__ import annotations

import math

import pytest
import torch

import patchbay as pb
from patchbay.decode._ngrams import WEIGHTS, NGrams
from patchbay.decode.superposed import Stream, mixture
from patchbay.tiny import twins
from tests.decode.shared_stories import new_tokens
from tests.tolerance import close

PROMPTS = [[5, 9, 7, 11], [8, 6, 7], [12, 5, 30, 9]]
TEXTS = [[5, 9, 7, 11, 3, 8, 6, 7, 20, 21], [12, 5, 30, 9, 40, 41, 9, 7, 11, 22], [6, 7, 30, 9, 7, 11]]


def model_of(name: str = "llama") -> pb.Model:
    return pb.load(twins.twin(name))


def naive(
    model: pb.Model, prompt: list[int], k: int, alpha: float, temperature: float, n: int, texts: list[list[int]]
) -> list[tuple[float, list[int]]]:
    """Loops over drafts and tokens, no cache, the stream as embeddings; n-grams counted in the texts each time."""

    def g(text: list[int], token: int) -> float:
        total = 0.0
        for length, weight in enumerate((0.01, 0.04, 0.15, 0.18, 0.12), start=1):
            context = text[-length:]
            after = [t[i + length] for t in texts for i in range(len(t) - length) if t[i : i + length] == context]
            if after and len(context) == length:
                total += weight * after.count(token) / len(after)
        return total

    embed = model.hf.get_input_embeddings()
    stream = embed(torch.tensor([prompt]))
    drafts: list[tuple[float, list[int]]] = [(0.0, [])]
    for step in range(n):
        with torch.no_grad():
            logits = model.hf(inputs_embeds=stream).logits[0, -1].double() / temperature
        p = logits.softmax(-1).tolist()
        likely = sorted(range(len(p)), key=lambda v: (-p[v], v))[: 3 * k]
        total = sum(p[v] for v in likely)
        found = []
        for score, tokens in drafts:
            weights = {v: g(prompt + tokens, v) for v in likely} if texts else {}
            for v in likely:
                logp = (1 - alpha) * math.log(p[v] / total)
                if texts and not any(weights.values()):
                    logp -= 200
                elif texts and not weights[v]:
                    continue
                elif texts:
                    logp += alpha * math.log(weights[v])
                found.append((score + logp, [*tokens, v]))
        drafts = sorted(found, key=lambda one: -one[0])[:k]
        drafts += [drafts[0]] * (k - len(drafts))
        if step < n - 1:
            top = max(score for score, _ in drafts)
            w = [math.exp(score - top) for score, _ in drafts]
            mixed = sum(x / sum(w) * embed.weight[tokens[-1]] for x, (_, tokens) in zip(w, drafts, strict=True))
            stream = torch.cat([stream, mixed[None, None]], 1)
    return sorted(((score / n, tokens) for score, tokens in drafts), key=lambda one: -one[0])


@pytest.mark.parametrize("known", [False, True])
def test_reference(known: bool) -> None:
    """Without n-grams, and with those of texts in which likely tokens follow what the prompts end with."""
    model = model_of()
    likely = pb.run(model, PROMPTS, logits="last").last_logits.topk(9).indices.tolist()
    texts = [
        [*ids, token, later] for ids, row in zip(PROMPTS, likely, strict=True) for token in row[1:] for later in row[:3]
    ]
    texts = texts if known else []
    found = pb.decode.superposed(model, PROMPTS, drafts=3, temperature=0.7, texts=texts or None, max_new_tokens=4)
    for i, prompt in enumerate(PROMPTS):
        expected = naive(model, prompt, 3, 0.54 if texts else 0.0, 0.7, 4, texts)
        own = {tuple(tokens): score for score, tokens in expected}  # twice the same draft is one
        assert [tuple(tokens) for tokens in new_tokens(found)[i] if tokens] == list(own)
        for score, known in zip(found["score"][i].tolist(), own.values(), strict=False):
            assert close(score, known, of=max(10.0, abs(known)), dtype=torch.float32)


def test_planted() -> None:
    """By n-grams of one sentence alone, the sentence comes back."""
    model = model_of()
    sentence = [5, 9, 7, 11, 40, 41, 42, 43, 44]
    found = pb.decode.superposed(
        model, [sentence[:4]], drafts=32, alpha=1.0, temperature=50.0, texts=[sentence], max_new_tokens=5
    )
    assert new_tokens(found)[0] == [sentence[4:]]


def test_null() -> None:
    """One draft and no n-grams: greedy decoding, a pass and a position for a token. With n-grams it is not."""
    model = model_of()
    found = pb.decode.superposed(model, PROMPTS, drafts=1, max_new_tokens=5)
    assert [drafts[0] for drafts in new_tokens(found)] == model.generate(PROMPTS, 5, new_only=True)
    alone = pb.decode.superposed(model, [PROMPTS[0]], drafts=3, max_new_tokens=5)
    assert (int(alone["calls"]), int(alone["fed"])) == (5, 4 + 4)
    long = pb.decode.superposed(
        model, [PROMPTS[0]], texts=[[5, 9, 7, 11] * 20], max_new_tokens=1
    )  # of 80 tokens, the model takes 64
    assert len(new_tokens(long)) == 1
    second = int(pb.run(model, [PROMPTS[0]]).last_logits[0].topk(2).indices[1])
    known = pb.decode.superposed(model, [PROMPTS[0]], drafts=1, texts=[[*PROMPTS[0], second]], max_new_tokens=5)
    assert new_tokens(known)[0][0][0] == second


def test_the_mixture_is_a_mean_by_score() -> None:
    embed = torch.nn.Embedding(5, 3)
    one = mixture(embed, Stream([0], [[1], [1], [1]], [-1.0, -2.0, -5.0]))
    assert close(one, embed.weight[1])
    two = mixture(embed, Stream([0], [[1], [2]], [0.0, math.log(3.0)]))
    assert close(two, 0.25 * embed.weight[1] + 0.75 * embed.weight[2])


def test_ngrams_are_shares_of_what_followed() -> None:
    known = NGrams([[1, 2, 3, 1, 2, 4], [2, 3]])
    assert close(known.weight([9, 2], 3), 0.01 * 2 / 3)
    assert close(known.weight([1, 2], 3), 0.01 * 2 / 3 + 0.04 / 2)
    assert known.weight([9], 3) == 0.0
    assert sum(WEIGHTS) == 0.5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"drafts": 0}, "drafts=0: from 1"),
        ({"alpha": 0.5}, "alpha=0.5 is the weight of n-grams: give texts="),
        ({"alpha": 1.5, "texts": TEXTS}, "alpha=1.5: from 0"),
        ({"temperature": 0.0}, "temperature=0.0: above 0"),
        ({"texts": [[3]]}, "none has two tokens"),
    ],
)
def test_refusals(options: dict[str, object], says: str) -> None:
    with pytest.raises(pb.PatchbayError, match=says):
        pb.decode.superposed(model_of(), PROMPTS, **options)  # type: ignore[arg-type]


def test_an_edit_by_token_is_refused_where_tokens_are_mixed() -> None:
    model = model_of()
    edit = pb.scale("L0.attn.out", 2.0, positions=pb.Token(7))
    with pytest.raises(pb.PatchbayError, match="the stream holds mixtures of tokens"), model.edited(edit):
        pb.decode.superposed(model, PROMPTS)

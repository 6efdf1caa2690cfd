"""Contrastive search: the public implementation's texts, the formula as loops, greedy where nothing is penalised."""

from __future__ import annotations

import math

import pytest
import torch

import patchbay as pb
from patchbay.tiny import twins
from tests.decode.shared_stories import FIVE, G512, T260, digest, new_tokens, stories
from tests.tolerance import close

PROMPTS = [[5, 9, 7, 11], [8, 6, 7], [12, 5, 30, 9]]


def model_of(name: str = "llama") -> pb.Model:
    return pb.load(twins.twin(name))


@pytest.mark.parametrize(
    ("name", "k", "alpha", "expected"),
    [
        (T260, 4, 0.6, "14a4dff02c7b"),
        (G512, 4, 0.6, "1066182153c0"),
        pytest.param(T260, 5, 0.2, "324ff5882614", marks=pytest.mark.slow),
        pytest.param(T260, 8, 0.8, "d15f44cc81eb", marks=pytest.mark.slow),
        pytest.param(G512, 5, 0.2, "0868172574ac", marks=pytest.mark.slow),
        pytest.param(G512, 8, 0.8, "2d9fd0e86958", marks=pytest.mark.slow),
    ],
)
def test_planted(name: str, k: int, alpha: float, expected: str) -> None:
    """On trained models the texts are those of the last public release that had it, transformers 4.51.3."""
    found = pb.decode.contrastive_search(stories(name), FIVE, k=k, alpha=alpha, max_new_tokens=60, ends=[])
    assert digest([drafts[0] for drafts in new_tokens(found)]) == expected


def naive(model: pb.Model, prompt: list[int], k: int, alpha: float, n: int) -> tuple[list[int], list[float]]:
    """The formula, candidate by candidate, each in a run of its own."""
    text, scores = list(prompt), []
    for _ in range(n):
        with torch.no_grad():
            p = model.hf(torch.tensor([text])).logits[0, -1].softmax(-1).tolist()
        likely = sorted(range(len(p)), key=lambda v: (-p[v], v))[:k]
        values = []
        for token in likely:
            with torch.no_grad():
                states = model.hf(torch.tensor([[*text, token]]), output_hidden_states=True).hidden_states[-1][0]
            last, before = states[-1].tolist(), states[:-1].tolist()
            cosines = [
                sum(a * b for a, b in zip(last, h, strict=True)) / (math.hypot(*last) * math.hypot(*h)) for h in before
            ]
            values.append((1 - alpha) * p[token] - alpha * max(cosines))
        at = max(range(k), key=lambda i: values[i])
        text.append(likely[at])
        scores.append(values[at])
    return text[len(prompt) :], scores


def test_reference() -> None:
    model = model_of()
    found = pb.decode.contrastive_search(model, PROMPTS, k=4, alpha=0.6, max_new_tokens=4)
    for i, prompt in enumerate(PROMPTS):
        tokens, scores = naive(model, prompt, 4, 0.6, 4)
        assert new_tokens(found)[i][0] == tokens
        assert close(found["score"][i, 0], sum(scores) / 4, of=1.0, dtype=torch.float32)


def test_null() -> None:
    """Nothing penalised, or one candidate: greedy decoding; n + 1 passes and T + k n token positions."""
    model = model_of()
    greedy = model.generate(PROMPTS, 5, new_only=True)
    for options in ({"alpha": 0.0, "k": 4}, {"alpha": 0.6, "k": 1}):
        found = pb.decode.contrastive_search(model, PROMPTS, max_new_tokens=5, **options)
        assert [drafts[0] for drafts in new_tokens(found)] == greedy
    found = pb.decode.contrastive_search(model, [PROMPTS[0]], max_new_tokens=5, k=3)
    assert (int(found["calls"]), int(found["fed"])) == (6, 4 + 3 * 5)
    assert -0.6 <= float(found["score"].min()) <= float(found["score"].max()) <= 1.0


def test_likeness_counts_the_prompt_too_and_says_where_it_is_blind() -> None:
    """One state for all tokens: every cosine is 1, the penalty is the same for all, and the Result says so."""
    model = model_of("gpt2")
    found = pb.decode.contrastive_search(model, PROMPTS, k=4, alpha=0.6, max_new_tokens=3)
    states = pb.run(model, [PROMPTS[0] + new_tokens(found)[0][0]], taps=["final_norm"])["final_norm"][0].double()
    cosines = torch.nn.functional.cosine_similarity(states[:, None], states[None], dim=-1)
    n = len(states)
    assert close(found["isotropy"][0, 0], 1 - (cosines.sum() - n) / (n * (n - 1)), of=1.0, dtype=torch.float32)
    assert not any("isotropy" in note for note in found.notes)
    with model.edited(pb.add("final_norm", 100.0 * torch.ones(model.d_model))):
        blind = pb.decode.contrastive_search(model, PROMPTS, k=4, alpha=0.6, max_new_tokens=3)
    assert any("isotropy 0.0" in note for note in blind.notes)


def test_states_of_zeros_have_no_direction() -> None:
    model = model_of("gpt2")
    with model.edited(pb.zero("final_norm")):
        found = pb.decode.contrastive_search(model, PROMPTS, k=4, alpha=0.6, max_new_tokens=3)
        assert [drafts[0] for drafts in new_tokens(found)] == model.generate(PROMPTS, 3, new_only=True)
    assert bool(found["score"].isfinite().all())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"k": 0}, "k=0: from 1"),
        ({"k": 97}, "k=97: from 1 to the vocabulary's 96"),
        ({"alpha": 1.5}, "alpha=1.5: from 0"),
    ],
)
def test_refusals(options: dict[str, float], says: str) -> None:
    with pytest.raises(pb.PatchbayError, match=says):
        pb.decode.contrastive_search(model_of(), PROMPTS, **options)  # type: ignore[arg-type]


def test_plain_transformers_users_have_the_loop() -> None:
    """As `custom_generate`: the same ids, prompts padded on the left, transformers' processors heard, edits in force."""
    model = stories()
    found = new_tokens(pb.decode.contrastive_search(model, FIVE[:2], k=5, alpha=0.5, max_new_tokens=6, ends=[]))
    rows = model.encode(FIVE[:2])
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    given = {"attention_mask": mask, "custom_generate": pb.decode.contrastive_search.generate, "k": 5, "alpha": 0.5}  # type: ignore[attr-defined]
    given |= {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    out = model.hf.generate(ids, **given)
    assert out[:, width:].tolist() == [drafts[0] for drafts in found]
    banned = found[0][0][0]
    other = model.hf.generate(ids, bad_words_ids=[[banned]], **given)
    assert banned not in other[:, width:].flatten().tolist()
    edit = pb.scale("L1.attn.out", -1.0)
    with model.edited(edit):
        edited = model.hf.generate(ids, **given)[:, width:].tolist()
        expected = pb.decode.contrastive_search(model, FIVE[:2], k=5, alpha=0.5, max_new_tokens=6, ends=[])
    assert edited == [drafts[0] for drafts in new_tokens(expected)]
    assert edited != out[:, width:].tolist()

"""Contrastive decoding: the two forms as loops, its exact ends, an amateur that is the same model under a knob."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.knobs.knob import Knob
from patchbay.tiny import twins
from tests.decode.shared_stories import new_tokens
from tests.tolerance import close

PROMPTS = [[5, 9, 7, 11], [8, 6, 7], [12, 5, 30, 9]]
NEW = 4


def pair() -> tuple[pb.Model, pb.Model]:
    return pb.load(twins.twin("llama")), pb.load(twins.twin("llama", seed=1))


def knob(strength: float = -1.0) -> Knob:
    return Knob("turned", [pb.scale(pb.Part(1, "attn").port(), 1.0)], strength)


def texts(found: pb.Result) -> list[list[int]]:
    return [drafts[0] for drafts in new_tokens(found)]


def laws(model: pb.Model, text: list[int], temperature: float = 1.0) -> list[float]:
    with torch.no_grad():
        return [float(x) / temperature for x in model.hf(torch.tensor([text])).logits[0, -1].double()]


def log_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    total = math.log(sum(math.exp(x - top) for x in logits)) + top
    return [x - total for x in logits]


def naive(expert: pb.Model, amateur: pb.Model, prompt: list[int], beta: float | None) -> tuple[list[int], float]:
    text, score = list(prompt), 0.0
    for _ in range(NEW):
        own = log_softmax(laws(expert, text))
        other = log_softmax(laws(amateur, text, 0.5 if beta is None else 1.0))
        head = [v for v in range(len(own)) if own[v] >= math.log(0.1) + max(own)]
        value = {v: own[v] - other[v] if beta is None else (1 + beta) * own[v] - beta * other[v] for v in head}
        token = max(head, key=lambda v: value[v])
        text.append(token)
        score += value[token]
    return text[len(prompt) :], score


@pytest.mark.parametrize("beta", [None, 0.5])
def test_reference(beta: float | None) -> None:
    expert, amateur = pair()
    found = pb.decode.contrastive_decoding(expert, amateur, PROMPTS, beta=beta, max_new_tokens=NEW)
    for i, prompt in enumerate(PROMPTS):
        tokens, score = naive(expert, amateur, prompt, beta)
        assert texts(found)[i] == tokens
        assert close(found["score"][i, 0], score, of=10.0, dtype=torch.float32)
    row = torch.tensor([PROMPTS[0] + texts(found)[0]])
    with torch.no_grad():
        said = amateur.hf(row).logits[0, 3:-1].log_softmax(-1)
    assert close(found["logp_amateur"][0, 0], said[torch.arange(NEW), row[0, 4:]], of=10.0, dtype=torch.float32)


def test_planted() -> None:
    """A knob that pushes one token up: as the amateur it is what the text is kept from, at beta -1 what it is written under."""
    model = pair()[0]
    push = Knob("says 60", [pb.add("logits", 8.0 * torch.nn.functional.one_hot(torch.tensor(60), 96).float())], 1.0)
    with model.edited(push):
        under = model.generate(PROMPTS, NEW, new_only=True)
    assert all(60 in row for row in under)
    as_it_is = pb.decode.contrastive_decoding(model, push, PROMPTS, beta=-1.0, alpha=0.0, max_new_tokens=NEW)
    assert texts(as_it_is) == under
    away = pb.decode.contrastive_decoding(model, push, PROMPTS, beta=1.0, alpha=0.0, max_new_tokens=NEW)
    assert not any(60 in row for row in texts(away))
    assert float(away["logp"].sum()) > float(away["logp_amateur"].sum())


def test_null() -> None:
    """Nothing contrasted is greedy decoding of the expert, whoever the amateur is."""
    expert, amateur = pair()
    greedy = expert.generate(PROMPTS, NEW, new_only=True)
    ways: list[tuple[Any, dict[str, Any]]] = [
        (amateur, {"beta": 0.0, "alpha": 0.0}),
        (amateur, {"alpha": 1.0}),
        (knob(), {"beta": 0.0, "alpha": 0.3}),
        (expert, {"beta": 0.5}),
        (knob(1.0), {"beta": 2.0}),
    ]
    for other, options in ways:
        assert texts(pb.decode.contrastive_decoding(expert, other, PROMPTS, max_new_tokens=NEW, **options)) == greedy


def test_minus_one_is_generation_under_the_knob_exactly() -> None:
    model = pair()[0]
    found = pb.decode.contrastive_decoding(model, knob(), PROMPTS, beta=-1.0, alpha=0.0, max_new_tokens=NEW)
    with model.edited(knob()):
        assert texts(found) == model.generate(PROMPTS, NEW, new_only=True)
    assert (int(found["calls"]), int(found["fed"])) == (2 * NEW, 2 * (11 + 3 * (NEW - 1)))
    assert "other_calls" not in found


def test_a_second_model_is_counted_for_itself_and_runs_under_its_own_edits() -> None:
    expert, amateur = pair()
    found = pb.decode.contrastive_decoding(expert, amateur, PROMPTS, max_new_tokens=NEW)
    assert [int(found[name]) for name in ("calls", "other_calls")] == [2 * NEW, 2 * NEW]
    with amateur.edited(pb.scale("L0.attn.out", -3.0)):
        turned = pb.decode.contrastive_decoding(expert, amateur, PROMPTS, max_new_tokens=NEW)
    assert texts(turned) != texts(found)


@pytest.mark.parametrize(
    ("other", "options", "says"),
    [
        ("self", {"temperature": 1.0}, "amateur: it is the expert itself"),
        ("neutral", {"temperature": 1.0}, "amateur: it is the expert itself"),
        ("other", {"alpha": -0.1}, "alpha=-0.1: from 0"),
        ("other", {"beta": float("nan")}, "beta=nan: a finite number"),
        ("other", {"beta": 0.5, "temperature": 0.5}, "temperature=0.5 is the amateur's where beta is not given"),
        ("other", {"temperature": 0.0}, "temperature=0.0: above 0"),
        ("text", {}, "amateur takes a Model .* or a Knob"),
        ("rows", {}, "names rows by itself"),
        ("wide", {}, "two models of one vocabulary are needed: the first has 96 tokens, the second 90"),
    ],
)
def test_refusals(other: str, options: dict[str, float], says: str) -> None:
    expert, amateur = pair()
    kinds = {"self": expert, "other": amateur, "neutral": knob(1.0), "text": "gpt2", "rows": knob().on_rows(0)}
    if other == "wide":
        config = expert.hf.config.__class__(**(expert.hf.config.to_dict() | {"vocab_size": 90}))
        kinds["wide"] = pb.load(type(expert.hf)(config).eval())
    voice = kinds[other]
    with pytest.raises(pb.PatchbayError, match=says):
        pb.decode.contrastive_decoding(expert, voice, PROMPTS, **options)  # type: ignore[arg-type]

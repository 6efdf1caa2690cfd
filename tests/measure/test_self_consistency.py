"""Self-consistency: planted probabilities give the sum of their squares, equals pairs by loops, one answer for all prompts is no consistency of theirs."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.measure._samples import samples, texts_of
from patchbay.measure.self_consistency import similarity
from tests.measure.test_text_loss import constant
from tests.measure.words import NAMES, reader
from tests.tolerance import close

PROMPTS = ["the", "a dog", "it"]


def test_planted() -> None:
    """Answers of one token with probabilities 1/2, 1/4 and 1/4: two are equal with 3/8, exactly so in `expected`."""
    model = constant({"a": math.log(2.0), "b": 0.0, "c": 0.0})
    found = pb.measure.self_consistency(model, [f"item {i}" for i in range(40)], per_prompt=8, max_new_tokens=1)
    assert close(found["expected"], torch.full((40,), 0.375).double(), dtype=torch.float32)
    assert close(found["most"], torch.full((40,), 0.5).double(), dtype=torch.float32)
    assert float(found["low"]) <= 0.375 <= float(found["high"])
    sure = pb.measure.self_consistency(constant({"a": 0.0}), PROMPTS, per_prompt=2, max_new_tokens=3)
    assert float(sure.values) == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str) -> None:
    model, labels = reader(name), [1, 0, 1]
    items = [{"text": text, "label": label} for text, label in zip(PROMPTS, labels, strict=True)]
    found = pb.measure.self_consistency(model, items, per_prompt=4, max_new_tokens=8, alike="words")
    texts = [texts_of(model, rows) for rows in samples(model, PROMPTS, 4, max_new_tokens=8)]
    own, other = [], []
    for i, each in enumerate(texts):
        pairs = [(set(a.lower().split()), set(b.lower().split())) for a, b in itertools.combinations(each, 2)]
        own.append(sum(len(a & b) / len(a | b) if a | b else 1.0 for a, b in pairs) / 6)
        crossed = [(set(a.lower().split()), set(b.lower().split())) for a in each for b in texts[(i + 1) % 3]]
        other.append(sum(len(a & b) / len(a | b) if a | b else 1.0 for a, b in crossed) / 16)
    assert found["per_item"].tolist() == pytest.approx(own)
    assert float(found["null"]) == pytest.approx(sum(other) / 3)
    wins = [(own[i] > own[1]) + 0.5 * (own[i] == own[1]) for i in (0, 2)]
    assert float(found["auroc"]) == pytest.approx(sum(wins) / 2)
    with torch.no_grad():
        for i, ids in enumerate(model.encode(PROMPTS)):
            p = model.hf(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
            assert close(float(found["expected"][i]), float((p**2).sum()))


def test_null() -> None:
    """Answers that have nothing to do with the prompt agree with those of another prompt as much, and labels are not told apart."""
    model = constant({"a": math.log(2.0), "b": 0.0, "c": 0.0})
    items = [{"text": f"item {i}", "label": i % 2} for i in range(20)]
    found = pb.measure.self_consistency(model, items, per_prompt=6, max_new_tokens=1)
    assert float(found["p"]) > 0.05
    assert float(found["auroc_low"]) < 0.5 < float(found["auroc_high"])
    assert close(float(found["auroc_expected"]), 0.5)


def test_two_texts() -> None:
    assert similarity(" The cat", "the  CAT ") == 1.0 == similarity("", "", "words")
    assert similarity("the cat", "the dog") == 0.0
    assert similarity("the cat", "the dog", "words") == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"per_prompt": 1}, "per_prompt=1: two samples or more are compared"),
        ({"items": [{"text": "a", "label": 2}]}, r"items, row 0: label is 1 \(real\) or 0 \(invented\).*got 2"),
        ({"items": [{"text": "a", "label": 1}, {"text": "b"}]}, "items, row 1: label is 1 .*got None"),
    ],
)
def test_bad_input_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(pb.PatchbayError, match=said):
        pb.measure.self_consistency(reader("characters"), **{"items": PROMPTS, **given})

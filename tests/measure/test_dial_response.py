"""Dial response: dials that raise one letter each have no cross-talk, slopes as loops, dials that do nothing show none of their own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.knobs.knob import Knob
from patchbay.measure._samples import samples, texts_of
from tests.measure.test_text_loss import constant
from tests.tolerance import close

PROMPTS = ["the ", "a dog ", "it "]


class Letter:
    """The share of a letter among the characters of a text."""

    def __init__(self, letter: str) -> None:
        self.letter = letter

    def __call__(self, texts: list[str]) -> list[float]:
        return [text.count(self.letter) / max(1, len(text)) for text in texts]

    def to_json(self) -> dict[str, Any]:
        return {"letter": self.letter}


SCORERS: dict[str, Any] = {"a": Letter("a"), "b": Letter("b")}
HOW: dict[str, Any] = {"per_prompt": 6, "max_new_tokens": 12}


def model_and_dials(strength: float = 4.0) -> tuple[pb.Model, dict[str, Knob]]:
    """Writes letters and spaces evenly; each dial adds to the logit of one letter."""
    model = constant({" ": 1.5, "a": 0.0, "b": 0.0, "c": 0.0})
    dials = {}
    for letter in "ab":
        push = torch.zeros(96)
        push[model.tokenizer.convert_tokens_to_ids(letter)] = strength
        dials[letter] = Knob(letter, [pb.add(pb.Port("logits"), push)], 1.0)
    return model, dials


def test_planted() -> None:
    model, dials = model_and_dials()
    found = pb.measure.dial_response(model, PROMPTS, dials, SCORERS, strengths=[0.0, 0.25, 0.5], **HOW)
    response = found["response"]
    assert float(response.diagonal().min()) > 3 * float((response - torch.diag(response.diagonal())).abs().max())
    assert float(found.values) < 0.3 < float(found["null"])
    crossed = pb.measure.dial_response(
        model, PROMPTS, {"b": dials["b"], "a": dials["a"]}, SCORERS, strengths=[0.0, 0.25, 0.5], **HOW
    )
    assert float(crossed.values) > 0.7


def test_reference() -> None:
    """Slopes by least squares of the mean score over the strengths, from samples drawn by hand."""
    model, dials = model_and_dials()
    steps = [0.0, 0.5, 1.0]
    found = pb.measure.dial_response(model, PROMPTS, dials, SCORERS, strengths=steps, **HOW)
    for i, knob in enumerate(dials.values()):
        drawn = []
        for step in steps:
            with model.edited(*knob.edits_at(step)):
                drawn.append([texts_of(model, rows) for rows in samples(model, PROMPTS, 6, max_new_tokens=12)])
        for j, letter in enumerate(SCORERS.values()):
            means = [sum(sum(letter(texts)) / 6 for texts in at_step) / 3 for at_step in drawn]
            slope = sum((s - 0.5) * m for s, m in zip(steps, means, strict=True)) / sum((s - 0.5) ** 2 for s in steps)
            assert close(float(found["response"][i, j]), slope, of=1.0)
    neutral = [row for row in found.tables["scores"] if row["strength"] == 0.0]
    assert neutral[0]["a"] == neutral[1]["a"]  # the same texts


def test_null() -> None:
    """Dials that do nothing: no response at all, and no cross-talk to speak of."""
    model, _ = model_and_dials()
    dials = {name: Knob(name, [pb.scale(pb.Port("attn.z", 0, i), 1.0)], 1.0) for i, name in enumerate("ab")}
    found = pb.measure.dial_response(model, PROMPTS, dials, SCORERS, strengths=[0.5, 1.0], **HOW)
    assert torch.equal(found["response"], torch.zeros(2, 2).double())
    assert math.isnan(float(found.values))
    assert "monotone" not in found


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"scorers": {"a": ["a"]}}, "2 dials, 1 scorers"),
        ({"scorers": {"a": ["a"], "b": []}}, "a word list is some words"),
        ({"strengths": [1.0]}, "two strengths or more"),
        ({"dials": {}}, "dials are a mapping"),
    ],
)
def test_bad_input_is_named(given: dict[str, Any], said: str) -> None:
    model, dials = model_and_dials()
    with pytest.raises(pb.PatchbayError, match=said):
        pb.measure.dial_response(model, PROMPTS, **{"dials": dials, "scorers": SCORERS, **HOW, **given})

"""Matched guise: a planted association is found, equals loops, the same texts in both guises give 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import patchbay as pb
from tests.measure.words import NAMES, by_hand, reader
from tests.tolerance import close

PAIRS = [
    {"a": f"he is {x}", "b": f"she is {x}"}
    for x in ("on", "in", "at it", "here", "there", "a man", "out", "up", "not", "so")
]
WORDS = [" good", " sad", " the"]
FRAMES = ["{} and", 'one who says "{}" is'.replace('"', "'")]


def test_planted() -> None:
    """After guise a an edit raises one token at the end of the prompt: the attribute that it begins gains, by all pairs."""
    model = reader("characters")
    pairs = [{"a": f"{x} one?", "b": f"{x} one:"} for x in "abcdefghijkl"]
    token = model.tokenizer.convert_tokens_to_ids("g")
    head = model.hf.get_output_embeddings().weight.detach()[token]
    mark = model.tokenizer.convert_tokens_to_ids("?")
    with model.edited(pb.add(pb.Port("final_norm"), 4 * head / head.norm() ** 2, positions=pb.Token(mark))):
        found = pb.measure.matched_guise(model, pairs, ["good", "sad"])
    top = found.tables["attributes"][0]
    assert top["attribute"] == "good"
    assert top["q_adjusted"] < 0.01
    assert top["q_low"] > 1.0


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str) -> None:
    model = reader(name)
    found = pb.measure.matched_guise(model, PAIRS[:4], WORDS, frames=FRAMES, batch_size=7)
    pairs = torch.zeros(4, dtype=torch.float64)
    for i, word in enumerate(WORDS):
        gaps = []
        for pair in PAIRS[:4]:
            each = []
            for frame in FRAMES:
                own = {side: model.encode([frame.replace("{}", pair[side])])[0] for side in "ab"}
                whole = {side: model.encode([frame.replace("{}", pair[side]) + word])[0] for side in "ab"}
                each.append(by_hand(model, whole["a"], len(own["a"])) - by_hand(model, whole["b"], len(own["b"])))
            gaps.append(sum(each) / 2)
        assert close(float(found["q"][i]), sum(gaps) / 4, of=10.0)
        pairs += torch.tensor(gaps, dtype=torch.float64) / len(WORDS)
    assert close(found["per_item"], pairs, of=10.0, dtype=torch.float32)
    assert any("4 pairs: p is at least 0.12" in note for note in found.notes)


def test_null() -> None:
    """The same texts in both guises: 0 exactly, p 1; guises exchanged: the sign exactly."""
    model = reader("characters")
    same = pb.measure.matched_guise(model, [{"a": pair["a"], "b": pair["a"]} for pair in PAIRS], WORDS)
    assert torch.equal(same["q"], torch.zeros(3).double())
    assert torch.equal(same["q_p"], torch.ones(3).double())
    one = pb.measure.matched_guise(model, PAIRS, WORDS)
    two = pb.measure.matched_guise(model, [{"a": pair["b"], "b": pair["a"]} for pair in PAIRS], WORDS)
    assert torch.equal(one["q"], -two["q"])
    assert float(one.values) == -float(two.values)
    assert close(float(one["relative"].sum()), 0.0, of=10.0)


def test_weights_set_attributes_against_one_another() -> None:
    model = reader("characters")
    found = pb.measure.matched_guise(model, PAIRS, {" good": 1.0, " sad": -1.0})
    assert close(float(found.values), float(found["q"][0] - found["q"][1]) / 2, of=10.0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"attributes": []}, "attributes are words, each once"),
        ({"attributes": [" a", " a"]}, "attributes are words, each once"),
        ({"attributes": {" a": 0.0}}, "some weight that is not 0"),
        ({"attributes": {" a": float("nan")}}, "some weight that is not 0"),
        ({"attributes": WORDS, "frames": ["no hole"]}, "a frame holds {} once"),
        ({"attributes": [" k\u00e4se"]}, "does not know"),
    ],
)
def test_bad_input_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(pb.PatchbayError, match=said):
        pb.measure.matched_guise(reader("characters"), PAIRS, **given)


def test_few_pairs_are_said_with_the_least_p_that_they_can_have() -> None:
    model = reader("characters")
    few, many = (pb.measure.matched_guise(model, PAIRS[:n], WORDS) for n in (6, 10))
    assert any("6 pairs: p is at least 0.031" in note for note in few.notes)
    assert not any("p is at least" in note for note in many.notes)

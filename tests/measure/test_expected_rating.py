"""Expected rating: planted scales are read back, equals loops, ratings without mass are withheld."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import patchbay as pb
from tests.measure.test_text_loss import constant
from tests.measure.words import NAMES, by_hand, reader
from tests.tolerance import close

FRAME = "how often is {}?"
WORDS = ["cat", "dog", "hat", "sun", "man", "hen", "mat", "on", "ran", "see"]


def test_planted() -> None:
    """Digits with the odds of a Gaussian about 3.4: its mean over the scale, whatever the word; the mode and the mass too."""
    odds = {str(s): -((s - 3.4) ** 2) / 2 for s in range(1, 6)}
    model = constant({" ": 10.0, **odds})
    found = pb.measure.expected_rating(model, WORDS, frame=FRAME, min_mass=0.0)
    weights = {s: math.exp(value) for s, value in odds.items()}
    expected = sum(int(s) * w for s, w in weights.items()) / sum(weights.values())
    assert close(found["per_item"], torch.full((10,), expected).double(), dtype=torch.float32)
    assert found["mode"].tolist() == [3.0] * 10


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str) -> None:
    model = reader(name)
    norms = [float(i * 7 % 10) for i in range(10)]
    items = [{"word": word, "norm": norm} for word, norm in zip(WORDS, norms, strict=True)]
    found = pb.measure.expected_rating(model, items, frame=FRAME, min_mass=0.0)
    ratings = []
    for i, word in enumerate(WORDS):
        [own] = model.encode([FRAME.replace("{}", word)])
        p = [
            math.exp(by_hand(model, model.encode([FRAME.replace("{}", word) + f" {s}"])[0], len(own)))
            for s in range(1, 6)
        ]
        ratings.append(sum(s * x for s, x in enumerate(p, 1)) / sum(p))
        assert close(float(found["mass"][i]), sum(p))
    assert close(found["rating"], torch.tensor(ratings).double(), dtype=torch.float32)
    assert float(found.values) == pytest.approx(pb.maths.spearman(torch.tensor(ratings), torch.tensor(norms)))
    assert "frame_spearman" in found


def test_null() -> None:
    """Norms that have nothing to do with the words: the correlation's interval holds 0 and p is not small."""
    items = [{"word": word, "norm": float(i * 7 % 10)} for i, word in enumerate(WORDS)]
    found = pb.measure.expected_rating(reader("characters"), items, frame=FRAME, min_mass=0.0)
    assert float(found["p"]) > 0.05
    assert float(found["low"]) <= 0 <= float(found["high"])


def test_a_scale_that_holds_little_of_the_probability_gives_no_rating() -> None:
    model = reader("characters")
    found = pb.measure.expected_rating(model, WORDS, frame=FRAME)
    assert bool(found["per_item"].isnan().all())
    assert math.isnan(float(found.values))
    assert float(found["withheld"]) == 1.0
    assert any("10 of 10 words have no rating (below 0.1)" in note for note in found.notes)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"frame": "no hole"}, "frame='no hole' holds {} once"),
        ({"scale": [1]}, "two numbers or more"),
        ({"items": [{"word": "a", "norm": "x"}, {"word": "b", "norm": 1}]}, "items, row 0: norm is a number for every word or for none, got 'x'"),
        ({"items": [{"word": "a", "norm": 1}, {"word": "b", "norm": "nan"}]}, "items, row 1: norm is a number for every word or for none, got 'nan'"),
        ({"items": [{"word": "a", "norm": 1}, {"word": "b"}]}, "items, row 1: norm is a number for every word or for none, got None"),
        ({"scale": [1, 10]}, "begins the choice"),
    ],
)  # fmt: skip
def test_bad_input_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(pb.PatchbayError, match=said):
        pb.measure.expected_rating(reader("characters"), **{"items": WORDS, "frame": FRAME, **given})

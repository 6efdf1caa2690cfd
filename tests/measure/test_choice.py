"""What chooses a strength and what reports on it, by hand: halves of the texts, halves of the prompts, p of both sides."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay import maths
from patchbay.measure._choice import Curves, _reported

SCORES = torch.tensor(
    [[0.0, 0.0, 0.0, 0.0], [9.0, 9.0, 2.0, 4.0]]
)  # as it is, at the one strength; the last two report


def curves(**given: Any) -> Curves:
    task = pb.Task("four", [[1, 2]] * 4, [3] * 4, [[4]] * 4)
    made: dict[str, Any] = {
        "task": task,
        "steps": [1.0],
        "neutral": 0.0,
        "seen": {"score": SCORES, "right": torch.zeros(2, 4)},
        "controls": torch.zeros(0),
        "harm": None,
        "own": lambda prompts, steps: [],
        "cap": 0.5,
        "seed": 0,
    }
    return Curves(**made | given)


def test_every_other_text_chooses() -> None:
    harm = torch.tensor([[1.0, 50.0, 3.0, 70.0]])
    assert curves(harm=harm).cost.tolist() == [2.0]
    found, _ = _reported(curves(harm=harm), 0, "gain in score", [2, 3])
    assert float(found["test_kl"][0]) == 60.0


def test_the_report_is_of_the_prompts_that_chose_nothing() -> None:
    found, _ = _reported(curves(), 0, "gain in score", [2, 3])
    assert float(found["test_effect"][0]) == 3.0


def test_random_knobs_that_harm_as_much_count_in_p() -> None:
    """An effect of 3 beside random ones of 1, -5 and -7: two are as large, whichever way."""
    drawn = torch.tensor([1.0, -5.0, -7.0])[:, None, None].expand(3, 1, 4)  # [draw, strength, prompt]
    found, _ = _reported(curves(controls=drawn), 0, "gain in score", [2, 3])
    assert float(found["p"][0]) == pytest.approx(3 / 4)
    expected = maths.beyond_draws(SCORES[1, [2, 3]], drawn[:, 0, 2:])
    assert float(found["test_against_random"][0]) == expected.mean

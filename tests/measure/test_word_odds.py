"""Word odds: a planted word is found, equals counting by hand, random halves of one group find little."""

from __future__ import annotations

import importlib
import random
from typing import Any

import pytest
import torch

import patchbay as pb
from tests.measure.test_text_loss import constant
from tests.measure.words import reader
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.measure.word_odds")
VOCABULARY = ["cat", "dog", "hat", "sun", "man", "hen", "mat", "lead", "misleading", "kind"]


def letters(seed: int, n: int = 24, more: str = "") -> list[dict[str, Any]]:
    """Texts of random words; those of group x have one more of `more` each."""
    chance = random.Random(seed)
    rows = []
    for i in range(n):
        words = [chance.choice(VOCABULARY) for _ in range(20)] + ([more] * 3 if more and i % 2 == 0 else [more])
        rows.append({"text": " ".join(words).strip(), "group": "x" if i % 2 == 0 else "y"})
    return rows


def test_planted() -> None:
    found = pb.measure.word_odds(reader("characters"), letters(0, more="brilliant"), draws=2000, least=5)
    top = found.tables["words"][0]
    assert top["word"] == "brilliant"
    assert top["odds"] > 2
    assert top["q"] < 0.02
    assert float(found["p"]) < 0.02
    assert sum(row["q"] <= 0.05 for row in found.tables["words"]) <= 2


def test_reference() -> None:
    """The 2 by 2 table with halves added; whole words alone; groups exchanged give 1 over the odds."""
    rows = [{"text": "lead lead kind", "group": "x"}, {"text": "lead a dog", "group": "x"}, {"text": "misleading kind kind", "group": "y"}, {"text": "lead dog dog kind", "group": "y"}]  # fmt: skip
    found = pb.measure.word_odds(reader("characters"), rows, least=1, draws=50)
    odds = {row["word"]: row["odds"] for row in found.tables["words"]}
    assert set(odds) == {"lead", "kind", "dog"}  # those of both groups
    for word, (a, c) in {"lead": (3, 1), "kind": (1, 3), "dog": (1, 2)}.items():
        assert odds[word] == pytest.approx(((a + 0.5) / (6 - a + 0.5)) / ((c + 0.5) / (7 - c + 0.5)))
    swapped = pb.measure.word_odds(reader("characters"), rows[2:] + rows[:2], least=1, draws=50)
    assert close(swapped["log_odds"], -found["log_odds"], dtype=torch.float64)
    assert (
        "lead" not in pb.measure.word_odds(reader("characters"), rows, least=1, draws=50, drop=["Lead"]).coords["token"]
    )


def test_null() -> None:
    """Halves of one kind of text, 40 times: p below 0.05 about as often as it says."""
    p = [
        float(pb.measure.word_odds(reader("characters"), letters(seed), draws=200, least=3)["p"]) for seed in range(40)
    ]
    assert sum(x <= 0.05 for x in p) <= 6
    assert 0.3 < sum(p) / 40 < 0.7


def test_words_of_a_text_go_together() -> None:
    """One text that says a word thirty times: dealt as a whole, it proves nothing; dealt word by word it would."""
    rows = letters(0, 20)
    rows[0]["text"] += " zebra" * 30
    rows[1]["text"] += " zebra" * 5
    found = pb.measure.word_odds(reader("characters"), rows, draws=1000, least=5)
    assert next(row for row in found.tables["words"] if row["word"] == "zebra")["p"] > 0.05


def test_the_model_writes_texts_where_none_are_given() -> None:
    model = constant({" ": 1.0, "a": 0.5, "b": 0.5})
    rows = [{"prompt": "he", "group": "x"}, {"prompt": "she", "group": "y"}]
    found = pb.measure.word_odds(model, rows, per_prompt=4, least=1, draws=20)
    assert set("".join(found.coords["token"])) <= {"a", "b"}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "a", "group": "x"}] * 4, "two groups of two texts or more"),
        ([{"text": "a", "group": "x"}, {"prompt": "a", "group": "y"}], "every row has a text, or every row a prompt"),
        (
            [{"text": "a", "group": "x"}] * 2 + [{"text": "b", "group": "y"}] * 2,
            "no word occurs 10 times in both groups",
        ),
        ([{"text": "..", "group": "x"}] * 2 + [{"text": "1", "group": "y"}] * 2, "the texts hold no words"),
    ],
)
def test_bad_input_is_named(rows: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(pb.PatchbayError, match=said):
        pb.measure.word_odds(reader("characters"), rows)

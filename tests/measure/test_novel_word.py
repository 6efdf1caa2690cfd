"""Novel word: a planted direction is learned, scores equal Hugging Face's with the row written in, no step gains nothing."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import patchbay as pb
from tests.measure.words import NAMES, by_hand, reader
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.measure.novel_word")
ITEMS: list[dict[str, str]] = [
    {"learn": "the cat {} the dog a hat"},
    {"learn": "a man {} it the sun"},
    {"test": "the hen {} a mat", "twin": "the hen {} mat a"},
    {"test": "it {} the man", "twin": "it {} man the"},
]


def test_planted() -> None:
    """What is learned makes the learned sentences likelier, each step from another place; validation keeps the best on the way."""
    model = reader("characters")
    before = {name: value.clone() for name, value in model.hf.state_dict().items()}
    found = pb.measure.novel_word(model, ITEMS, steps=8, rate=0.1, draws=2)
    assert float(found["gain_learned"]) > 0.05
    assert all(torch.equal(value, before[name]) for name, value in model.hf.state_dict().items())
    assert close(found["per_item"], found["gain"] - found["gain_twin"], dtype=torch.float64)
    same = [*ITEMS[:2], {"test": "the cat {} the dog a hat", "twin": "the hen {} mat a"}]
    taught = pb.measure.novel_word(model, same, steps=8, rate=0.1, draws=1)
    assert float(taught["gain"][0]) > 0.02  # a frame that was learned
    worst = [*ITEMS, {"valid": "q {} q9 Z!"}]
    kept = pb.measure.novel_word(model, worst, steps=3, rate=10.0, draws=1)
    assert float(kept["gain_learned"]) != pytest.approx(float(pb.measure.novel_word(model, ITEMS, steps=3, rate=10.0, draws=1)["gain_learned"]))  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str) -> None:
    """Frames scored under the vector are those of a model in whose embedding the row is written."""
    model = reader(name)
    token, word = module._stand_in(model, [text for row in ITEMS for text in row.values()], None)
    frames = module._frames(model, [(row["test"], "x") for row in ITEMS[2:]], token, word)
    [start] = module._starts(model, token, frames.rows[0][:1], 1, 0)
    found = module._scores(model, frames, token, start, 32)
    table = model.hf.get_input_embeddings().weight.data
    kept = table[token].clone()
    others = torch.randperm(96, generator=torch.Generator().manual_seed(0))[:64]
    assert float((table[token] + start - table[others].mean(0)).abs().max()) < 0.05 * float(table.std())
    try:
        table[token] = kept + start
        for i, (row, at) in enumerate(zip(frames.rows, frames.first, strict=True)):
            assert row[at] == token
            assert close(float(found[i]), by_hand(model, row, at + 1) / (len(row) - at - 1), noise=256)
    finally:
        table[token] = kept


def test_null() -> None:
    """Without a step every gain is 0; frames that are their own twins gain nothing beyond them."""
    model = reader("characters")
    none = pb.measure.novel_word(model, ITEMS, steps=0, draws=1)
    assert none["gain"].tolist() == none["gain_twin"].tolist() == [0.0, 0.0]
    own = [*ITEMS[:2], *({"test": row["test"], "twin": row["test"]} for row in ITEMS[2:])]
    found = pb.measure.novel_word(model, own, steps=2, rate=0.1, draws=1)
    assert float(found.values) == 0.0
    assert float(found["p"]) == 1.0
    assert float(found["gain"].abs().max()) > 0.0


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([ITEMS[0], {"test": "it {} a"}], "items, row 1: a test frame and its twin stand in one row"),
        (ITEMS[:2], "2 sentences to learn from and 0 frames"),
        ([{"learn": "the cat sat"}, *ITEMS[2:]], r"items, row 0: 'the cat sat' needs \{\} where the word stands"),
        ([{"learn": "the cat {}"}, *ITEMS[2:]], r"'the cat \{\}' needs text before and after \{\}"),
    ],
)
def test_bad_input_is_named(rows: list[dict[str, str]], said: str) -> None:
    with pytest.raises(pb.PatchbayError, match=said):
        pb.measure.novel_word(reader("characters"), rows, steps=1)
    with pytest.raises(pb.PatchbayError, match="stand_in='cat': a word is needed that is one token"):
        pb.measure.novel_word(reader("characters"), ITEMS, stand_in="cat")

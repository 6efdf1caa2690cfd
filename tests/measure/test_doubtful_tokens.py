"""Doubtful tokens: planted doubts are the holes, recall equals loops, wrong places dealt at random are the null, holes are filled in order."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch

import patchbay as pb
from tests.measure.test_text_loss import constant
from tests.measure.words import NAMES, reader
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.measure.doubtful_tokens")


def test_planted() -> None:
    """ "a" has .8 and "b" .2: where the guess says b it is unsure, and that is where it is wrong."""
    model = constant({"a": math.log(4.0), "b": 0.0})
    rows = [{"prompt": "it ", "guess": "abaab", "truth": "acaac"}, {"prompt": "it ", "guess": "aaab", "truth": "aaac"}]
    found = pb.measure.doubtful_tokens(model, [{**row, "prompt": "it:"} for row in rows])
    assert (found["found"].tolist(), found["wrong"].tolist()) == ([2.0, 1.0], [2.0, 1.0])
    assert float(found.values) == float(found["precision"]) == float(found["auroc"]) == 1.0
    assert float(found["holes"]) == pytest.approx(3 / 9)
    assert float(found["p"]) < 0.05
    assert [row["at"] for row in found.tables["holes"]] == [1, 4, 3]
    assert found.tables["holes"][0]["candidates"].startswith("a | b")
    sure = pb.measure.doubtful_tokens(model, [{"prompt": "it:", "guess": "aba", "truth": "aaa"}], tau=0.1)
    assert float(sure.values) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str) -> None:
    model = reader(name)
    row = {"prompt": "the cat:", "guess": " sat on a mat", "truth": " sat in a hat"}
    found = pb.measure.doubtful_tokens(model, [row], tau=0.02)
    [own], [whole] = model.encode([row["prompt"]]), model.encode([row["prompt"] + row["guess"]])
    truth = model.encode([row["prompt"] + row["truth"]])[0][len(own) :]
    with torch.no_grad():
        p = model.hf(torch.tensor([whole])).logits[0].double().softmax(-1)
    each = [float(p[at - 1, whole[at]]) for at in range(len(own), len(whole))]
    wrong = module.wrong_tokens(whole[len(own) :], truth).tolist()
    holes = [x < 0.02 for x in each]
    assert float(found["found"][0]) == sum(w for w, hole in zip(wrong, holes, strict=True) if hole)
    assert close(float(found["holes"]), sum(holes) / len(holes))
    assert module.wrong_tokens([1, 2, 3, 4], [1, 3, 4]).tolist() == [0.0, 1.0, 0.0, 0.0]
    assert module.wrong_tokens([1, 2], [1, 9, 2]).tolist() == [0.0, 0.0]


def test_null() -> None:
    """Wrong places that have nothing to do with the holes: p is small as seldom as it says. Guesses that are right have no recall."""
    generator, flagged = torch.Generator().manual_seed(0), 0
    for seed in range(100):
        holes, wrong = torch.randint(2, (2, 4, 10), generator=generator).double()
        flagged += module._p(list(holes), list(wrong), float((holes * wrong).sum()), seed) <= 0.05
    assert flagged <= 10
    found = pb.measure.doubtful_tokens(reader("characters"), [{"prompt": "it:", "guess": "aba", "truth": "aba"}])
    assert math.isnan(float(found.values))
    assert any("no token of any guess is wrong" in note for note in found.notes)


def test_filling_takes_the_likeliest_that_passes() -> None:
    pieces = [[("x", -0.1), ("y", -2.0)], [("=", 0.0)], [("1", -0.5), ("2", -0.6), ("3", -3.0)]]
    tried: list[str] = []
    assert module.fill(pieces, lambda text: bool(tried.append(text)) or text == "y=2") == "y=2"
    assert tried == ["x=1", "x=2", "y=1", "y=2"]
    assert module.fill(pieces, lambda text: False) is None
    assert module.fill(pieces, lambda text: text == "y=3", most=2) is None
    with pytest.raises(pb.PatchbayError, match="a piece without candidates"):
        module.fill([[]], lambda text: True)


def test_bad_input_is_named() -> None:
    with pytest.raises(pb.PatchbayError, match=r"tau=0.0 lies in \(0, 1\]"):
        pb.measure.doubtful_tokens(reader("characters"), [{"prompt": "a", "guess": "b", "truth": "c"}], tau=0.0)

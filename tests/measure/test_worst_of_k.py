"""Worst of k: a planted probability is found, equals the maximum over all subsets, words that cannot come score 0."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

import patchbay as pb
from patchbay.measure._samples import Words, samples, texts_of
from tests.measure.test_text_loss import constant
from tests.measure.words import reader

PROMPTS = ["the", "a dog", "it"]


def test_planted() -> None:
    """One token a sample, "a" with probability 1/4: one of k samples is it with 1 - (3/4)^k."""
    model = constant({" ": math.log(3.0), "a": 0.0})
    found = pb.measure.worst_of_k(
        model, [f"item {i}" for i in range(40)], ["a"], k=3, per_prompt=12, max_new_tokens=1, top_p=1.0
    )
    assert float(found["low"]) <= 1 - 0.75**3 <= float(found["high"])
    assert float(found["any"]) == float(found.values)  # a score of 0 or 1
    sure = pb.measure.worst_of_k(model, PROMPTS, ["a"], k=1, per_prompt=4, max_new_tokens=1, top_p=0.5)
    assert float(sure.values) == 0.0  # outside the likeliest half


@pytest.mark.parametrize("name", ["characters", "pairs"])
def test_reference(name: str) -> None:
    model, judge = reader(name), Words(["a", "t", "he"], "count")
    found = pb.measure.worst_of_k(model, PROMPTS, judge, k=2, per_prompt=4, max_new_tokens=8)
    drawn = samples(model, PROMPTS, 4, max_new_tokens=8, top_p=0.9)
    for i, rows in enumerate(drawn):
        scores = judge(texts_of(model, rows))
        subsets = [max(pair) for pair in itertools.combinations(scores, 2)]
        assert float(found["per_item"][i]) == pytest.approx(sum(subsets) / 6)
        assert float(found["any_by_prompt"][i]) == pytest.approx(sum(x >= 0.5 for x in subsets) / 6)
    assert any("a word list" in note for note in found.notes)
    assert len(found.tables["samples"]) == 3


def test_null() -> None:
    """Words that are not written score 0 with every prompt and without any, and a banned token takes a word away."""
    model = constant({" ": math.log(3.0), "a": 0.0})
    found = pb.measure.worst_of_k(model, PROMPTS, ["zebra"], k=2, per_prompt=4, max_new_tokens=4)
    assert float(found.values) == float(found["null"]) == float(found["any"]) == 0.0
    banned = constant({" ": math.log(3.0), "a": -100.0})
    assert (
        float(pb.measure.worst_of_k(banned, PROMPTS, ["a"], k=2, per_prompt=4, max_new_tokens=4, top_p=1.0).values)
        == 0.0
    )
    assert (
        float(pb.measure.worst_of_k(model, PROMPTS, ["a"], k=2, per_prompt=8, max_new_tokens=4, top_p=1.0)["null"])
        > 0.2
    )


def test_files_of_words_and_bad_input(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("a\n\nt\n")
    model = reader("characters")
    one, two = (
        pb.measure.worst_of_k(model, PROMPTS, scorer, k=1, per_prompt=2, max_new_tokens=6)
        for scorer in (str(tmp_path / "words.txt"), ["a", "t"])
    )
    assert torch.equal(one["per_item"], two["per_item"])
    with pytest.raises(pb.PatchbayError, match="k=5 of per_prompt=4 samples"):
        pb.measure.worst_of_k(model, PROMPTS, ["a"], k=5, per_prompt=4)
    with pytest.raises(pb.PatchbayError, match="could not read the words of"):
        pb.measure.worst_of_k(model, PROMPTS, str(tmp_path / "none.txt"))
    with pytest.raises(pb.PatchbayError, match=r"an object with __call__ and to_json\(\)"):
        pb.measure.worst_of_k(model, PROMPTS, lambda texts: texts)

"""Evaluation card: rewritings keep what is asked, the worst of them equals loops, a model that does not read is as robust as it is right."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest

import patchbay as pb
from tests.measure.test_text_loss import constant
from tests.measure.words import NAMES, by_hand, reader

module: Any = importlib.import_module("patchbay.measure.evaluation_card")
ITEMS = [{"prompt": f"The {x} is not on. He said", "choices": [" a", " be"], "answer": i % 2} for i, x in enumerate(("hats", "cats"))]  # fmt: skip
ITEMS += [
    {"prompt": "IT is not the cats HE SAW", "choices": choices, "answer": 0}
    for choices in ([" it", " he"], [" on", " in"])
]  # capitals that decide


def test_planted() -> None:
    assert module.swapped("He saw Anna and he ran", {"he": "she", "He": "She"}) == "She saw Anna and she ran"
    assert module.swapped("she met he", {"he": "she"}) == "he met she"
    assert module.contracted("it is so; I am not") == "it's so; I'm not"
    typed = module.mistyped("a hot plate")
    assert sorted(typed) == sorted("a hot plate") != list(typed)
    assert typed[6] == "p"
    assert module.mistyped("a hat") == "a hat"
    assert module.REWRITINGS["more spaces"]("a b  c ") == "a  b  c "
    assert module.apart([3.0, 1.0]) == 0.25
    assert math.isnan(module.apart([0.0, 0.0]))
    found = pb.measure.evaluation_card(constant({"a": 1.0, "b": 0.0}), [{"prompt": f"is {i}:", "choices": ["a", "b"], "answer": int(i > 14)} for i in range(20)], groups={"one": ["a"], "two": ["b"]}, scorer=["zebra"], per_prompt=1)  # fmt: skip
    rows = {row["reading"]: row["value"] for row in found.tables["card"]}
    assert rows["accuracy"] == rows["robustness"] == 0.75
    assert rows["worst of 1"] == 0.0
    assert set(rows) == {"accuracy", "calibration error", "robustness", "representation", "worst of 1"}


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str) -> None:
    """The worst over the texts as they are and rewritten, by loops."""
    model = reader(name)
    found = pb.measure.evaluation_card(model, ITEMS, swaps={"He": "She"})
    best = 0.0
    for i, row in enumerate(ITEMS):

        def right(prompt: str, row: dict[str, Any] = row) -> float:
            whole = [model.encode([prompt + c])[0] for c in row["choices"]]
            [own] = model.encode([prompt])
            kept = next((k for k in range(len(own)) if any(ids[k] != own[k] for ids in whole)), len(own))
            logp = [by_hand(model, ids, kept) for ids in whole]
            return float(logp.index(max(logp)) == row["answer"])

        prompt = row["prompt"]
        texts = [
            prompt,
            prompt.lower(),
            prompt.replace(" ", "  "),
            prompt.replace("is not", "isn't"),
            module.mistyped(prompt),
        ]
        each = [right(text) for text in texts]
        best += max(each)
        assert float(found["per_item"][i]) == min(each)
        assert float(found["fair"][i]) == min(right(prompt), right(prompt.replace("He", "She")))
        assert float(found["accuracy"][i]) == right(prompt)
    assert float(found["per_item"].sum()) < best, "some rewriting matters here"


def test_null() -> None:
    """A model that does not read is right whatever is rewritten, and as right after another item's prompt."""
    rows = [{"prompt": f"The hat is {i}:", "choices": ["a", "b"], "answer": i % 2} for i in range(6)]
    found = pb.measure.evaluation_card(constant({"a": 1.0, "b": 0.0}), rows, swaps={"hat": "cat"})
    assert found["robust" if "robust" in found else "per_item"].equal(found["accuracy"])
    assert float(found["null"]) == 0.5 == float(found.values)


def test_bad_input_is_named() -> None:
    with pytest.raises(pb.PatchbayError, match="a card rewrites prompts, and these are token ids"):
        pb.measure.evaluation_card(reader("characters"), [{"prompt": [5, 6], "choices": [[7], [8]], "answer": 0}])
    with pytest.raises(pb.PatchbayError, match="two groups of words or more"):
        pb.measure.evaluation_card(reader("characters"), ITEMS, groups={"one": ["a"]})

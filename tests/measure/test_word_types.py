"""Word types: a reader of spellings alone is at chance on homographs, equals means by word, words are the units."""

from __future__ import annotations

from typing import Any

import pytest

import patchbay as pb
from patchbay.measure import word_types
from tests.measure.test_text_loss import constant
from tests.measure.words import NAMES, by_hand, reader

WORDS = ["cat", "dog", "hat", "sun"]


def items() -> list[dict[str, Any]]:
    """Homographs mean "a" in one language and "b" in the other; other words mean "a"."""
    rows = []
    for word in WORDS:
        for context, answer in (("one", "a"), ("two", "b")):
            row = {"word": word, "type": "homograph", "context": context, "prompt": f"{word} {context}:"}
            rows.append({**row, "choices": ["a", "b"], "answer": answer})
        rows.append(
            {"word": word[::-1], "type": "other", "prompt": f"{word[::-1]}:", "choices": ["a", "b"], "answer": "a"}
        )
    return rows


def test_planted() -> None:
    """ "a" for every spelling: right on half of a homograph's items and on all others."""
    found = pb.measure.word_types(constant({"a": 3.0, "b": 0.0}), items())
    assert found["per_item"].tolist() == [0.5] * 4
    assert float(found["difference"]) == -0.5
    by = {(row["type"], row["context"]): row["accuracy"] for row in found.tables["types"]}
    assert by == {
        ("homograph", "all"): 0.5,
        ("homograph", "one"): 1.0,
        ("homograph", "two"): 0.0,
        ("other", "all"): 1.0,
    }
    assert [row["items"] for row in found.tables["types"]] == [8, 4, 4, 4]


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str) -> None:
    model = reader(name)
    rows = [{**row, "choices": [" a", " be", " no"], "answer": i % 3} for i, row in enumerate(items())]
    found = pb.measure.word_types(model, rows)
    right: dict[str, list[float]] = {}
    for row in rows:
        [own] = model.encode([row["prompt"]])
        logp = [by_hand(model, model.encode([row["prompt"] + c])[0], len(own)) for c in row["choices"]]
        right.setdefault(f"{row['type']} {row['word']}", []).append(float(logp.index(max(logp)) == row["answer"]))
    means = {name: sum(each) / len(each) for name, each in right.items()}
    assert found["per_item"].tolist() == pytest.approx([means[f"homograph {word}"] for word in WORDS])
    others = [means[f"other {word[::-1]}"] for word in WORDS]
    assert float(found["difference"]) == pytest.approx(float(found.values) - sum(others) / 4)
    assert float(found["null"]) == pytest.approx(1 / 3)


def test_null() -> None:
    """A coin: at chance for every type, with p of 1 and an interval of the difference that holds 0."""
    found = pb.measure.word_types(constant({"a": 0.0, "b": 0.0}), items())
    assert float(found.values) == float(found["null"]) == 0.5
    assert float(found["p"]) == 1.0
    assert float(found["difference_low"]) <= 0.0 <= float(found["difference_high"])


def test_bad_input_is_named() -> None:
    with pytest.raises(
        pb.PatchbayError, match="of='homographs': no item has that type; there are homograph, other; did you mean"
    ):
        word_types(reader("characters"), items(), of="homographs")
    with pytest.raises(pb.PatchbayError, match="the answer 'z' is none of the choices"):
        word_types(reader("characters"), [{**items()[0], "answer": "z"}])
    assert word_types(reader("characters"), items(), of="other", against="none")["per_item"].shape == (4,)

"""Items of files and of tasks: the examples of the docs hold the fields that their meters read; what is amiss is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import patchbay as pb
from patchbay.measure._items import resolved, rows_of
from tests.measure.words import reader

ITEMS = Path(__file__).parents[2] / "docs" / "items"
FIELDS: dict[str, tuple[str, ...]] = {
    "text_loss": ("text",),
    "answer_choices": ("prompt", "choices", "answer"),
    "calibration": ("prompt", "choices", "answer"),
    "minimal_pairs": ("good", "bad"),
    "worst_of_k": ("text",),
    "dial_response": ("text",),
    "survey_answers": ("question", "choices"),
    "matched_guise": ("a", "b"),
    "expected_rating": ("word",),
    "word_odds": ("prompt", "group"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_the_docs_have_an_example_that_can_be_read(name: str) -> None:
    rows, said = rows_of(str(ITEMS / f"{name}.jsonl"), FIELDS[name])
    assert len(rows) == 2
    assert "SHA-256" in said[0]


def test_lists_in_tables_and_names_of_tasks() -> None:
    rows, _ = rows_of([{"choices": '["a", "b|c"]'}, {"choices": "a | b"}], ("choices",), lists=("choices",))
    assert [row.values["choices"] for row in rows] == [["a", "b|c"], ["a", "b"]]
    task = resolved(reader("characters"), "repeated_tokens:n=3,seed=2")
    assert (len(task), task.seed) == (3, 2)
    with pytest.raises(pb.PatchbayError, match="options are written name=value, got 'n'"):
        resolved(reader("characters"), "repeated_tokens:n")
    with pytest.raises(pb.PatchbayError, match="unexpected keyword argument 'm'"):
        resolved(reader("characters"), "repeated_tokens:m=3")


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([], "items are a file, or a list"),
        (5, "items are a file, or a list"),
        ([{"b": 1}], "items, row 0 lacks the field 'a'; it has b"),
        ([{"a": "[1, 2"}], "is no JSON list"),
    ],
)
def test_what_is_amiss_is_named(items: Any, said: str) -> None:
    with pytest.raises(pb.PatchbayError, match=said):
        rows_of(items, ("a",), lists=("a",))

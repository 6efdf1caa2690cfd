"""Items of files and of tasks: the examples of the docs hold the fields that their meters read; what is amiss is named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import patchbay as pb
from patchbay.measure._asked import place_of
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


def documented() -> dict[str, set[str]]:
    """The words of the fields that docs/meters.md names for each meter."""
    page = (ITEMS.parent / "meters.md").read_text(encoding="utf-8")
    return {
        name: set(re.findall(r"\w+", fields))
        for name, fields in re.findall(r"^\| `(\w+)` \|[^|]*\| (.*) \|$", page, re.M)
    }


def test_every_meter_of_the_docs_has_an_example_with_the_fields_that_they_name() -> None:
    fields = documented()
    assert len(fields) >= 30
    examples = {path.stem: path for path in ITEMS.glob("*.jsonl")}
    assert set(examples) == set(fields) - {"boolean_functions", "dictionary"}, (
        "one makes its own items, one reads texts"
    )
    for name, path in examples.items():
        for line in path.read_text(encoding="utf-8").splitlines():
            assert set(json.loads(line)) <= fields[name], (name, line)


@pytest.mark.parametrize("name", ["answer_choices", "minimal_pairs"])
def test_a_csv_says_what_the_json_lines_say(name: str) -> None:
    lists = ("choices",) if name == "answer_choices" else ()
    (rows, _), (lines, _) = (
        rows_of(str(ITEMS / f"{name}.{kind}"), FIELDS[name], lists=lists) for kind in ("csv", "jsonl")
    )
    for row, line in zip(rows, lines, strict=True):
        assert {key: str(value) for key, value in row.values.items()} == {
            key: str(value) for key, value in line.values.items()
        }
        if lists:
            assert place_of(row.values["answer"], row.values["choices"], row.where) == place_of(
                line.values["answer"], line.values["choices"], line.where
            )


def test_lists_in_tables_and_names_of_tasks() -> None:
    rows, _ = rows_of([{"choices": '["a", "b|c"]'}, {"choices": "a | b"}], ("choices",), lists=("choices",))
    assert [row.values["choices"] for row in rows] == [["a", "b|c"], ["a", "b"]]
    task = resolved(reader("characters"), "repeated_tokens:n=3,seed=2")
    assert (len(task), task.seed) == (3, 2)
    with pytest.raises(pb.PatchbayError, match="options are written name=value, got 'n'"):
        resolved(reader("characters"), "repeated_tokens:n")
    with pytest.raises(pb.PatchbayError, match="unexpected keyword argument 'm'"):
        resolved(reader("characters"), "repeated_tokens:m=3")


def test_a_plain_text_has_an_item_on_each_line(tmp_path: Path) -> None:
    """For what needs one field, whatever it is called; what needs two is refused with what the file has."""
    (tmp_path / "told.txt").write_text("the cat sat\n\nit ran\n")
    rows, _ = rows_of(str(tmp_path / "told.txt"), ("text",), ("group",))
    assert [(row.values, row.where.rpartition(", ")[2]) for row in rows] == [({"text": "the cat sat"}, "line 1"), ({"text": "it ran"}, "line 3")]  # fmt: skip
    model = reader("characters")
    found = pb.measure.text_loss(model, str(tmp_path / "told.txt"))
    assert found["per_item"].equal(pb.measure.text_loss(model, ["the cat sat", "it ran"])["per_item"])
    with pytest.raises(pb.PatchbayError, match="line 1 lacks the field 'good'; it has prompt"):
        pb.measure.minimal_pairs(model, str(tmp_path / "told.txt"))
    with pytest.raises(
        pb.PatchbayError, match="no file and no built-in task is called that; did you mean 'repeated_tokens'"
    ):
        resolved(model, "repeated_tokns:n=3")  # fmt: skip


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

"""From a file to a task: the same as the lists by hand, its columns as named, and every slip with its line and column."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchbay.signal.port import PatchbayError
from patchbay.tasks.rows import read_prompts
from patchbay.tasks.task import Task

PROMPTS = ["On the list is", "The secret is"]
RIGHT, WRONG, TWINS = [" box", " capital"], [[" list"], [" box", " secret"]], ["On the box is", "The capital is"]
WHOLE = [
    {"prompt": p, "right": r, "wrong": w, "corrupted": c, "labels": {"kind": k}, "marks": {"what": [0, 2]}}
    for p, r, w, c, k in zip(PROMPTS, RIGHT, WRONG, TWINS, ("list", "word"), strict=True)
]


def file(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_a_file_is_the_task_of_its_lists(plain: Any, tmp_path: Path) -> None:
    by_hand = Task.from_prompts(plain, PROMPTS, RIGHT, WRONG, TWINS, name="own")
    found = Task.from_file(file(tmp_path / "own.jsonl", WHOLE), plain)
    assert (found.clean, found.right, found.wrong, found.corrupted) == (
        by_hand.clean,
        by_hand.right,
        by_hand.wrong,
        by_hand.corrupted,
    )
    assert (found.name, found.texts, found.metric) == ("own", tuple(PROMPTS), "logit_diff")
    assert (found.labels, found.marks) == ({"kind": ("list", "word")}, {"what": ((0, 2), (0, 2))})
    assert Task.from_frame(WHOLE, plain, name="own") == Task.from_frame(pd.DataFrame(WHOLE), plain, name="own") == found


def test_columns_of_a_sheet_are_named(plain: Any, tmp_path: Path) -> None:
    path = tmp_path / "quiz.csv"
    with path.open("w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows([["id", "question", "a", "b", "c", "kind"],
                                   ["1", PROMPTS[0], " box", " list", " secret", "x"], ["2", PROMPTS[1], " capital", " box", "", "y"]])  # fmt: skip
    columns = {"prompt": "question", "right": "a", "wrong": ["b", "c"], "labels": ["kind", "id"]}
    found = Task.from_file(path, plain, columns=columns, metric="accuracy")
    by_hand = Task.from_prompts(plain, PROMPTS, RIGHT, [[" list", " secret"], [" box"]], metric="accuracy")
    assert (found.clean, found.right, found.wrong, found.metric) == (
        by_hand.clean,
        by_hand.right,
        by_hand.wrong,
        "accuracy",
    )
    assert found.labels == {"kind": ("x", "y"), "id": ("1", "2")}
    assert (
        Task.from_frame(pd.read_csv(path, dtype=str), plain, columns=columns, metric="accuracy", name="quiz") == found
    )


def test_without_answers_it_is_prompts(plain: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(PROMPTS))
    found = Task.from_file(tmp_path / "a.txt", plain)
    assert (found.clean, found.answered, found.metric) == (Task.from_prompts(plain, PROMPTS).clean, False, "kl")
    assert read_prompts(tmp_path / "a.txt") == PROMPTS
    assert read_prompts(file(tmp_path / "a.jsonl", WHOLE), columns={"prompt": "corrupted"}) == TWINS


def test_chats_are_prompts(plain: Any, make_tokenizer: Any, make_model: Any, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} .{% endfor %}"
    model = make_model(tokenizer, len(tokenizer))
    rows = [{"messages": [{"role": "user", "content": text}]} for text in PROMPTS]
    found = Task.from_file(file(tmp_path / "a.jsonl", rows), model, columns={"prompt": "messages"})
    assert found.texts == tuple(f"{text} ." for text in PROMPTS)


def slip(field: str, value: Any) -> list[dict[str, Any]]:
    """Two rows, the second with another value."""
    return [
        WHOLE[0],
        {**WHOLE[1], field: value} if value is not ... else {k: v for k, v in WHOLE[1].items() if k != field},
    ]


SLIPS: dict[str, tuple[list[Any], str]] = {
    "number as answer": (slip("right", 7), r"line 2, column 'right': a text is needed, got 7 \(int\); as a text it is '7' in quotes"),
    "number as prompt": (slip("prompt", 1.5), "line 2, column 'prompt': a text is needed, got 1.5"),
    "number among wrong": (slip("wrong", [" box", 3]), "line 2, column 'wrong': a text is needed, got 3"),
    "list as twin": (slip("corrupted", ["a"]), r"line 2, column 'corrupted': a text is needed, got \['a'\]"),
    "empty answer": (slip("right", ""), "line 2, column 'right': the text is empty"),
    "no prompt": (slip("prompt", ...), "line 2: no text in the column 'prompt'"),
    "null prompt": (slip("prompt", None), "line 2: no text in the column 'prompt'"),
    "no answer": (slip("right", ...), "line 2 has no 'right' and other rows have; all or none"),
    "no twin": (slip("corrupted", None), "line 2 has no 'corrupted'"),
    "other labels": (slip("labels", {"sort": 1}), "line 2: the labels are sort, in the first row kind"),
    "labels": (slip("labels", "x"), "line 2, column 'labels': {name: value} is needed, got 'x'"),
    "marks": (slip("marks", {"what": ["a"]}), "line 2, column 'marks': {name: .token positions.} is needed"),
    "mark beyond": (slip("marks", {"what": [99]}), "line 2: task own: mark 'what' is at .99,."),
    "other column": (slip("corupted", "x"), "line 2 has 'corupted'; columns are .*did you mean 'corrupted'"),
    "unknown word": (slip("right", " zebra"), "line 2: an answer is made of known tokens .*the tokenizer does not know ' zebra'"),
    "twin of another length": (slip("corrupted", "The capital"), "line 2: task own: 1 corrupted twins differ"),
    "right among wrong": (slip("right", " box"), "line 2: task own: the right answer is also among the wrong ones"),
}  # fmt: skip


@pytest.mark.parametrize("case", SLIPS)
def test_a_slip_is_refused_with_its_line(case: str, plain: Any, tmp_path: Path) -> None:
    rows, words = SLIPS[case]
    with pytest.raises(PatchbayError, match=words):
        Task.from_file(file(tmp_path / "own.jsonl", rows), plain)
    with pytest.raises(
        PatchbayError, match=words.replace("line 2", "row 1").replace(": '7'", ".*").partition(" has 'cor")[0]
    ):
        Task.from_frame(rows, plain, name="own")


def test_columns_that_are_not_there(plain: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("question,answer\nThe secret is, box\n")
    for columns, words in (
        (None, "line 2: no column 'prompt'; its columns are question, answer; say which are meant, as in columns={'prompt': 'question', ...}"),
        ({"prompt": "qestion"}, "no column 'qestion'; its columns are question, answer; did you mean 'question'"),
        ({"prompt": "question", "rigth": "answer"}, "columns names 'rigth'; possible: .*did you mean 'right'"),
        ({"prompt": ["question", "answer"]}, "prompt stands in one column"),
        ("question", "columns are a mapping"),
    ):  # fmt: skip
        with pytest.raises(PatchbayError, match=words):
            Task.from_file(path, plain, columns=columns)
    path.write_text("prompt,answer\nThe secret is, box\n")
    with pytest.raises(
        PatchbayError, match=r"a.csv, line 2 has 'answer'; columns are .*at the command line .*a.csv:prompt=prompt"
    ):
        Task.from_file(path, plain)  # no task without answers by a slip
    with pytest.raises(PatchbayError, match="Task.from_file: path takes a text or a path"):
        Task.from_file(plain, path)


VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=4), st.sampled_from([*PROMPTS, *RIGHT, *TWINS]),
                   st.lists(st.one_of(st.integers(), st.sampled_from(RIGHT)), max_size=2), st.dictionaries(st.sampled_from("ab"), st.lists(st.integers(0, 9), max_size=2), max_size=2))  # fmt: skip
NAMES = st.sampled_from(["prompt", "right", "wrong", "corrupted", "labels", "marks", "other"])


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.dictionaries(NAMES, VALUES, max_size=5).map(lambda row: {"prompt": PROMPTS[0], **row}), max_size=3)
)
def test_any_rows_give_a_task_or_a_refusal(rows: list[dict[str, Any]], plain: Any, tmp_path: Path) -> None:
    path = file(tmp_path / "own.jsonl", rows)
    said = None
    try:
        found = Task.from_file(path, plain)
    except PatchbayError as error:
        said = str(error)
    assert "own" in said if said is not None else found.texts == tuple(row["prompt"] for row in rows)

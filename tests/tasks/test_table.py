"""Files of prompts: every form read as it was written, every slip refused with its file, line and column, no input that escapes as a traceback."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from patchbay.signal.port import PatchbayError
from patchbay.tasks.rows import prompts_of
from patchbay.tasks.table import frame_table, read_table

ODD = "a\u2028b\u0085c\u2029d\x0b\x0c\x1c\x1d\x1ee"  # separators that str.splitlines would cut at
ROWS = [
    {"prompt": ODD, "right": " x"},
    {"prompt": ' two, "three"\t;', "right": " \u00e9"},
    {"prompt": "4", "right": "5 "},
]


def written(form: str, rows: list[dict[str, Any]]) -> str:
    """Rows as a file of that form, by others' code."""
    if form in ("jsonl", "json"):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        return "\n".join(lines) if form == "jsonl" else "[\n" + ",\n".join(lines) + "\n]\n"
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter="\t" if form == "tsv" else ",", quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def read(path: Path, content: str | bytes, **how: Any) -> list[dict[str, Any]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [dict(row.values) for row in read_table(path, **how).rows]


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "tsv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_rows_come_back_as_they_were_written(form: str, encoding: str, tmp_path: Path) -> None:
    assert read(tmp_path / f"a.{form}", written(form, ROWS).encode(encoding)) == ROWS


def test_a_plain_text_is_a_prompt_on_each_line(tmp_path: Path) -> None:
    text = f"one \r\n\r\n{ODD}\rthree\n  \n[INST] four\n{{name}} five"
    found = [row["prompt"] for row in read(tmp_path / "a.txt", text)]
    assert found == ["one ", ODD, "three", "[INST] four", "{name} five"]
    assert [row.where.rpartition(" ")[2] for row in read_table(tmp_path / "a.txt").rows] == ["1", "3", "4", "6", "7"]


def test_json_is_told_by_its_beginning_where_a_suffix_says_nothing(tmp_path: Path) -> None:
    for name in ("a", "a.txt", "a.json", "a.jsonl"):
        assert read(tmp_path / name, written("jsonl", ROWS)) == ROWS
        assert read(tmp_path / name, written("json", ROWS)) == ROWS
    assert read(tmp_path / "b.json", '["x", {"prompt": "y"}]') == [{"prompt": "x"}, {"prompt": "y"}]
    assert read(tmp_path / "c.jsonl", '"x"\n"y"') == [{"prompt": "x"}, {"prompt": "y"}]
    assert read(tmp_path / "d", '{"prompt": "y"}', form="text") == [{"prompt": '{"prompt": "y"}'}]


def test_cells_of_a_sheet(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", "prompt;right\r\na;\r\n\r\nb,c;d\r\n") == [
        {"prompt": "a"},
        {"prompt": "b,c", "right": "d"},
    ]
    assert read(tmp_path / "a.csv", 'prompt\n"a\nb"\nc') == [{"prompt": "a\nb"}, {"prompt": "c"}]
    assert read(tmp_path / "a.csv", "prompt, right\na, b") == [
        {"prompt": "a", "right": " b"}
    ]  # an answer keeps its space
    with pytest.raises(PatchbayError, match=r"a.csv, line 5: 1 cells under 2 columns"):
        read(tmp_path / "a.csv", 'prompt,right\n"a\nb",c\nd,e\nf\ng,h')


SLIPS = {  # name -> file, content, words of the refusal
    "cut JSON line": ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b', r"a.jsonl, line 2 is not JSON: Unterminated.*column 12 .*cut short"),
    "bad JSON line": ("a.jsonl", '{"prompt": "a"}\n{"prompt": b}\n{"prompt": "c"}\n', r"a.jsonl, line 2 is not JSON: Expecting value at column 12$"),
    "cut array": ("a.json", '[\n{"prompt": "a"},\n{"prompt": "b"}', r"a.json, line 3: ',' or '\]' .*cut short"),
    "cut in an entry": ("a.json", '[\n{"prompt": "a"},\n{"prompt": "b', r"a.json, line 3 is not JSON.*cut short"),
    "after the array": ("a.json", '[{"prompt": "a"}]\n{}', "text stands after the end of the array"),
    "no array": ("a", '{"prompt": "a"}', "a JSON array .* is needed", "json"),
    "number": ("a.jsonl", '{"prompt": "a"}\n7\n', "line 2: an object .* is needed, got a number"),
    "twice in JSON": ("a.jsonl", '{"prompt": "a", "prompt": "b"}', "line 1: two columns are called 'prompt'"),
    "twice in a sheet": ("a.csv", "prompt,right, right\n", "line 1: two columns are called 'right'"),
    "NaN": ("a.jsonl", '{"prompt": "a", "labels": {"x": NaN}}', "line 1: NaN is no value of JSON"),
    "half a character": ("a.jsonl", '{"prompt": "\\ud83d"}', "line 1 holds '.ud83d', half of a character"),
    "deep": ("a.jsonl", "[" * 100000, "nested too deeply", "jsonl"),
    "long number": ("a.jsonl", '{"prompt": ' + "1" * 5000 + "}", "line 1 is not JSON that can be read"),
    "open quote": ("a.csv", 'prompt\na\n"b\nc\n', "line 3: a double quote opens a text and none closes it"),
    "quote inside": ("a.csv", 'prompt,right\n"a"b,c\n', "line 2: .*double quote is written twice"),
    "long cell": ("a.csv", "prompt\n" + "a" * 140_000, "more than 131,072 characters; JSON lines"),
    "empty": ("a.jsonl", "", "a.jsonl holds no prompts"),
    "empty sheet": ("a.csv", "prompt,right\n", "a.csv holds no prompts under its columns prompt, right"),
    "empty array": ("a.json", " [ ] ", "holds no prompts"),
    "blank": ("a.txt", " \n\u2028\n", "holds no prompts"),
    "latin-1": ("a.csv", "prompt\na\ncaf\xe9\n".encode("latin-1"), r"line 3 is not utf-8: byte 0xe9 \('é' in latin-1\) .*encoding='latin-1'"),
    "NUL": ("a.txt", "a\nb".encode("utf-16-le"), "line 1 holds NUL characters: UTF-16 without"),
    "mark inside": ("a.txt", "a\nb\n\ufeffc", "line 3 holds a byte order mark inside: two files joined"),
    "parquet": ("a.parquet", b"PAR1\x15\x04", "is parquet, no text.*Task.from_frame"),
    "sheet": ("a.xlsx", b"PK\x03\x04", "is zip .as Excel sheets are., no text"),
    "form": ("a.csv", "prompt\na", "no form 'cvs'; possible: .*did you mean 'csv'", "cvs"),
}  # fmt: skip


@pytest.mark.parametrize("case", SLIPS)
def test_a_slip_is_refused_with_its_place(case: str, tmp_path: Path) -> None:
    name, content, words, *form = SLIPS[case]
    with pytest.raises(PatchbayError, match=words):
        read(tmp_path / name, content, form=form[0] if form else None)


def test_what_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.csv", tmp_path, "a\0b"):
        with pytest.raises(PatchbayError, match="could not read prompts from"):
            read_table(path)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(PatchbayError, match="there is no encoding 'utf-nine'"):
        read_table(tmp_path / "a.txt", encoding="utf-nine")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert [row.values for row in read_table(tmp_path / "a.txt", encoding="latin-1").rows] == [{"prompt": "caf\xe9"}]


def test_tables_in_memory() -> None:
    frame = pd.DataFrame({"prompt": ["a", "b"], "right": [" c", None], "n": [1.0, float("nan")]}, index=["x", "y"])
    table = frame_table(frame)
    assert table.columns == ("prompt", "right", "n")
    assert [row.values for row in table.rows] == [{"prompt": "a", "right": " c", "n": 1.0}, {"prompt": "b"}]
    assert frame_table([{"prompt": "a", "right": None}]).rows[0] == ({"prompt": "a"}, "table, row 0")
    with pytest.raises(PatchbayError, match="two columns are called 'prompt'"):
        frame_table(pd.DataFrame([["a", "b"]], columns=["prompt", "prompt"]))
    for other in ("text", {"prompt": ["a"]}, 3, ["a"]):
        with pytest.raises(PatchbayError, match="a DataFrame or a list of mappings is needed|a mapping from columns"):
            frame_table(other)
    with pytest.raises(PatchbayError, match="has no rows"):
        frame_table(pd.DataFrame({"prompt": []}))


# --- any file at all ---

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), min_size=1)
PIECES = st.sampled_from(['"', "'", ",", ";", "\t", "\n", "\r", "\r\n", "[", "]", "{", "}", ":", "prompt", '"prompt"', "right", "\\", "\\ud800",
                          "\u2028", "\u0085", "\ufeff", "\0", "NaN", "1e999", "null", "true", " ", "-0", "caf\xe9", "a"])  # fmt: skip


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(max_size=60), st.lists(PIECES, max_size=30).map(lambda s: "".join(s).encode())),
       name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a"]))  # fmt: skip
@example(content=b"\xff\xfe\x00", name="a.txt")
@example(content=b'[{"prompt":1}', name="a.json")
def test_any_bytes_give_rows_or_a_refusal(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    said, prompts = None, []
    try:
        prompts = prompts_of(read_table(tmp_path / name))
    except PatchbayError as error:
        said = str(error)
    assert name in said if said is not None else prompts and all(isinstance(text, str) and text for text in prompts)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5),
    form=st.sampled_from(["jsonl", "json", "csv", "tsv"]),
)
def test_any_texts_come_back(texts: list[tuple[str, str]], form: str, tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "right": right} for prompt, right in texts]
    assert read(tmp_path / f"a.{form}", written(form, rows)) == rows

"""Texts of a file, one after another; what cannot be read is refused by its line."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import patchbay as pb
from patchbay.corpus import reading, records_of, texts_of
from patchbay.corpus.dedup import near_unique, unique
from patchbay.corpus.diachronic import surprisals
from patchbay.corpus.mixer import filtered, mixed
from patchbay.corpus.recovery import divergence, pick
from patchbay.corpus.selection import states
from patchbay.corpus.stories import graded
from tests.given import lent


def test_texts_come_in_order_from_both_forms(tmp_path: Path) -> None:
    plain, records = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_bytes(b"\xef\xbb\xbfone\r\n\n  \ntwo words\nlast")
    records.write_text('{"text": "one"}\n\n{"text": "two words", "id": 3}\n{"text": "last"}')
    assert list(texts_of(plain)) == list(texts_of(records)) == ["one", "two words", "last"]


def test_a_file_is_not_held_in_memory(tmp_path: Path) -> None:
    """The first texts come though a later line cannot be read."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n{"text": \n')
    stream = texts_of(file)
    assert next(stream) == "one"
    with pytest.raises(pb.PatchbayError, match="line 2 is no JSON"):
        next(stream)


def test_records_keep_their_fields_and_a_huge_line_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "url": "u"}\n')
    assert list(records_of(tmp_path / "a.jsonl")) == [{"text": "one", "url": "u"}]
    asked: list[int] = []
    monkeypatch.setattr(reading, "LONGEST", 20)
    monkeypatch.setattr(reading, "partial", lambda read, most: (asked.append(most), partial(read, most))[1])
    (tmp_path / "a.txt").write_text("x" * 19 + "\n" + "y" * 5000)
    stream = texts_of(tmp_path / "a.txt")
    assert next(stream) == "x" * 19
    with pytest.raises(pb.PatchbayError, match="line 2 is longer than 20 bytes"):
        next(stream)
    assert asked == [21]  # no more of a line than tells that it is too long


def test_letters_of_two_halves_are_letters(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\\ud83d\\ude00"}\n')
    assert list(texts_of(tmp_path / "a.jsonl")) == ["\U0001f600"]


def test_a_source_is_a_function() -> None:
    with pytest.raises(pb.PatchbayError, match="source 'a' is a list: a source is a function that begins it"):
        list(mixed({"a": ["x"]}, {"a": 1}))  # type: ignore[dict-item]


def other(call: Callable[..., Any]) -> Callable[[Any], Any]:
    """A function of a model and texts, as one of texts."""
    return lambda given: call(lent("llama"), given) or []


@pytest.mark.parametrize(
    "call",
    [
        unique,
        near_unique,
        partial(filtered, rules=[]),
        graded,
        other(states),
        other(surprisals),
        other(partial(divergence, cut=[])),
        other(partial(pick, n=1, cut=[])),
    ],
)
def test_one_text_is_not_taken_for_its_letters(call: Callable[[str], Any]) -> None:
    with pytest.raises(pb.PatchbayError, match="'abc' is one text: give a list"):
        list(call("abc"))
    with pytest.raises(pb.PatchbayError, match="None is no list of texts"):
        list(call(None))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.jsonl", b"\n \n", "holds no text"),
        (
            "a.jsonl",
            b'{"text": "one"}\n{"text": "tw',
            "line 2 is no JSON: the file ends in mid-line, as one that was cut off",
        ),
        ("a.txt", "one\nzw\u00f6".encode()[:-1], "line 2 is not UTF-8: the file ends in mid-line"),
        ("a.txt", b"\xff\xfe\nb\n", r"line 1 is not UTF-8 \("),
        ("a.jsonl", b'{"txt": "one"}\n', r"no field `text` that is a text; it has \['txt'\]"),
        ("a.jsonl", b"[1]\n", "it has list"),
        ("a.csv", b"one\n", "a .txt, a line each, or in a .jsonl"),
        ("a.jsonl.gz", b"one\n", "unpack it"),
        ("a.txt", b"\xef\xbb\xbf\n", "holds no text"),
        ("a.jsonl", b'{"text": "a", "text": "b"}\n', "'text' stands there twice"),
        ("a.jsonl", b'{"text": "a", "of": {"x": 1, "x": 1}}\n', "'x' stands there twice"),
        ("a.jsonl", b'{"text": "a \\ud800 b"}\n', "line 1 holds half a letter"),
        ("a.jsonl", b'{"text": "a", "url": "\\uDCfe"}\n', "line 1 holds half a letter"),
        ("a.jsonl", b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "line 1 is no JSON"),
    ],
)
def test_refusals(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(pb.PatchbayError, match=says):
        list(texts_of(tmp_path / name))
    with pytest.raises(pb.PatchbayError, match="cannot be read"):
        list(texts_of(tmp_path / "none.txt"))


def test_streams_of_texts_hold_texts_alone() -> None:
    assert list(reading.several(iter(["a", "zw\u00f6lf", ""]))) == ["a", "zw\u00f6lf", ""]
    for given, says in (
        ("abc", "'abc' is one text: give a list of them"),
        (["a", None], "text 2 is a NoneType"),
        ([{"text": "a"}], "text 1 is a dict: texts are asked for, of a record its field"),
        (["a\udc00"], "text 1 holds half a letter"),
    ):
        for tool in (
            reading.several,
            pb.corpus.dedup.unique,
            pb.corpus.dedup.near_unique,
            partial(pb.corpus.mixer.filtered, rules=[]),
        ):
            with pytest.raises(pb.PatchbayError, match=says):
                list(tool(given))  # type: ignore[arg-type]

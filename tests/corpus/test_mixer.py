"""Taggers by hand, rules that filter, and sources that come by their shares."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

import patchbay as pb
from patchbay.corpus.mixer import TAGGERS, attributes, filtered, mixed


def test_what_taggers_say() -> None:
    text = "the cat\nthe cat\n12 !"
    expected = {
        "commonest_word": 2 / 6,
        "length": 20.0,
        "letters": 17 / 20,
        "longest_word": 3.0,
        "repeated_lines": 1 / 3,
    }
    assert attributes(text) == pytest.approx(expected)
    assert attributes("") == dict.fromkeys(TAGGERS, 0.0)


def test_rules_keep_what_they_say_and_the_order() -> None:
    texts = ["aaa", "b", "cc 1", "dddd"]
    assert list(filtered(texts, [("length", 2, None), ("letters", 0.9, None)])) == ["aaa", "dddd"]
    assert list(filtered(texts, [("length", None, 1)])) == ["b"]
    assert list(filtered(texts, [])) == texts
    with pytest.raises(pb.PatchbayError, match="did you mean 'length'"):
        filtered(texts, [("lenght", 1, None)])


def test_sources_come_by_their_shares() -> None:
    sources = {"a": lambda: (f"a{i}" for i in range(10**6)), "b": lambda: ["b0", "b1"]}
    found = list(islice(mixed(sources, {"a": 3, "b": 1}, again=True), 4000))
    counts = Counter(name for name, _ in found)
    assert abs(counts["b"] / 4000 - 0.25) < 0.03
    assert [text for name, text in found if name == "b"][:5] == ["b0", "b1", "b0", "b1", "b0"]
    assert found == list(islice(mixed(sources, {"a": 3, "b": 1}, again=True), 4000))
    short = list(mixed({"a": lambda: ["x"] * 3, "b": lambda: ["y"] * 2}, {"a": 1, "b": 1}))
    assert Counter(short) == {("a", "x"): 3, ("b", "y"): 2}
    for shares in ({"a": 1}, {"a": 1, "b": 0}):
        with pytest.raises(pb.PatchbayError, match="one share above 0 for each"):
            next(mixed(sources, shares))
    with pytest.raises(pb.PatchbayError, match="source 'e' is empty"):
        next(mixed({"e": list}, {"e": 1}, again=True))

"""Taggers by hand, rules that filter, and sources that come by their shares."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

import patchbay as pb
from patchbay.corpus.mixer import TAGGERS, attributes, filtered, kept, masked, mixed, n_words


def test_what_taggers_say() -> None:
    text = "the cat\nthe cat\n12 !"
    expected = {
        "commonest_word": 2 / 6,
        "length": 20.0,
        "letters": 17 / 20,
        "longest_word": 3.0,
        "repeated_lines": 1 / 3,
        "n_words": 6.0,
        "word_length": 15 / 6,
        "stop_words": 1.0,
        "unended_lines": 2 / 3,
    }
    assert attributes(text) == pytest.approx(dict.fromkeys(TAGGERS, 0.0) | expected)
    other = "- one...\n* two #1 and\n write to a.b+c@d-e.org or 10.0.0.255 or (555) 123-4567.\na b c d e f\na b c d e f"
    found = attributes(other)
    assert found["bullets"] == 2 / 5
    assert found["cut_lines"] == 1 / 5
    assert found["unended_lines"] == 3 / 5
    assert found["symbols"] == pytest.approx(2 / n_words(other))
    assert found["private"] == 3.0
    assert found["repeated_words"] == pytest.approx(2 / (n_words(other) - 4))
    assert attributes("") == dict.fromkeys(TAGGERS, 0.0)


def test_rules_keep_what_they_say_and_the_order() -> None:
    texts = ["aaa", "b", "cc 1", "dddd"]
    assert list(filtered(texts, [("length", 2, None), ("letters", 0.9, None)])) == ["aaa", "dddd"]
    assert list(filtered(texts, [("length", None, 1)])) == ["b"]
    assert list(filtered(texts, [])) == texts
    with pytest.raises(pb.PatchbayError, match="did you mean 'length'"):
        filtered(texts, [("lenght", 1, None)])


def test_what_says_who_somebody_is_is_masked_and_nothing_else() -> None:
    text = "Write to a.b@c.org, call +1 555-123-4567 or (555) 123-4567, log in at 192.168.0.1."
    assert masked(text) == (
        "Write to |||EMAIL_ADDRESS|||, call |||PHONE_NUMBER||| or |||PHONE_NUMBER|||, log in at |||IP_ADDRESS|||."
    )
    for other in (
        "version 1.2.3.4.5",
        "300.1.1.1",
        "in 1999 2000 of 12345",
        "a @ b",
        "1234-5678-9012-3456",
        "pi is 3.14159",
    ):
        assert masked(other) == other


def test_rules_read_what_was_said_before() -> None:
    texts, rules = ["aaa", "b", "cc 1"], [("length", 2.0, None), ("letters", 0.9, None)]
    said = [attributes(text) for text in texts]
    assert list(kept(texts, said, rules)) == list(filtered(texts, rules)) == ["aaa"]
    assert list(kept(texts, [{"length": 9.0}] * 3, [("length", 2, None)])) == texts
    for given, says in (
        (said[:2], "text 3 has no record"),
        ([*said, said[0]], "record 4 has no text"),
        ([{"lenght": 1.0}] * 3, "record 1 has no 'length'; it has lenght; did you mean"),
    ):
        with pytest.raises(pb.PatchbayError, match=says):
            list(kept(texts, given, [("length", None, 100)]))


def test_what_no_rule_can_judge_is_told() -> None:
    with pytest.raises(pb.PatchbayError, match="'length' of a text is NaN, which is neither kept nor left out"):
        list(kept(["aaa"], [{"length": float("nan")}], [("length", 1.0, None)]))
    with pytest.raises(pb.PatchbayError, match="'x' of a text is NaN"):
        list(filtered(["a"], [("x", None, 1.0)], {"x": lambda text: float("nan")}))
    for rule in (("length", 5, 1), ("length", float("nan"), None)):
        with pytest.raises(pb.PatchbayError, match="length of at least .*: no text has that"):
            filtered(["a"], [rule])
        with pytest.raises(pb.PatchbayError, match="length of at least .*: no text has that"):
            list(kept(["a"], [{"length": 1.0}], [rule]))


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

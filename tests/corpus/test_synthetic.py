"""Languages that mean nothing: each has its one rule, all have the same tokens equally often, and the null has no rule."""

from __future__ import annotations

import random
from collections import Counter

import pytest

import patchbay as pb
from patchbay.corpus.synthetic import KINDS, brackets, texts


def closed(text: list[int], kinds: int) -> bool:
    """Whether brackets close in reverse order of their opening, and all of them."""
    still: list[int] = []
    for token in text:
        if token < kinds:
            still.append(token)
        elif not still or still.pop() != token - kinds:
            return False
    return not still


def period(text: list[int]) -> int | None:
    """The shortest period of 12 tokens or fewer, by trying all."""
    return next((p for p in range(1, 13) if all(text[i] == text[i - p] for i in range(p, len(text)))), None)


def test_each_language_has_its_rule_and_no_other_has_it() -> None:
    said = {kind: texts(kind, 60, 1, vocab=20) for kind in KINDS}
    assert {len(text) for some in said.values() for text in some} == {32}
    assert all(period(text) is not None for text in said["repeats"])
    assert all(closed(text, 10) for text in said["nested"])
    for kind in KINDS:
        assert sum(period(text) is not None for text in said[kind]) == (60 if kind == "repeats" else 0)
        assert sum(closed(text, 10) for text in said[kind]) == (60 if kind == "nested" else 0)
    assert len({max_depth(text) for text in said["nested"]}) > 3


def max_depth(text: list[int]) -> int:
    depth = best = 0
    for token in text:
        depth += 1 if token < 10 else -1
        best = max(best, depth)
    return best


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_equally_often_and_follow_from_the_seed(kind: str) -> None:
    said = texts(kind, 2000, 0, vocab=20)
    counts = Counter(token for text in said for token in text)
    expected = 2000 * 32 / 20
    assert all(abs(counts[token] / expected - 1) < 0.12 for token in range(20))
    assert texts(kind, 5, 3, vocab=20) == texts(kind, 5, 3, vocab=20) != texts(kind, 5, 4, vocab=20)
    assert len({tuple(text) for text in said}) > 1990


def test_an_odd_length_leaves_one_bracket_open() -> None:
    text = brackets(random.Random(0), 5, 9)
    assert len(text) == 9
    assert closed(text[:8], 5)
    assert text[8] < 5


def test_refusals() -> None:
    with pytest.raises(pb.PatchbayError, match="no language 'repeat'; languages are repeats, nested, independent"):
        texts("repeat", 1, 0, vocab=20)
    for given in ({"n": 0}, {"vocab": 3}, {"length": 3}):
        with pytest.raises(pb.PatchbayError, match="four tokens or more"):
            texts("nested", **{"n": 1, "seed": 0, "vocab": 20, **given})  # type: ignore[arg-type]

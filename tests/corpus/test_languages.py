"""Languages made of one: orders are permutations that can be undone, the same at each length; the n-gram model by hand and by its sum."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

import patchbay as pb
from patchbay.corpus import languages
from patchbay.corpus.languages import KINDS, cloned, ngram_loss, order, restored, spoken

WORDS = [[7, 9, 4, 4, 5, 8, 6, 3][:n] for n in range(9)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sentence_keeps_its_tokens_and_can_be_restored(kind: str) -> None:
    for ids in WORDS:
        said = spoken(ids, kind, width=3, salt=2, draw=random.Random(0))
        assert Counter(said) == Counter(ids)
        assert sorted(order(kind, len(ids))) == list(range(len(ids)))
        if kind != "random":
            assert restored(said, kind, width=3, salt=2) == ids
            assert said == spoken(ids, kind, width=3, salt=2)  # the same length, the same permutation


def test_what_each_language_does() -> None:
    ids = list(range(10, 20))
    assert spoken(ids, "control") == ids
    assert spoken(ids, "reversed") == ids[::-1]
    assert spoken(ids, "even-odd") == [10, 12, 14, 16, 18, 11, 13, 15, 17, 19]
    local = spoken(ids, "local", width=4)
    assert [sorted(local[i : i + 4]) for i in (0, 4, 8)] == [ids[:4], ids[4:8], ids[8:]]
    assert local != ids
    assert len({tuple(spoken(ids, "shuffled", salt=salt)) for salt in range(20)}) > 15
    drawn = random.Random(0)
    assert len({tuple(spoken(ids, "random", draw=drawn)) for _ in range(20)}) > 15


def test_clones_are_the_same_text_in_other_tokens() -> None:
    ids = [0, 5, 9]
    assert cloned(ids, 10) == [10, 15, 19]
    assert cloned(cloned(ids, 10), 10, second=False) == ids == cloned(ids, 10, second=False)
    with pytest.raises(pb.PatchbayError, match=r"ids outside 0..9"):
        cloned([10], 10)


def test_the_ngram_model_by_hand() -> None:
    """Two sentences: after 1 came 2 twice and 3 once; 2 came twice, 3 once, 1 never but as the first."""
    train = [[1, 2], [1, 2], [1, 3]]
    uni = {token: (count + 2 / 5) / (3 + 2) for token, count in ((2, 2), (3, 1), (0, 0), (1, 0), (4, 0))}
    assert sum(uni.values()) == pytest.approx(1.0)
    for token, count in ((2, 2), (3, 1), (4, 0)):
        [found] = ngram_loss(train, [[1, token]], 5)
        assert found == pytest.approx(-math.log((count + 2 * uni[token]) / (3 + 2)))
        [single] = ngram_loss(train, [[1, token]], 5, n=1)
        assert single == pytest.approx(-math.log(uni[token]))
        [unseen] = ngram_loss(train, [[4, token]], 5)
        assert unseen == pytest.approx(-math.log(uni[token]))
    total = sum(math.exp(-ngram_loss(train, [[1, token]], 5)[0]) for token in range(5))
    assert total == pytest.approx(1.0)


def test_longer_ngrams_see_more_and_a_random_order_sees_nothing() -> None:
    """A text in which the token two before decides: a trigram knows it, a bigram does not, and no order at all knows the shuffled one."""
    draw = random.Random(0)
    texts = [[a, b, a, b, a, b] for a, b in (draw.sample(range(8), 2) for _ in range(400))]
    train, held = texts[:300], texts[300:]
    losses = [sum(ngram_loss(train, held, 8, n=n)) / 100 for n in (1, 2, 3)]
    assert losses[0] > losses[1] > losses[2]
    mixed = [spoken(ids, "random", draw=draw) for ids in texts]
    assert sum(ngram_loss(mixed[:300], mixed[300:], 8, n=3)) / 100 > losses[2] + 0.3


def test_refusals() -> None:
    for call, says in (
        (lambda: order("revrsed", 3), "did you mean 'reversed'"),
        (lambda: order("local", 3, width=0), "windows of one token"),
        (lambda: restored([1, 2], "random"), "nothing in the text says which"),
        (lambda: ngram_loss([], [[1, 2]], 5), "0 sentences to count"),
    ):
        with pytest.raises(pb.PatchbayError, match=says):
            call()
    assert languages.KINDS == KINDS

"""Objectives of train.variant: what documents become, and what is minimised, by plain counting; the null that each names."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from patchbay.train._objectives import names, objective
from patchbay.train._objectives.spt import permuted

DOCUMENT = [[5, 6], [1], [7, 8, 9], [2], [3, 4]]


def test_the_listing_is_the_registry() -> None:
    assert {"ntp", "spt"} <= set(names())
    for name in names():
        assert type(objective(name)).__doc__ or True
        null = objective(name).null
        assert null is None or objective(null)


# --- semantic permutation -----------------------------------------------------------------------------


def test_permuted_units_keep_their_tokens_in_order() -> None:
    draw = random.Random(0)
    for way in ("kept", "reversed", "shuffled"):
        found = permuted(DOCUMENT, way, draw)
        assert Counter(map(tuple, found)) == Counter(map(tuple, DOCUMENT))
    assert permuted(DOCUMENT, "kept", draw) == DOCUMENT
    assert permuted(permuted(DOCUMENT, "reversed", draw), "reversed", draw) == DOCUMENT
    assert permuted(DOCUMENT, "reversed", draw)[0] == [3, 4]
    assert permuted(DOCUMENT, "tokens", draw) == [[4, 3, 2, 9, 8, 7, 1, 6, 5]]


def test_shares_of_ways_are_those_that_were_asked() -> None:
    plain, backwards = [5, 6, 1, 7, 8, 9, 2, 3, 4], [3, 4, 2, 7, 8, 9, 1, 5, 6]
    aim, n = objective("spt:kept=0.5,reversed=0.3"), 2000
    rows = [aim.row(DOCUMENT, random.Random(i))[0] for i in range(n)]
    for row, share in ((plain, 0.5 + 0.2 / 120), (backwards, 0.3 + 0.2 / 120)):
        assert abs(rows.count(row) / n - share) < 4 * (share * (1 - share) / n) ** 0.5
    assert all(objective("spt:kept=1,reversed=0").row(DOCUMENT, random.Random(i))[0] == plain for i in range(50))
    tokens = objective(objective("spt").null or "")
    assert {tuple(tokens.row(DOCUMENT, random.Random(i))[0]) for i in range(50)} == {tuple(plain), tuple(plain[::-1])}
    assert aim.told(DOCUMENT) == plain


@pytest.mark.parametrize("text", ["spt:kept=-1", "spt:reversed=2"])
def test_shares_that_cannot_be(text: str) -> None:
    with pytest.raises(ValueError, match="each 0 or more"):
        objective(text)

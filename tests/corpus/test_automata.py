"""Automata: their form, the truth of a stream, what counting says, and the distance between the two."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest

from patchbay.corpus import automata
from patchbay.errors import PatchbayError

LOOP = [{0: 1}, {1: 2, 2: 0}, {3: 0}]  # 0 then 1 or 2; after 1 comes 3


def test_automata_have_the_form_that_is_said() -> None:
    rng = random.Random(0)
    made = [automata.automaton(rng) for _ in range(300)]
    assert {len(one) for one in made} == set(range(4, 9))
    assert {len(arrows) for one in made for arrows in one} == {1, 2, 3}
    for one in made:
        for state, arrows in enumerate(one):
            assert state not in arrows.values()
            assert len(set(arrows.values())) == len(arrows)
            assert set(arrows.values()) <= set(range(len(one)))
    with pytest.raises(PatchbayError, match="from 1 to min"):
        automata.automaton(rng, states=(2, 3), arrows=(1, 2))


def test_planted_the_truth_of_a_stream() -> None:
    """Each token's own chance is that with which it comes: shares of many streams are those of the truth."""
    assert automata.following(LOOP, [0, 1, 3, 0, automata.SEPARATOR, 0]) == [
        row(0.0, 0.5, 0.5), row(0.0, 0.0, 0.0, 1.0), row(1.0), row(0.0, 0.5, 0.5), row(1.0), row(0.0, 0.5, 0.5)
    ]  # fmt: skip
    ids = automata.stream(random.Random(1), LOOP, 4000)
    assert len(ids) == 4000
    after = Counter(b for a, b in pairwise(ids) if a == 0 and b != automata.SEPARATOR)
    assert set(after) == {1, 2}
    assert abs(after[1] / after.total() - 0.5) < 0.06
    lengths = Counter(map(len, "".join("|" if one == automata.SEPARATOR else "x" for one in ids).split("|")[:-1]))
    assert set(lengths) == set(range(1, 14))
    with pytest.raises(PatchbayError, match="token 3 at place 1: no arrow of state 1"):
        automata.following(LOOP, [0, 3])
    assert automata.stream(random.Random(1), LOOP, 50) == ids[:50]


def test_reference_counting_as_loops() -> None:
    ids = automata.stream(random.Random(2), automata.automaton(random.Random(3)), 60)
    for n in (0, 1, 2):
        for place, said in enumerate(automata.counted(ids, n)):
            expected = [1 / automata.SYMBOLS] * automata.SYMBOLS
            for k in range(n, -1, -1):
                if k > place + 1:
                    continue
                before = ids[place + 1 - k : place + 1]
                seen = [
                    ids[j] for j in range(k, place + 1) if ids[j - k : j] == before and ids[j] != automata.SEPARATOR
                ]
                if seen:
                    expected = [seen.count(symbol) / len(seen) for symbol in range(automata.SYMBOLS)]
                    break
            assert said == expected
    with pytest.raises(PatchbayError, match="0 tokens or more"):
        automata.counted(ids, -1)


def test_null_distance_is_0_of_the_same_1_of_nothing_shared_and_validity_is_of_the_likeliest() -> None:
    assert automata.distance(row(0.5, 0.5), row(0.5, 0.5)) == 0.0
    assert automata.distance(row(1.0), row(0.0, 1.0)) == 1.0
    assert automata.distance(row(0.5, 0.5), row(1.0)) == 0.5
    assert automata.valid([0.6, 0.4], [0.5, 0.5])
    assert not automata.valid([0.4, 0.6], [1.0, 0.0])


def row(*given: float) -> list[float]:
    return [*given, *[0.0] * (automata.SYMBOLS - len(given))]

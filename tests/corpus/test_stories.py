"""Stories: the same for a seed, every one parses, the grader gives them all it has and shuffled ones next to nothing; planted faults are told."""

from __future__ import annotations

import random
from itertools import islice

import pytest

import patchbay as pb
from patchbay.corpus.stories import grade, graded, is_story, parse, parsed, shuffled, texts, told
from patchbay.tasks import words

STORY = "Mary and John were friends. Then John gave the hat to Mary. The store was red and old."


def test_stories_follow_from_the_seed_and_all_parse() -> None:
    some = list(texts(300, seed=1))
    assert some == list(islice(texts(seed=1), 300)) != list(texts(300, seed=2))
    assert some[:5] == list(texts(5, seed=1))
    assert len(set(some)) == 300
    assert all(is_story(text) for text in some)
    assert graded(some) == {"grade": 1.0, "parse": 1.0, "people": 1.0, "whole": 1.0}


def test_what_a_story_determines_is_the_other_person() -> None:
    rng = random.Random(0)
    for _ in range(50):
        pieces = told(rng)
        for i, (piece, sure) in enumerate(pieces):
            if sure:
                giver = pieces[i - 1][0].split()[1]
                opening = parsed(pieces[0][0])
                assert opening is not None
                assert set(opening.people) == {giver, piece.strip()}


def test_shuffled_stories_are_none() -> None:
    rng = random.Random(0)
    some = [shuffled(text, rng) for text in texts(100)]
    assert sorted(some[0].replace(".", " .").split()) == sorted(next(texts(1)).replace(".", " .").split())
    assert graded(some)["grade"] < 0.05
    assert graded(some)["parse"] < 0.2


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("hat to Mary", "hat to Anna", 2 / 3),  # somebody else
        ("hat to Mary", "hat to John", 2 / 3),  # to himself
        ("red and old", "red and red", 2 / 3),
        ("The store was", "The store is", 2 / 3),
        ("and old.", "and old", 2 / 3),  # cut off
        ("Mary and John were friends. ", "", 0.0),  # no opening
        ("Mary and John were", "Mary and Mary were", 0.0),
        ("", "", 1.0),
    ],
)
def test_a_planted_fault_costs_its_sentence(old: str, new: str, expected: float) -> None:
    assert grade(STORY.replace(old, new, 1) if old else STORY) == pytest.approx(expected)
    assert is_story(STORY.replace(old, new, 1) if old else STORY) == (expected == 1.0)


def test_the_grammar_reads_its_slots() -> None:
    found = parsed(" Sarah saw an umbrella near the park.")
    assert found is not None
    assert found.slots == {"first": "Sarah", "article": "an", "thing": "umbrella", "place": "park"}
    assert parsed("Sarah saw a umbrella near the park.") is None
    assert [one is None for one in parse("It was Monday and there was no rain. It was rain")] == [False, True]
    assert all(parsed(one.format(**words.fresh_words(random.Random(0), ("Mary", "John")))) for one in words.SENTENCES)


def test_refusals() -> None:
    with pytest.raises(pb.PatchbayError, match="a story or more"):
        texts(0)
    with pytest.raises(pb.PatchbayError, match="no texts to grade"):
        graded([])
    assert grade("") == 0.0

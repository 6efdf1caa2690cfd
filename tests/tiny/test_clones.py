"""Clones: one law in several vocabularies, what is read with which shares, what is asked; a network with a dominant language."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

import patchbay as pb
from patchbay.corpus.languages import anchored
from patchbay.errors import PatchbayError
from patchbay.tiny import clones


def back(token: int) -> int:
    """The word that a token says."""
    return (
        token if token < clones.WORDS else clones.ANCHORS + (token - clones.ANCHORS) % (clones.WORDS - clones.ANCHORS)
    )


def test_reference_languages_share_their_anchors_alone() -> None:
    assert anchored([0, 2, 3, 5], 0, words=6, anchors=3) == [0, 2, 3, 5]
    assert anchored([0, 2, 3, 5], 2, words=6, anchors=3) == [0, 2, 9, 11]
    blocks = [set(clones.own(k)) for k in range(3)]
    assert [len(block) for block in blocks] == [56] * 3
    assert not blocks[0] & blocks[1] | blocks[1] & blocks[2] | blocks[0] & blocks[2]
    assert max(blocks[2]) + 2 == clones.vocabulary(3)
    assert [back(token) for token in clones.own(2)] == list(range(clones.ANCHORS, clones.WORDS))
    with pytest.raises(PatchbayError, match=r"ids of 0\.\.5"):
        anchored([6], 1, words=6)


def test_planted_chains_follow_the_law_and_languages_come_by_their_shares() -> None:
    followers, sign = clones.law(0), clones.vocabulary(2) - 1
    found = clones.rows(3000, clones.DOMINANT, followers, 7)
    assert {len(ids) for ids in found} == {clones.LENGTH}
    plain = [ids for ids in found if sign not in ids]
    assert 1 - len(plain) / len(found) == pytest.approx(clones.TRANSLATED, abs=0.03)
    blocks = [set(clones.own(k)) for k in (0, 1)]
    spoken = Counter(k for ids in plain for k in (0, 1) if blocks[k] & set(ids))
    assert not any(blocks[0] & set(ids) and blocks[1] & set(ids) for ids in plain)
    assert spoken[1] / spoken.total() == pytest.approx(0.1, abs=0.03)
    ranks = Counter(followers[back(a)].index(back(b)) for ids in plain for a, b in pairwise(ids))
    for rank, chance in enumerate(clones.CHANCES):
        assert ranks[rank] / ranks.total() == pytest.approx(chance, abs=0.02)
    for ids in found:
        if sign in ids:
            first, second = ids[: clones.LENGTH // 2], ids[clones.LENGTH // 2 + 1 :]
            assert [back(token) for token in first][: len(second)] == [back(token) for token in second]
            assert first[: len(second)] != second or max(first[: len(second)]) < clones.ANCHORS


def test_null_what_is_asked_is_the_languages_own_and_the_same_in_all() -> None:
    followers = clones.law(5)
    for ids, shared in [(ids, at) for at in (True, False) for ids in clones.minor(40, 1, 3, shared=at, law_of=5)]:
        assert followers[back(ids[-1])][0] >= clones.ANCHORS
        assert (ids[-1] < clones.ANCHORS) == shared
        assert set(ids) & set(clones.own(1))
        assert not set(ids) & set(clones.own(0))
    texts = clones.pairs(20, 3, 3, law_of=5)
    for same in zip(*texts, strict=True):
        assert len({tuple(map(back, ids)) for ids in same}) == 1
        assert len({ids[-1] for ids in same}) == 3
    network = clones.network(2)
    found = pb.find.latent_language(network, clones.minor(20, 1, 0), {"a": clones.own(0), "b": clones.own(1)}, draws=2)
    assert abs(float(found["probability"][-1, 0] - found["probability"][-1, 1])) < 0.15, (
        "an untrained network speaks neither"
    )


@pytest.mark.slow  # a minute of training, twice
def test_inner_layers_say_the_dominant_language() -> None:
    groups = {"dominant": clones.own(0), "minor": clones.own(1)}
    first, second = (
        pb.find.latent_language(clones.train(shares), clones.minor(60, 1, 1), groups, draws=2)["probability"]
        for shares in (clones.DOMINANT, clones.EVEN)
    )
    assert float(first[2, 0] - second[2, 0]) > 0.05
    assert float(first[-1, 1]) > 0.7

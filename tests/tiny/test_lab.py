"""Texts of the lab, and what is known of each."""

from __future__ import annotations

from patchbay.blocks import trees
from patchbay.tiny import lab


def test_what_is_recalled_was_read_before() -> None:
    """Every key has one value in a text; told places are those of values whose key came before, and no others."""
    texts = lab.recalls(30, 0, pairs=4, length=34, after=(32,))
    assert (
        texts
        == lab.recalls(30, 0, pairs=4, length=34, after=(32,))
        != lab.recalls(30, 1, pairs=4, length=34, after=(32,))
    )
    for ids, places in texts:
        assert len(ids) == 33
        assert ids[2::3] == [32] * 11
        value: dict[int, int] = {}
        known = []
        for at in range(0, 33, 3):
            if ids[at] in value:
                known.append(at + 1)
            assert value.setdefault(ids[at], ids[at + 1]) == ids[at + 1]
            assert 0 <= ids[at] < 16 <= ids[at + 1] < 32
        assert places == known
        assert len(value) <= 4
    assert len({tuple(ids) for ids, _ in texts}) == 30


def test_sentences_have_one_binary_tree_by_their_grammar() -> None:
    """The tree of a sentence is what a parser of its words alone, written here, makes of it."""

    def noun(kinds: list[str], at: int, spans: set[tuple[int, int]]) -> int:
        assert kinds[at : at + 2] == ["article", "noun"]
        spans.add((at, at + 1))
        if kinds[at + 2 : at + 3] != ["of nouns"]:
            return at + 2
        end = noun(kinds, at + 3, spans)
        spans |= {(at + 2, end - 1), (at, end - 1)}
        return end

    def kind(word: int) -> str:
        return next(name for name, last in KINDS if word <= last)

    for ids, spans in lab.phrases(60, 0):
        assert ids[0] == 0
        kinds, found = [kind(word) for word in ids[1:]], {(0, 10)}
        verb = noun(kinds, 0, found)
        assert kinds[verb] == "verb"
        end = noun(kinds, verb + 1, found)
        found.add((verb, end - 1))
        if end < 11:
            assert kinds[end] == "of verbs"
            assert noun(kinds, end + 1, found) == 11
            found |= {(end, 10), (verb, 10)}
        assert sorted(found) == sorted(spans)
        assert len(spans) == 10
        assert trees.f1(trees.splits(trees.heights_of(spans, 11)), spans, 11) == 1.0


KINDS = (("article", 2), ("noun", 10), ("verb", 14), ("of nouns", 16), ("of verbs", 18))


def test_characters_are_those_of_stories() -> None:
    found = lab.characters(5, 0, 40)
    assert found == lab.characters(5, 0, 40)
    assert [len(ids) for ids in found] == [40] * 5
    said = ["".join(lab.ALPHABET[one] for one in ids) for ids in found]
    assert all(" the " in one or " and " in one or ". " in one for one in said)

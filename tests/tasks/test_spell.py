"""From drafts to tokens: what is kept, what is dropped, and what the error says of it."""

from __future__ import annotations

from itertools import count, cycle

import pytest

from patchbay.signal.port import PatchbayError
from patchbay.tasks import facts_in_memory
from patchbay.tasks.spell import Draft, choose_words, replaced, single_tokens, spans, spans_in_order, spell


def draft(prompt="The apple is in box", answer=" A", wrong=(" B",), corrupted=None, marks=None, labels=None):
    twin = prompt.replace("apple", "lamp") if corrupted is None else corrupted
    return Draft(prompt, answer, wrong, twin, marks or {}, labels or {})


def spelled(model, *drafts, n=1):
    return spell("test", model, cycle(drafts), n, seed=0, options={"size": 3})


def test_spans_are_of_whole_words_in_order():
    text = "a cup, the cup and the cups of a"
    assert [text[a:b] for a, b in spans(text, "cup")] == ["cup", "cup"]
    assert spans(text, "cup") == [(2, 5), (11, 14)]
    assert spans_in_order(text, ["cup", "a"]) == [(2, 5), (31, 32)]
    assert replaced(text, {(2, 5): "knife", (11, 14): "fork"}) == "a knife, the fork and the cups of a"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"answer": " red fox"}, "an answer is not one token after the prompt"),
        ({"answer": "A"}, "an answer is not one token after the prompt"),
        ({"wrong": (" B", " red fox")}, "an answer is not one token after the prompt"),
        ({"corrupted": "The old lamp is in box"}, "the corrupted twin has another number of tokens"),
        ({"corrupted": "The xyzzy is in box"}, "a word is unknown to the tokenizer"),
        ({"answer": " xyzzy"}, "a word is unknown to the tokenizer"),
        ({"prompt": "The apple is in xyzzy", "corrupted": "The lamp is in box"}, "a word is unknown to the tokenizer"),
        ({"wrong": (" B", " B")}, "two answers are the same token"),
        ({"wrong": (" A",)}, "two answers are the same token"),
        ({"prompt": "The apple is in" + " box" * 300}, "longer than the model's 256 positions"),
        ({"marks": {"half": [(4, 6)]}}, "the tokens of the mark 'half' cross the edges of its words"),
    ],
)
def test_a_draft_that_tokens_do_not_say_is_dropped_and_named(plain, bad, reason):
    with pytest.raises(PatchbayError) as error:
        spelled(plain, draft(**bad))
    text = str(error.value)
    assert text.startswith("test: asked for 1 different prompts, found 0 with size=3; ")
    assert f"dropped: {reason} (such as " in text
    good = draft(
        "The pear is in box", corrupted="The lamp is in box", marks={"half": [(4, 8)]} if "marks" in bad else None
    )
    assert spelled(plain, draft(**bad), good).texts == ("The pear is in box",)


def test_equal_prompts_are_taken_once(plain):
    drafts = [draft(), draft("The pear is in box", corrupted="The lamp is in box")]
    assert spelled(plain, *drafts, n=2).texts == ("The apple is in box", "The pear is in box")
    with pytest.raises(PatchbayError, match="asked for 3 different prompts, found 2 with size=3; possible: n up to 2"):
        spelled(plain, *drafts, n=3)


def test_drafts_that_end_are_no_endless_loop(plain):
    with pytest.raises(PatchbayError, match="found 1"):
        spell("test", plain, iter([draft()]), 2, seed=0, options={})


def test_no_more_is_drawn_than_needed_when_all_is_good(plain):
    drawn = count()

    def drafts():
        for word in plain_words:
            next(drawn)
            yield draft(f"The apple is in {word}", corrupted=f"The lamp is in {word}")

    plain_words = [str(i) for i in range(100)]
    assert len(spell("test", plain, drafts(), 40, seed=0, options={})) == 40
    assert next(drawn) == 40


def test_twins_of_subjects_of_many_lengths_are_paired_by_length(gpt2):
    own = {"sky": "blue", "Ouagadougou": "red", "the old grey house": "green", "grass": "white", "Tananarive": "black"}
    task = facts_in_memory(gpt2, 30, table=own, relation="The colour of {subject} is")
    assert all(len(a) == len(b) for a, b in zip(task.clean, task.corrupted, strict=True))
    assert {"sky", "grass"} <= set(task.labels["subject"])
    for clean, marked, subject in zip(task.clean, task.marks["subject"], task.labels["subject"], strict=True):
        assert gpt2.tokenizer.decode([clean[at] for at in marked]) == f" {subject}"


def test_single_tokens_prefers_the_larger_kind_of_word(stories, gpt2):
    assert single_tokens(gpt2.tokenizer, ["cup", "xyzzy", "cup", "42"]) == ["cup", "42"]
    digits = [str(i) for i in range(12)]
    assert single_tokens(stories.tokenizer, digits) == digits[:10]  # after a space of their own


def test_choose_words_gives_all_or_says_what_failed(gpt2):
    assert choose_words(gpt2, "test", "words", ["cup", "hat"], 1) == ["cup", "hat"]
    with pytest.raises(PatchbayError) as error:
        choose_words(gpt2, "test", "magic words", ["cup", "xyzzy"], 2)
    assert str(error.value).startswith(
        "test: asked for 2 magic words, found 1 that are single tokens in this tokenizer, of 2 tried ('xyzzy' is 'Ġx' + "
    )
    assert "possible: up to 1 magic words" in str(error.value)

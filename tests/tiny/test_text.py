"""The text is the same for the same seed, its answers are right, and training never shows a held-out prompt."""

import itertools
import random
import re
import zlib

import pytest

from patchbay.tasks import words
from patchbay.tiny import text


def documents_of(task: str, n: int, *, held_out: bool = False, seed: int = 5) -> list[text.Document]:
    rng = random.Random(seed)
    return [text.make(task, rng, held_out=held_out) for _ in range(n)]


def items_of(task: str, n: int) -> list[words.Item]:
    return [document.item for document in documents_of(task, n)]


def test_same_seed_same_text_and_another_seed_another_text() -> None:
    first, again, other = (list(itertools.islice(text.documents(seed), 200)) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert {document.task for document in first} == set(text.TASKS)


@pytest.mark.parametrize(("held_out", "checksum"), [(False, 3443863695), (True, 3385107438)])
def test_the_text_is_the_one_that_the_weights_in_the_wheel_were_trained_on(held_out: bool, checksum: int) -> None:
    """Byte by byte, with the weights of its pieces: another word, wording or order of draws would be another text."""
    first = itertools.islice(text.documents(0, held_out=held_out), 2000)
    assert zlib.crc32("\n".join(repr(tuple(document)) for document in first).encode()) == checksum


def test_facts_are_fixed_and_one_to_one() -> None:
    assert len(words.FACTS) == len(set(words.FACTS.values())) == words.N_FACTS
    assert not set(words.LANDS) & set(words.CAPITALS)
    assert len(set(words.POOL)) == len(words.POOL)


@pytest.mark.parametrize("task", text.TASKS)
def test_no_training_prompt_is_held_out(task: str) -> None:
    held_out = {document.item.prompt for document in documents_of(task, 300, held_out=True) if has_answer(document)}
    seen = {
        prompt for document in documents_of(task, 3000, seed=6) if has_answer(document) for prompt in prompts(document)
    }
    assert held_out
    assert seen
    assert not held_out & seen


def has_answer(document: text.Document) -> bool:
    return any(weight == text.ANSWER for _, weight in document.pieces)


def prompts(document: text.Document) -> list[str]:
    """Every text of a training document that ends before an answer; a sum's prompt is the sum alone."""
    cuts = [i for i, (_, weight) in enumerate(document.pieces) if weight == text.ANSWER]
    if document.task == "sum":
        return [document.pieces[i - 1][0].strip() for i in cuts]
    if document.task in ("repeat", "story"):
        return [document.item.prompt]
    return ["".join(piece for piece, _ in document.pieces[:i]) for i in cuts]


def test_both_orders_of_a_held_out_sum_are_unseen() -> None:
    held_out = {sum_terms(document.item.prompt) for document in documents_of("sum", 300, held_out=True)}
    seen = {sum_terms(prompt) for document in documents_of("sum", 3000, seed=6) for prompt in prompts(document)}
    assert not held_out & (seen | {(right, left) for left, right in seen})


def sum_terms(prompt: str) -> tuple[int, int]:
    left, right = re.fullmatch(r"(\d+) \+ (\d+) =", prompt).groups()  # type: ignore[union-attr]
    return int(left), int(right)


def test_indirect_object_answers_the_other_name_in_both_orders() -> None:
    assert words.render_indirect_object("Mary", "John", "John", "store", "drink") == (
        "When Mary and John went to the store, John gave a drink to",
        " Mary",
    )
    assert words.render_indirect_object("Mary", "John", "Mary", "park", "apple", template=1).prompt.endswith(
        "Mary handed an apple to"
    )
    givers = set()
    for prompt, answer in items_of("indirect_object", 200):
        first, second, giver = [word for word in re.findall(r"\w+", prompt) if word in words.NAMES]
        assert answer.strip() == (second if giver == first else first)
        givers.add(giver == first)
    assert givers == {True, False}
    with pytest.raises(ValueError, match="neither 'Mary' nor 'John'"):
        words.render_indirect_object("Mary", "John", "Tom", "store", "drink")


def test_laundry_answer_is_the_only_object_named_once() -> None:
    counts = set()
    for prompt, answer in items_of("laundry", 300):
        listed, done = (re.findall(r"the (\w+)", part) for part in prompt.replace("On the list", "").split(".")[:2])
        assert set(listed) - set(done) == {answer.strip()}
        counts.add(len(listed))
    assert counts == set(range(3, 11))
    with pytest.raises(ValueError, match="exactly one must be left"):
        words.render_laundry(["hat", "cup", "pen"], ["hat"])


def test_successor_wraps_days_and_months_only() -> None:
    assert words.render_successor(words.DAYS, 5, 3) == ("Saturday, Sunday, Monday,", " Tuesday")
    assert words.render_successor(words.NUMBERS, 8, 2) == ("8, 9,", " 10")
    assert [words.successor(word) for word in ("December", "Z", "99", "41", "hat")] == [
        "January",
        None,
        None,
        "42",
        None,
    ]
    with pytest.raises(ValueError, match="past the last of 26"):
        words.render_successor(words.LETTERS, 23, 3)
    for prompt, answer in items_of("successor", 300):
        assert words.successor(prompt.rstrip(",").split()[-1]) == answer.strip()


def test_contradictions_state_a_false_capital_and_are_labelled_half_and_half() -> None:
    labels = []
    for document in documents_of("contradiction", 1000):
        said = document.text.split()
        land, stated = said[3], said[5].strip(".")
        assert stated != words.FACTS[land]
        assert document.item.answer.strip() in (stated, words.FACTS[land])
        assert (f" {stated}", text.SILENT) in document.pieces
        labels.append(document.item.answer.strip() == stated)
    assert 0.45 < sum(labels) / len(labels) < 0.55


def test_a_statement_about_another_land_is_never_learned_from() -> None:
    for document in documents_of("fact", 300):
        taught = "".join(piece for piece, weight in document.pieces if weight > text.SILENT)
        for land, capital in re.findall(r"The capital of (\w+) is (\w+)", taught):
            assert words.FACTS[land] == capital


def test_sums_and_bindings_are_right() -> None:
    for document in documents_of("sum", 200):
        for left, right, total in re.findall(r"(\d+) \+ (\d+) = (\d+)", document.text):
            assert int(left) + int(right) == int(total)
    for prompt, answer in items_of("binding", 200):
        boxes = {box: thing for thing, box in re.findall(r"The (\w+) is in box (\w)\.", prompt)}
        assert boxes[re.findall(r"Box (\w) contains", prompt)[-1]] == answer.strip()


def test_repeats_vary_in_length_offset_and_distance() -> None:
    """A model that learns one fixed distance or position would be right on few of them."""
    lengths, starts, distances = set(), set(), set()
    for document in documents_of("repeat", 500):
        words = document.text.split()
        n_repeated = 1 + sum(weight == text.ANSWER for _, weight in document.pieces)
        second = len(words) - n_repeated
        start = words.index(words[second])
        assert words[start : start + n_repeated] == words[second:]
        lengths.add(n_repeated)
        starts.add(start)
        distances.add(second - start)
    assert lengths == set(range(2, 31))
    assert starts == set(range(21))
    assert len(distances) > 30


def test_needle_is_stated_once_and_asked_at_the_end() -> None:
    for prompt, answer in items_of("needle", 200):
        name = prompt.split()[-2]
        assert prompt.count(f"The secret of {name} is") == 2
        assert f"The secret of {name} is{answer}." in prompt


def test_unknown_task_is_named_with_the_possible_ones() -> None:
    with pytest.raises(ValueError, match=r"no task 'laundrey'.*laundry"):
        text.make("laundrey", random.Random(0))

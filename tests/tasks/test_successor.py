from itertools import pairwise

import pytest

from patchbay.signal.port import PatchbayError
from patchbay.tasks import successor

# written out here, and not taken from the package: what follows what
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "Monday"]
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
    "January",
]
LETTERS = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
NUMBERS = [str(i) for i in range(100)]
NEXT = {a: b for words in (DAYS, MONTHS, LETTERS, NUMBERS) for a, b in pairwise(words)}


def shown(model, ids):
    return model.tokenizer.decode(list(ids), skip_special_tokens=True).rstrip(", ").split(", ")


def test_right_is_the_next_word(model):
    task = successor(model, 100)
    for i in range(len(task)):
        words = shown(model, task.clean[i])
        assert [NEXT[word] for word in words[:-1]] == words[1:]
        answer = model.tokenizer.decode([task.right[i]]).strip()
        assert answer == NEXT[words[-1]]
        assert answer not in words
        assert len(words) == task.labels["length"][i]
    assert set(task.labels["kind"]) == {"numbers", "letters", "days", "months"}


def test_twin_is_another_run_of_the_same_kind(model):
    task = successor(model, 100)
    for i in range(len(task)):
        clean, twin = shown(model, task.clean[i]), shown(model, task.corrupted[i])
        assert [NEXT[word] for word in twin[:-1]] == twin[1:]
        assert len(twin) == len(clean)
        assert twin[0] != clean[0]
        wrong = {model.tokenizer.decode([token]).strip() for token in task.wrong[i]}
        assert wrong == {clean[-1], NEXT[twin[-1]]}


def test_marks_stand_on_the_run(model):
    task = successor(model, 40)
    for i in range(len(task)):
        read = [model.tokenizer.decode([task.clean[i][at]]).strip() for at in task.marks["run"][i]]
        assert read == shown(model, task.clean[i])
        assert task.marks["last"][i] == task.marks["run"][i][-1:]


def test_days_and_months_wrap_and_numbers_do_not(plain):
    days = successor(plain, 7, kind="days", length=3)
    assert sorted(plain.tokenizer.decode([token]).strip() for token in days.right) == sorted(DAYS[:7])
    with pytest.raises(PatchbayError, match=r"asked for 8 different prompts, found 7 .*n up to 7"):
        successor(plain, 8, kind="days", length=3)
    assert len(successor(plain, 23, kind="letters", length=3)) == 23
    with pytest.raises(PatchbayError, match="found 23"):
        successor(plain, 24, kind="letters", length=3)


@pytest.mark.parametrize("kind", ["numbers", "letters", "days", "months"])
def test_kind_and_length_are_what_was_asked(model, kind):
    task = successor(model, 3, kind=kind, length=4)
    assert set(task.labels["kind"]) == {kind}
    assert set(task.labels["length"]) == {4}
    assert task.options == {"kind": kind, "kinds": [kind], "length": 4}


def test_all_takes_the_kinds_that_the_tokenizer_has(make_model, make_tokenizer):
    tokenizer = make_tokenizer(without=(*DAYS, *MONTHS, "C", "F", "I", "L", "O", "R", "U", "X"))
    model = make_model(tokenizer, len(tokenizer))
    assert successor(model, 10).options["kinds"] == ["numbers"]
    with pytest.raises(PatchbayError, match=r"asked for 7 days words in a row, found 0 .*'Monday' is"):
        successor(model, 10, kind="days")


def test_bad_options(plain):
    with pytest.raises(PatchbayError, match=r"kind='day'; possible: all, numbers.*did you mean 'days'"):
        successor(plain, kind="day")
    with pytest.raises(PatchbayError, match="length=7; possible: 2 to 6"):
        successor(plain, length=7)

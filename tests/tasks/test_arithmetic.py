import re

import pytest

from patchbay.signal.port import PatchbayError
from patchbay.tasks import arithmetic


def terms(text):
    return tuple(int(number) for number in re.fullmatch(r"(?:.*\. )?(\d+) \+ (\d+) =", text.strip()).groups())


def said(model, ids):
    return model.tokenizer.decode(list(ids), skip_special_tokens=True)


@pytest.mark.parametrize("examples", [0, 3])
def test_right_is_the_sum_and_the_twin_has_another(model, examples):
    task = arithmetic(model, 60, examples=examples)
    for i in range(len(task)):
        left, right = terms(said(model, task.clean[i]))
        twin_left, twin_right = terms(said(model, task.corrupted[i]))
        assert int(said(model, task.right[i : i + 1])) == left + right == task.labels["sum"][i]
        assert left == twin_left
        assert right != twin_right
        wrong = [int(said(model, [token])) for token in task.wrong[i]]
        assert wrong[0] == twin_left + twin_right
        assert left + right not in wrong
        differ = [
            at for at, pair in enumerate(zip(task.clean[i], task.corrupted[i], strict=True)) if len(set(pair)) > 1
        ]
        assert tuple(differ) == task.marks["right"][i]
        assert task.labels["carry"][i] == (left % 10 + right % 10 > 9)
        for mark, word in (("left", left), ("operator", "+"), ("right", right), ("equals", "=")):
            assert said(model, [task.clean[i][at] for at in task.marks[mark][i]]).strip() == str(word)


def test_examples_are_true_and_do_not_give_the_answer_away(plain):
    for text in arithmetic(plain, 60, maximum=4, examples=4).texts:
        *solved, asked = text.split(". ")
        assert len(solved) == 4
        for line in solved:
            a, b, total = map(int, re.fullmatch(r"(\d+) \+ (\d+) = (\d+)", line).groups())
            assert a + b == total
            assert sorted((a, b)) != sorted(terms(asked))


def test_maximum_is_the_largest_term(plain):
    found = [terms(text) for text in arithmetic(plain, 9, maximum=2).texts]
    assert sorted(found) == [(a, b) for a in range(3) for b in range(3)]
    with pytest.raises(PatchbayError, match="asked for 10 different prompts, found 9"):
        arithmetic(plain, 10, maximum=2)


def test_digit_tokenizers_are_asked_sums_below_ten(stories):
    task = arithmetic(stories, 50)
    assert max(task.labels["sum"]) == 9
    assert all(
        int(said(stories, [token])) == total for token, total in zip(task.right, task.labels["sum"], strict=True)
    )


def test_bad_options(plain):
    with pytest.raises(PatchbayError, match="maximum=1; possible: 2 and more"):
        arithmetic(plain, maximum=1)
    with pytest.raises(PatchbayError, match="examples=-1"):
        arithmetic(plain, examples=-1)

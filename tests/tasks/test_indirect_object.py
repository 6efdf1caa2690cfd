import re
from collections import Counter

import pytest

from patchbay.signal.port import PatchbayError
from patchbay.tasks import indirect_object
from patchbay.tasks.words import NAMES


def names_in(model, ids):
    return [
        word
        for word in re.findall(r"\w+", model.tokenizer.decode(list(ids), skip_special_tokens=True))
        if word in NAMES
    ]


def test_right_is_the_name_said_once(model):
    task = indirect_object(model, 60)
    for i in range(len(task)):
        counts = Counter(names_in(model, task.clean[i]))
        once = [name for name, count in counts.items() if count == 1]
        twice = [name for name, count in counts.items() if count == 2]
        assert (len(once), len(twice)) == (1, 1)
        assert model.tokenizer.decode([task.right[i]]) == f" {once[0]}"
        assert [model.tokenizer.decode([token]) for token in task.wrong[i]] == [f" {twice[0]}"]


def test_twin_is_abc_and_differs_at_the_three_names_only(model):
    task = indirect_object(model, 60)
    for i in range(len(task)):
        twin = names_in(model, task.corrupted[i])
        assert len(set(twin)) == 3
        assert not set(twin) & set(names_in(model, task.clean[i]))
        differ = {
            at for at, pair in enumerate(zip(task.clean[i], task.corrupted[i], strict=True)) if len(set(pair)) > 1
        }
        assert differ == {at for mark in ("io", "s1", "s2") for at in task.marks[mark][i]}


def test_orders_are_what_they_are_called(model):
    task = indirect_object(model, 60)
    for i, order in enumerate(task.labels["order"]):
        first, second, giver = names_in(model, task.clean[i])
        assert order == ("ABBA" if giver == second else "BABA")
        assert model.tokenizer.decode([task.right[i]]) == f" {first if order == 'ABBA' else second}"
    assert Counter(task.labels["order"])["ABBA"] in range(25, 36)
    for order in ("ABBA", "BABA"):
        assert set(indirect_object(model, 10, order=order).labels["order"]) == {order}


def test_marks_stand_on_their_words(model):
    task = indirect_object(model, 40)
    for i in range(len(task)):
        ids, marks = task.clean[i], {mark: groups[i] for mark, groups in task.marks.items()}
        assert [ids[at] for at in marks["io"]] == [task.right[i]]
        assert [ids[at] for at in marks["s1"] + marks["s2"]] == list(task.wrong[i] * 2)
        assert marks["s1"] < marks["s2"]
        thing = re.search(r"an? (\w+) to$", task.texts[i]).group(1)
        assert model.tokenizer.decode([ids[at] for at in marks["thing"]]) == f" {thing}"


def test_unknown_order_lists_the_known(plain):
    with pytest.raises(PatchbayError, match="order='ABAB'; possible: both, ABBA, BABA"):
        indirect_object(plain, order="ABAB")

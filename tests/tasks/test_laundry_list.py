import re
from collections import Counter

import pytest

from patchbay.signal.port import PatchbayError
from patchbay.tasks import laundry_list

FORM = re.compile(r"On the list are (.+?)\. (\w+) has \w+ (.+?)\. (\w+) still has to \w+ the$")


def things(text):
    return re.findall(r"the (\w+)", text)


def parse(text):
    listed, name, done, again = FORM.fullmatch(text).groups()
    assert name == again
    return things(listed), things(done)


def said(model, ids):
    return model.tokenizer.decode(list(ids), skip_special_tokens=True)


@pytest.mark.parametrize("objects", [3, 8, 20])
def test_right_is_what_the_text_leaves_undone(model, objects):
    task = laundry_list(model, 30, objects=objects)
    for i in range(len(task)):
        listed, done = parse(said(model, task.clean[i]))
        assert len(set(listed)) == objects
        assert len(set(done)) == objects - 1
        (left,) = set(listed) - set(done)
        assert said(model, task.right[i : i + 1]) == f" {left}"
        assert Counter(said(model, [token]) for token in task.wrong[i]) == Counter(f" {word}" for word in done)
        assert listed.index(left) == task.labels["missing_index"][i]


def test_twin_leaves_another_thing_and_differs_in_one_word(model):
    task = laundry_list(model, 30, objects=6)
    for i in range(len(task)):
        listed, done = parse(said(model, task.corrupted[i]))
        (left,) = set(listed) - set(done)
        assert listed.index(left) == task.labels["twin_index"][i] != task.labels["missing_index"][i]
        differ = [
            at for at, pair in enumerate(zip(task.clean[i], task.corrupted[i], strict=True)) if len(set(pair)) > 1
        ]
        assert tuple(differ) == task.marks["swapped"][i]
        assert task.corrupted[i][differ[0]] == task.right[i]


def test_marks_stand_on_their_words(model):
    task = laundry_list(model, 20, objects=5)
    for i in range(len(task)):
        listed, done = parse(task.texts[i])
        read = {mark: [said(model, [task.clean[i][at]]) for at in groups[i]] for mark, groups in task.marks.items()}
        assert read["objects"] == [f" {word}" for word in listed]
        assert read["done"] == [f" {word}" for word in done]
        assert [task.clean[i][at] for at in task.marks["missing"][i]] == [task.right[i]]


def test_the_missing_thing_may_stand_anywhere(plain):
    task = laundry_list(plain, 300, objects=5)
    counts = Counter(task.labels["missing_index"])
    assert set(counts) == set(range(5))
    assert min(counts.values()) > 35  # 60 expected, deviation 7
    again = Counter(
        parse(text)[1].index(parse(text)[0][0]) for text in task.texts if parse(text)[0][0] in parse(text)[1]
    )
    assert min(again[place] for place in range(4)) > 35  # the first thing is mentioned again at every place


@pytest.mark.parametrize("objects", [2, 21])
def test_number_of_objects_out_of_range(plain, objects):
    with pytest.raises(PatchbayError, match=rf"objects={objects}; possible: 3 to 20"):
        laundry_list(plain, objects=objects)


def test_too_few_words_says_how_many_and_which(make_model, make_tokenizer):
    from patchbay.tasks.words import OBJECTS

    tokenizer = make_tokenizer(without=tuple(word for word in OBJECTS if word not in ("hat", "cup", "pen", "box")))
    poor = make_model(tokenizer, len(tokenizer))
    with pytest.raises(PatchbayError, match=r"asked for 5 objects, found 4 .*'apple'.*possible: up to 4 objects"):
        laundry_list(poor, objects=5)
    task = laundry_list(poor, 20, objects=3)
    assert {word for text in task.texts for word in parse(text)[0]} == {"hat", "cup", "pen", "box"}

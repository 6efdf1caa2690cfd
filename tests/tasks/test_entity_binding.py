import re
from collections import Counter

import pytest

from patchbay.signal.port import PatchbayError
from patchbay.tasks import entity_binding


def said(model, ids):
    return model.tokenizer.decode(list(ids), skip_special_tokens=True)


def solve(text):
    """(object -> box, answer), read off the text."""
    pairs = dict(re.findall(r"The (\w+) is in box ([A-Z])\.", text))
    by_box, by_object = re.search(r"Box ([A-Z]) contains the$", text), re.search(r"The (\w+) is in box$", text)
    if by_box:
        return pairs, next(thing for thing, box in pairs.items() if box == by_box.group(1))
    return pairs, pairs[by_object.group(1)]


@pytest.mark.parametrize("query", ["box", "object"])
@pytest.mark.parametrize("boxes", [2, 5])
def test_right_and_twin_by_an_independent_reading(model, query, boxes):
    task = entity_binding(model, 30, boxes=boxes, query=query)
    for i in range(len(task)):
        pairs, answer = solve(said(model, task.clean[i]))
        twin_pairs, twin_answer = solve(said(model, task.corrupted[i]))
        assert len(pairs) == len(set(pairs.values())) == boxes
        assert said(model, task.right[i : i + 1]) == f" {answer}"
        assert twin_answer != answer
        candidates = list(pairs) if query == "box" else list(pairs.values())
        assert [said(model, [token]) for token in task.wrong[i]] == [
            f" {word}" for word in candidates if word != answer
        ]
        assert candidates.index(answer) == task.labels["asked"][i]
        assert candidates.index(twin_answer) == task.labels["twin"][i]
        moved = [thing for thing in pairs if pairs[thing] != twin_pairs[thing]]
        assert len(moved) == 2
        differ = [
            at for at, pair in enumerate(zip(task.clean[i], task.corrupted[i], strict=True)) if len(set(pair)) > 1
        ]
        asked_and_twin = sorted((task.labels["asked"][i], task.labels["twin"][i]))
        assert differ == [task.marks["objects"][i][at] for at in asked_and_twin]


@pytest.mark.parametrize("query", ["box", "object"])
def test_marks_stand_on_their_words(model, query):
    task = entity_binding(model, 20, query=query)
    for i in range(len(task)):
        pairs, _ = solve(task.texts[i])
        read = {mark: [said(model, [task.clean[i][at]]) for at in groups[i]] for mark, groups in task.marks.items()}
        assert read["objects"] == [f" {word}" for word in pairs]
        assert read["boxes"] == [f" {word}" for word in pairs.values()]
        assert [task.clean[i][at] for at in task.marks["answer"][i]] == [task.right[i]]
        assert read["query"] == read["partner"]
        assert task.marks["partner"][i] < task.marks["query"][i]


def test_every_place_is_asked(plain):
    counts = Counter(entity_binding(plain, 200, boxes=4).labels["asked"])
    assert min(counts[place] for place in range(4)) > 30  # 50 expected, deviation 6


def test_bad_options(plain):
    with pytest.raises(PatchbayError, match="query='boxes'; possible: box, object; did you mean 'box'"):
        entity_binding(plain, query="boxes")
    with pytest.raises(PatchbayError, match="boxes=1; possible: 2 to 20"):
        entity_binding(plain, boxes=1)

import re
from collections import Counter

import pytest

from patchbay.signal.port import PatchbayError
from patchbay.tasks import binding_counterfactuals

LABELS = ("asked", "positional", "lexical", "reflexive")


def said(model, ids):
    return model.tokenizer.decode(list(ids), skip_special_tokens=True)


def read(text):
    """(pairs of (key, entity) in order, place of the key that is asked), read off the text."""
    pairs = [(box, thing) for thing, box in re.findall(r"The (\w+) is in box ([A-Z])\.", text)]
    by_object = re.search(r"The (\w+) is in box$", text)
    if by_object:
        pairs = [(thing, box) for box, thing in pairs]
    asked = by_object or re.search(r"Box ([A-Z]) contains the$", text)
    return pairs, [key for key, _ in pairs].index(asked.group(1))


@pytest.mark.parametrize("query", ["box", "object"])
@pytest.mark.parametrize("boxes", [4, 6])
def test_labels_by_an_independent_reading(model, query, boxes):
    """The twin is read as text: where its query stands, whose key that was, and whose entity it now holds."""
    task = binding_counterfactuals(model, 30, boxes=boxes, query=query)
    for i in range(len(task)):
        clean, asked = read(said(model, task.clean[i]))
        twin, at = read(said(model, task.corrupted[i]))
        keys, entities = [key for key, _ in clean], [entity for _, entity in clean]
        label = {name: task.labels[name][i] for name in LABELS}
        assert len(set(label.values())) == 4
        assert label["asked"] == asked
        assert label["positional"] == at
        assert label["lexical"] == keys.index(twin[at][0])
        assert label["reflexive"] == entities.index(twin[at][1])
        assert sorted(twin) != sorted(clean)
        assert [pair for pair in twin if pair in clean] == [
            pair for j, pair in enumerate(clean) if j not in (at, label["lexical"], label["reflexive"])
        ]
        assert said(model, [task.right[i]]) == f" {entities[asked]}"
        assert [said(model, [token]) for token in task.wrong[i]] == [
            f" {entity}" for j, entity in enumerate(entities) if j != asked
        ]


def test_the_twin_ends_on_the_same_word_and_differs_only_where_it_must(model):
    task = binding_counterfactuals(model, 20)
    for i in range(len(task)):
        clean, twin = task.clean[i], task.corrupted[i]
        assert clean[-1] == twin[-1]
        differ = {at for at in range(len(clean)) if clean[at] != twin[at]}
        c, k, s = (task.labels[name][i] for name in LABELS[1:])
        changed = {task.marks["objects"][i][at] for at in (c, s)} | {task.marks["boxes"][i][at] for at in (c, k)}
        assert differ == changed | set(task.marks["query"][i])


def test_every_triple_of_places_comes_up(plain):
    task = binding_counterfactuals(plain, 400, boxes=4)
    counts = Counter(zip(*(task.labels[name] for name in LABELS[1:]), strict=True))
    assert len(counts) == 24
    assert max(counts.values()) < 40  # 17 expected, deviation 4


def test_bad_options(plain):
    with pytest.raises(PatchbayError, match="query='key'; possible: box, object"):
        binding_counterfactuals(plain, query="key")
    with pytest.raises(PatchbayError, match="boxes=3; possible: 4 to 20"):
        binding_counterfactuals(plain, boxes=3)

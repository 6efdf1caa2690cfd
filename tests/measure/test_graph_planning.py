"""Graph planning: each way is of one kind, distances and chances equal networks walked by loops, a walker at random is at the null."""

from __future__ import annotations

import importlib
import itertools
import random
from typing import Any

import pytest

import patchbay as pb
from patchbay.measure._samples import samples, texts_of
from tests.measure.test_text_loss import constant
from tests.measure.words import NAMES, reader

module: Any = importlib.import_module("patchbay.measure.graph_planning")


def plan(name: str, n: int, start: str, goal: str) -> Any:
    near: dict[str, set[str]] = {}
    for a, b in module.graph(name, n):
        near.setdefault(a, set()).add(b)
        near.setdefault(b, set()).add(a)
    return module.Plan(near, start, goal)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" B, D.", "optimal"),
        (" A B D and C", "optimal"),
        (" C A B D", "loop"),
        (" D", "hallucinated"),
        (" B E", "no goal"),
        ("", "no goal"),
        (" BD", "no goal"),
        (" B E B D", "loop"),
    ],
)
def test_planted(text: str, kind: str) -> None:
    """Ways from the root A of a tree of seven to the leaf D."""
    tree = plan("tree", 7, "A", "D")
    assert module.kind_of(tree, module.way_of(tree, text)) == kind
    assert module.by_chance(tree) == pytest.approx(1 / 2 * 1 / 3)
    ring = plan("ring", 6, "A", "C")
    assert module.kind_of(ring, module.way_of(ring, "F E D C")) == "longer"
    assert module.by_chance(plan("ring", 6, "A", "D")) == pytest.approx(2 * (1 / 2) ** 3)  # two shortest ways


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str) -> None:
    """Samples as they are drawn, told apart by a search over all ways."""
    model = reader(name)
    rows = [{"edges": "tree:3", "start": "B", "goal": "C"}, {"edges": ["A-B", "B-C"], "start": "A", "goal": "C"}]
    frame = "{edges}. {start} to {goal}: {start}"
    found = pb.measure.graph_planning(model, rows, frame=frame, per_prompt=3, max_new_tokens=12)
    prompts = ["A to B, A to C. B to C: B", "A to B, B to C. A to C: A"]
    drawn = samples(model, prompts, 3, max_new_tokens=12)
    for i, (start, middle, goal) in enumerate((("B", "A", "C"), ("A", "B", "C"))):
        best = 0
        for text in texts_of(model, drawn[i]):
            words = [w for w in "".join(c if c.isalnum() else " " for c in text).split() if w in ("A", "B", "C")]
            words = words[1:] if words[:1] == [start] else words
            best += words[:2] == [middle, goal]
        assert float(found["per_item"][i]) == pytest.approx(best / 3)
    assert found["distance"].tolist() == [2.0, 2.0]
    assert sum(row["share"] for row in found.tables["kinds"]) == pytest.approx(1.0)


def test_null() -> None:
    """A walk at random through the tree is a shortest way as often as the null says, of each pair of rooms."""
    chance, hits, expected = random.Random(0), 0, 0.0
    pairs = list(itertools.permutations("ABCDEFG", 2))
    for start, goal in pairs * 20:
        walk = plan("tree", 7, start, goal)
        at, steps = start, module.distances(walk)
        while at != goal and steps[at]:
            then = chance.choice(sorted(walk.near[at]))
            if steps[then] != steps[at] - 1:
                break
            at = then
        hits += at == goal
        expected += module.by_chance(walk)
    assert hits / len(pairs * 20) == pytest.approx(expected / len(pairs * 20), abs=0.03)
    found = pb.measure.graph_planning(constant({"x": 0.0}), [{"edges": "line:3", "start": "A", "goal": "C"}] * 3, max_new_tokens=2, per_prompt=1)  # fmt: skip
    assert float(found.values) == 0.0
    assert float(found["null"]) == 0.5


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"edges": ["A-B"], "start": "A", "goal": "C"}, "items, row 0: no way leads from A to C; the rooms are A, B"),
        ({"edges": ["A-B", "C-D"], "start": "A", "goal": "C"}, "no way leads from A to C"),
        ({"edges": ["A"], "start": "A", "goal": "A"}, "an edge is two rooms with - between them, got 'A'"),
        ({"edges": "tree:99", "start": "A", "goal": "B"}, "'tree:99' has a number of rooms, 3 to 26"),
        ({"edges": "tree:many", "start": "A", "goal": "B"}, "'tree:many' has a number of rooms"),
    ],
)
def test_bad_input_is_named(row: dict[str, Any], said: str) -> None:
    with pytest.raises(pb.PatchbayError, match=said):
        pb.measure.graph_planning(reader("characters"), [row])
    with pytest.raises(pb.PatchbayError, match="frame='{edges}' holds"):
        pb.measure.graph_planning(reader("characters"), [row], frame="{edges}")

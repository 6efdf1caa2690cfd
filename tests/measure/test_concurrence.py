"""Concurrence: planted sides are found, equals loops over pairs, names of variants do not matter."""

from __future__ import annotations

import random
from typing import Any

import pytest

import patchbay as pb
from tests.measure.test_text_loss import constant
from tests.measure.words import NAMES, by_hand, reader

KEYS = ["north", "south"]


def items(n: int, sides: int = 0) -> list[dict[str, Any]]:
    """Each item in three variants; in the first `sides` of them the second variant's word for the north is the other's for the south."""
    rows = []
    for i in range(n):
        for variant, claimant in (("en", None), ("xx", "north"), ("yy", "south")):
            own = {"item": f"land {i}", "variant": variant, "prompt": f"whose is {i} in {variant}?", "keys": KEYS}
            own["choices"] = ["b", "a"] if variant == "yy" and i < sides else ["a", "b"]
            rows.append(own | {"reference": "north"} | ({"claimant": claimant} if claimant else {}))
    return rows


def test_planted() -> None:
    """Always "a", which in the south's language means the south for 20 % of the items: those disagree, and each side answers for its own."""
    model = constant({"a": 5.0, "b": 0.0})
    found = pb.measure.concurrence(model, items(20, 4))
    assert float(found.values) == pytest.approx(0.8)
    assert (float(found["kb"]), float(found["con"]), float(found["non"])) == (1.0, 1.0, 0.8)
    assert float(found["delta"]) == pytest.approx(0.25)
    agreed = pb.measure.concurrence(model, items(6))
    assert float(agreed.values) == 1.0
    assert float(agreed["delta"]) == 0.0
    never = pb.measure.concurrence(model, items(6, 6))
    assert "delta" not in never
    assert any("divides by 0" in note for note in never.notes)


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str) -> None:
    """Pairs of all three variants, where no row says whose language it is in."""
    model = reader(name)
    rows = [
        {"item": i, "variant": v, "prompt": f"{v} {i} is", "choices": [f" {c}" for c in "abc"], "keys": list("xyz")}
        for i in range(5)
        for v in ("he", "she", "it")
    ]
    found = pb.measure.concurrence(model, rows)
    for i in range(5):
        said = []
        for row in (row for row in rows if row["item"] == i):
            [own] = model.encode([row["prompt"]])
            logp = [by_hand(model, model.encode([row["prompt"] + c])[0], len(own)) for c in row["choices"]]
            said.append(row["keys"][logp.index(max(logp))])
        pairs = [said[a] == said[b] for a in range(3) for b in range(a)]
        assert float(found["per_item"][i]) == pytest.approx(sum(pairs) / 3)
    assert float(found["null"]) == pytest.approx(1 / 3)
    renamed = [{**row, "variant": row["variant"] + "x"} for row in rows]
    assert found["per_item"].equal(pb.measure.concurrence(model, renamed)["per_item"])


def test_equal_choices_are_no_agreement() -> None:
    """A model that tells no choice apart agrees with itself as two coins do; the first choice of every row would be one answer."""
    found = pb.measure.concurrence(constant({"a": 1.0, "b": 1.0}), items(60))
    assert float(found.values) == pytest.approx(0.5, abs=0.25)
    assert float(found["kb"]) == pytest.approx(0.5, abs=0.25)


def test_null() -> None:
    """Variants that answer at random of two agree half the time, which p does not call concurrence."""
    model = constant({"a": 5.0, "b": 0.0})
    chance = random.Random(0)
    rows = [{**row, "choices": chance.choice((["a", "b"], ["b", "a"]))} for row in items(40)]
    found = pb.measure.concurrence(model, rows)
    assert float(found["null"]) == 0.5
    assert float(found["p"]) > 0.05


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"keys": ["north"]}, r"items, row 0: 2 choices and keys \['north'\]: one key of its own"),
        ({"reference": "west"}, "items, row 0: reference 'west' is none of the keys north, south"),
        ({"variant": "xx"}, "items, row 1: item land 0 has the variant xx already, in items, row 0"),
        ({"item": "alone"}, None),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], said: str | None) -> None:
    rows = items(1)[:2]
    rows[0].update(change)
    with pytest.raises(pb.PatchbayError, match=said or "none with two variants that have a claimant to compare"):
        pb.measure.concurrence(reader("characters"), rows)

"""The map of a sweep at hand: each effect stands where its edit is made, and what has not run is empty."""

from __future__ import annotations

import math

import torch

import patchbay as pb
from patchbay.app import partial
from patchbay.app.partial import partial_map

NAN = math.nan


def test_layers_by_position_whatever_order_they_came_in() -> None:
    entries = [(pb.zero(f"L{layer}.resid_out", positions=at),) for layer in (1, 0) for at in (4, 2, 3)]
    made = partial_map(entries, [1.0, 2.0, 3.0, NAN, 5.0, 6.0], "logits")
    assert made is not None
    assert (made["rows"], made["columns"], made["axes"], made["unit"]) == (["L0", "L1"], ["4", "2", "3"], ("layer", "position"), "logits")  # fmt: skip
    assert made["values"] == [[None, 5.0, 6.0], [1.0, 2.0, 3.0]]


def test_positions_are_told_however_they_are_written_and_places_where_they_differ() -> None:
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[:, 3] = True
    ragged = torch.tensor([[True, False], [False, True]])
    same = [(pb.zero("L0.resid_out", positions=at),) for at in ((1,), mask)]
    assert partial_map(same, [1.0, 2.0], "nats")["columns"] == ["1", "3"]  # type: ignore[index]
    other = [(pb.zero("L0.resid_out", positions=at),) for at in (ragged, ragged)]
    made = partial_map(other, [1.0, 2.0], "nats")
    assert made is not None
    assert (made["columns"], made["axes"][1]) == (["1", "2"], "place")


def test_heads_are_layers_by_heads_and_heads_at_places_are_parts_by_place() -> None:
    heads = [(pb.zero(f"L{layer}.H{head}.z"),) for layer in (0, 1) for head in (0, 2)]
    made = partial_map(heads, [1.0, 2.0, 3.0, 4.0], "logits")
    assert made is not None
    assert (made["rows"], made["columns"], made["axes"]) == (["L0", "L1"], ["H0", "H2"], ("layer", "head"))
    assert made["values"] == [[1.0, 2.0], [3.0, 4.0]]
    placed = [(pb.zero("L0.H1.z", positions=at),) for at in (0, 1)]
    made = partial_map(placed, [1.0, 2.0], "logits")
    assert made is not None
    assert (made["rows"], made["columns"], made["values"]) == (["L0.H1.z"], ["0", "1"], [[1.0, 2.0]])


def test_entries_of_several_edits_stand_in_a_row_and_very_many_are_not_drawn(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    pair = (pb.zero("L0.H0.z"), pb.zero("L1.H0.z"))
    made = partial_map([pair, pair[:1]], [NAN, 2.0], "logits")
    assert made is not None
    assert (made["rows"], made["columns"], made["values"]) == (["all"], ["1", "2"], [[None, 2.0]])
    mixed = partial_map([(pb.zero("L0.mlp.out"),), (pb.zero("L0.H0.z"),)], [1.0, 2.0], "logits")
    assert mixed is not None
    assert mixed["values"] == [[1.0, 2.0]]
    monkeypatch.setattr(partial, "MOST", 1)
    assert partial_map([pair, pair], [1.0, 2.0], "logits") is None

"""Cables are the Result's own channels and edges, with their scores and p."""

from __future__ import annotations

import pytest

from patchbay.app.cables import MOST, cables
from patchbay.app.document import of_result
from patchbay.results.result import Result
from patchbay.signal.channel import parse_channel

EDGES = [{"edge": "L0.H3 -> L1.KV3.v", "effect": 2.0, "p": 0.5, "p_adjusted": 0.75}, {"edge": "embed -> logits", "effect": -1.0, "p": None}]  # fmt: skip


def test_ranked_channels_are_cables_in_the_order_of_their_scores() -> None:
    parts = [parse_channel(text) for text in ("L0.H1.C3>L2.H0.q", "embed>L1.mlp")]
    result = Result(
        {"score": ([0.25, -0.5], ("part",), "composition"), "p_adjusted": ([0.01, 0.5], ("part",), "adjusted p")},
        parts=parts,
    )
    made = of_result(result)["cables"]
    assert made["lines"] == [
        {"from": "embed", "to": "L1.mlp", "score": -0.5, "p": 0.5},
        {"from": "L0.H1.C3", "to": "L2.H0.q", "score": 0.25, "p": pytest.approx(0.01)},
    ]
    assert (made["n"], made["smallest"]) == (2, None)


def test_edges_of_a_table_are_cables_and_a_circuit_says_how_many_are_enough() -> None:
    result = Result({"effect": (1.0, (), "logits"), "smallest": (2.0, (), "edges or parts")}, tables={"edges": EDGES})
    made = cables(result, [])
    assert made == {"lines": [{"from": "L0.H3", "to": "L1.KV3.v", "score": 2.0, "p": 0.75}, {"from": "embed", "to": "logits", "score": -1.0, "p": None}], "n": 2, "smallest": 2}  # fmt: skip
    none = Result(
        {"effect": (1.0, (), "logits"), "smallest": (float("nan"), (), "edges or parts")}, tables={"edges": EDGES}
    )
    assert cables(none, [])["smallest"] is None  # type: ignore[index]


def test_of_many_the_first_are_kept_and_all_are_counted() -> None:
    table = [{"unit": f"L0.H{i} -> logits", "score": 1.0} for i in range(MOST + 7)]
    made = cables(Result(1.0, (), "logits", tables={"circuit": table}), [])
    assert made is not None
    assert (len(made["lines"]), made["n"]) == (MOST, MOST + 7)


def test_a_result_of_parts_alone_has_none() -> None:
    result = Result([1.0], ("part",), "logits", parts=["L0.H1"], tables={"draws": [{"draw": 1, "unit": "x"}]})
    assert of_result(result)["cables"] is None

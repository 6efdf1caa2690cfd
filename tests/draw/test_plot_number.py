"""The figure of one number: value, whisker, null and groups stand where their numbers are."""

from __future__ import annotations

import torch

import patchbay as pb
from patchbay.draw.plot import drawable, figure
from tests.measure.words import reader


def test_a_meter_is_drawn_with_its_interval_null_and_groups() -> None:
    rows = [{"good": f"a{x}", "bad": f"{x} a b", "group": "one" if x < "c" else "two"} for x in "abcdef"]
    found = pb.measure.minimal_pairs(reader("characters"), rows)
    assert drawable(found)
    [axis] = figure(found).axes
    lines = [(line.get_xdata(), line.get_marker()) for line in axis.lines]
    points = [float(x[0]) for x, marker in lines if marker == "o"]
    assert points == [float(found.values), *(row["value"] for row in found.tables["groups"])]
    whisker = next(x for x, marker in lines if marker != "o")
    assert list(map(float, whisker)) == [float(found["low"]), float(found["high"])]
    assert any(
        float(x[0]) == float(found["null"]) == float(x[1]) for x, marker in lines if marker != "o" and len(x) == 2
    )
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["all", "one", "two"]


def test_any_number_is_drawn_beside_the_draws_of_its_null() -> None:
    draws = torch.tensor([0.1, -0.2, 0.05])
    found = pb.Result({"recovered": (0.9, (), "share"), "low": (0.8, (), "share"), "high": (1.0, (), "share"), "null": (draws, ("draw",), "share")})  # fmt: skip
    assert drawable(found)
    [axis] = figure(found).axes
    by_mark = {line.get_marker(): list(line.get_xdata()) for line in axis.lines}
    assert by_mark["o"] == [float(found.values)]
    assert by_mark["|"] == draws.double().tolist()
    assert by_mark["None"] == [float(found["low"]), float(found["high"])]

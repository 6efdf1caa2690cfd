"""The figure of a meter: value, whisker, null and groups stand where their numbers are."""

from __future__ import annotations

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

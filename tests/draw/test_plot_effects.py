"""The figure of side effects: each meter in a panel of its own unit, where its numbers are; and its page lists them once."""

from __future__ import annotations

import torch

import patchbay as pb
from patchbay.draw.plot import figure
from patchbay.draw.plot_effects import is_effects
from patchbay.draw.result_page import page_of
from patchbay.knobs.knob import Knob
from tests.measure.test_side_effects import meters
from tests.measure.words import reader


def effects(draws: int) -> pb.Result:
    knob = Knob("k", [pb.scale(pb.Port("attn.z", 1, 2), 1.0)], -2.0)
    return pb.measure.side_effects(reader("characters"), knob, meters(), draws=draws)


def test_each_meter_is_drawn_in_its_own_unit_beside_random_knobs() -> None:
    found = effects(3)
    panels = figure(found).axes
    assert [panel.get_xlabel() for panel in panels] == ["bits per byte", "share of pairs"]
    assert [panel.get_yticklabels()[0].get_text() for panel in panels] == ["text_loss", "pairs"]
    for i, panel in enumerate(panels):
        by_marker = {line.get_marker(): list(map(float, line.get_xdata())) for line in panel.lines[:3]}
        assert by_marker["|"] == found["random"][:, i].tolist()
        assert by_marker["None"] == [float(found["low"][i]), float(found["high"][i])]
        assert by_marker["o"] == [float(found["difference"][i])]
        assert any(text.get_text() == found.tables["meters"][i]["verdict"] for text in panel.texts)


def test_without_random_knobs_there_are_none_and_other_differences_are_bars() -> None:
    found = effects(0)
    assert all(line.get_marker() != "|" for panel in figure(found).axes for line in panel.lines)
    other = pb.Result(
        {"difference": (torch.tensor([1.0, 2.0]), ("condition",), "nats")}, coords={"condition": ["a", "b"]}
    )
    assert not is_effects(other)
    assert len(figure(other).axes) == 1


def test_the_page_lists_meters_once() -> None:
    page = page_of(effects(0))
    assert page.count("share of pairs</td>") == 1

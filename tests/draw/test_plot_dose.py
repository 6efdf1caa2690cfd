"""The figure of a dose and response holds the Result's numbers, one unit on each axis."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from patchbay.draw import plot
from patchbay.results.result import Result

STEPS = [0.0, 1.0, 4.0]


def dosed(chance_unit: str = "logits", **more: Any) -> Result:
    over = ("strength",)
    values: dict[str, Any] = {
        "score": (torch.tensor([-1.0, 1.0, 3.0]), over, "logits"),
        "effect": (torch.tensor([0.0, 2.0, 4.0]), over, "logits"),
        "effect_low": (torch.tensor([0.0, 1.5, 3.0]), over, "logits"),
        "effect_high": (torch.tensor([0.0, 2.5, 5.0]), over, "logits"),
        "chance_low": (torch.tensor([0.0, -0.5, -1.0]), over, chance_unit),
        "chance_high": (torch.tensor([0.0, 0.5, 0.75]), over, chance_unit),
        "kl": (torch.tensor([0.0, 0.1, 2.0]), over, "nats per token"),
        "loss": (torch.tensor([3.0, 3.1, 5.0]), over, "nats per token"),
        "loss_without": (torch.tensor(3.0), (), "nats per token"),
        "chosen": (torch.tensor(1.0), (), "strength"),
    } | more  # fmt: skip
    return Result(
        values, coords={"strength": STEPS}, provenance={"method": "measure.dose_response", "options": {"cap": 0.5}}
    )


def test_each_panel_has_one_unit_and_its_own_numbers() -> None:
    axes = plot.figure(dosed()).axes
    assert [axis.get_ylabel() for axis in axes] == [
        "effect\n(logits)",
        "KL\n(nats per token)",
        "loss\n(nats per token)",
    ]
    for axis, numbers in zip(axes, ([0, 2, 4], [0, 0.1, 2], [3, 3.1, 5]), strict=True):
        assert axis.lines[0].get_xdata().tolist() == STEPS
        assert axis.lines[0].get_ydata().tolist() == pytest.approx(numbers)
        assert any(list(line.get_xdata()) == [1, 1] for line in axis.lines)  # the chosen strength
    assert any(list(line.get_ydata()) == [0.5, 0.5] for line in axes[1].lines)  # the cap
    assert any(list(line.get_ydata()) == [3, 3] for line in axes[2].lines)  # the loss of the model as it is
    band = axes[0].collections[1].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (-1.0, 0.75)
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["effect", "random knobs", "chosen: 1"]


def test_what_was_not_measured_has_no_panel_and_another_unit_no_band() -> None:
    whole = dosed(chance_unit="share")
    axes = plot.figure(whole).axes
    assert len(axes[0].collections) == 1  # its own ends alone
    bare = Result(
        {name: (whole[name], ("strength",), "logits") for name in ("score", "effect")}, coords={"strength": STEPS}
    )
    (axis,) = plot.figure(bare).axes
    assert axis.get_xlabel() == "strength"
    assert len(axis.lines) == 2  # the curve and the line at 0


@pytest.mark.parametrize("unit", ["share", "logits"])
def test_no_figure_draws_two_units_on_one_axis(unit: str) -> None:
    """Ends, nulls and other curves are drawn where they have the unit of the axis, over steps and as bars."""
    over = {"layer": torch.tensor([1.0, 2.0, 4.0]), "part": torch.tensor([1.0, 2.0])}
    for axis_name, values in over.items():
        beside = dict.fromkeys(("low", "high", "null_mean", "null_high", "auc"), (values * 0.1, (axis_name,), unit))
        more: dict[str, Any] = {"parts": ["L0.H1", "L1.H0"]} if axis_name == "part" else {}
        axis = plot.figure(Result({"effect": (values, (axis_name,), "logits"), **beside}, **more)).axes[0]
        drawn = [child for child in (*axis.lines, *axis.collections) if child.get_label() not in ("effect", "_child0")]
        strokes = [line for line in axis.lines if line.get_label() in ("auc", "random control")]
        bands = [band for band in axis.collections if len(band.get_paths())]
        assert bool(strokes) == bool(bands) == (unit == "logits"), drawn

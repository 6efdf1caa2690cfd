"""The figure of a dose and response: effect with the band of random knobs, side effects, and the chosen strength; one unit a panel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from patchbay.draw.style import COLOURS, FAINT, GREY, INK, blank
from patchbay.results.result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

PANELS = {"effect": "effect", "kl": "KL", "loss": "loss"}  # variable -> the word on its axis


def is_dose(result: Result) -> bool:
    """Whether a Result has an effect at each strength."""
    return "effect" in result.variables and result.axes_of("effect") == ("strength",) == result.axes


def dose(result: Result) -> Figure:
    """Panels over strength: the effect, then divergence and loss on neutral text where they were measured."""
    shown = [name for name in PANELS if name in result.variables]
    drawn, first = blank((5.6, 1.6 + 1.5 * len(shown)), result)
    grid = drawn.add_gridspec(len(shown), 1, height_ratios=[2.0, *[1.0] * (len(shown) - 1)])
    first.set_subplotspec(grid[0])
    axes = [first, *(drawn.add_subplot(grid[i], sharex=first) for i in range(1, len(shown)))]
    steps = np.asarray(result.labels_of("strength"), dtype=np.float64)
    for i, (axis, name) in enumerate(zip(axes, shown, strict=True)):
        _panel(axis, result, name, steps, COLOURS[i])
        axis.tick_params(labelbottom=axis is axes[-1])
    axes[-1].set_xlabel("strength")
    if any(axis.get_legend_handles_labels()[1] for axis in axes[:1]):
        first.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return drawn


def _panel(axis: Axes, result: Result, name: str, steps: NDArray[np.float64], colour: str) -> None:
    """One curve with its ends; what it is compared with in grey, only where that has the curve's unit."""
    unit = result.units[name]

    def line(variable: str) -> Any:
        there = variable in result.variables and result.units[variable] == unit
        return result[variable].double().numpy() if there else None

    low, high = line(f"{name}_low"), line(f"{name}_high")
    if low is not None and high is not None:
        axis.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    axis.plot(steps, line(name), color=colour, linewidth=2, marker="o", markersize=4, label=PANELS[name])
    if name == "effect" and (chance := (line("chance_low"), line("chance_high")))[0] is not None:
        axis.fill_between(steps, *chance, color=FAINT, alpha=0.3, linewidth=0, label="random knobs")
    if name == "effect":
        axis.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    if name == "loss" and (plain := line("loss_without")) is not None:
        axis.axhline(float(plain), color=FAINT, linewidth=1, linestyle="--")
    cap = (result.provenance.get("options") or {}).get("cap")
    if name == "kl" and cap is not None:
        axis.axhline(float(cap), color=INK, linewidth=0.8, linestyle=":")
    if "chosen" in result.variables:
        label = f"chosen: {float(result['chosen']):g}" if name == "effect" else None
        axis.axvline(float(result["chosen"]), color=COLOURS[3], linewidth=1.2, linestyle="--", label=label)
    axis.set_ylabel(f"{PANELS[name]}\n({unit})" if unit else PANELS[name])
    axis.grid(axis="y", color=GREY, linewidth=0.7)
    axis.set_axisbelow(True)

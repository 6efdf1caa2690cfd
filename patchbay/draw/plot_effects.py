"""The figure of side effects: what a knob does to each meter beside what random knobs do, each meter on an axis of its own unit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from patchbay.draw.style import COLOURS, FAINT, GREY, INK, blank
from patchbay.results.letters import visible
from patchbay.results.result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 16  # panels
CAPTION = (
    "each meter in its own unit: the difference under the knob with its interval, and in grey what random knobs do; the line is no "
    "difference"
)


def is_effects(result: Result) -> bool:
    """Whether a Result has the differences of several meters, whose units differ."""
    rows = result.tables.get("meters") or [{}]
    return result.name == "difference" and result.axes == ("condition",) and {"unit", "verdict"} <= set(rows[0])


def effects(result: Result) -> Figure:
    """A panel for each meter; nothing is drawn of one that has no number."""
    rows = result.tables["meters"][:MOST]
    drawn, first = blank((6.4, 0.9 + 0.72 * len(rows)), result)
    grid = drawn.add_gridspec(len(rows), 1)
    first.set_subplotspec(grid[0])
    axes = [first, *(drawn.add_subplot(grid[i]) for i in range(1, len(rows)))]
    for i, (axis, row) in enumerate(zip(axes, rows, strict=True)):
        _panel(axis, result, i)
        axis.set_yticks([0], [visible(str(row["meter"]), 30)])
        axis.set_xlabel(str(row["unit"]), fontsize=8, labelpad=1)
        axis.annotate(
            str(row["verdict"]), (1, 0.5), (8, 0), xycoords="axes fraction", textcoords="offset points", va="center", fontsize=8
        )  # fmt: skip
    left = len(result.tables["meters"]) - len(rows)
    if left:
        axes[-1].set_xlabel(f"{axes[-1].get_xlabel()}   (and {left} more meters)", fontsize=8)
    return drawn


def _panel(axis: Axes, result: Result, i: int) -> None:
    """Random knobs as grey strokes, the difference as a point with its whisker."""
    value, low, high = (float(result[name][i]) for name in ("difference", "low", "high"))
    if "random" in result:
        drawn = result["random"][:, i].tolist()
        axis.plot(drawn, [0] * len(drawn), marker="|", markersize=14, ls="", color=FAINT, label="random knobs")
    if low == low and high == high:
        axis.plot([low, high], [0, 0], color=INK, linewidth=1.2, solid_capstyle="butt")
    axis.plot([value], [0], color=COLOURS[0], marker="o", markersize=5)
    axis.axvline(0, color=INK, linewidth=0.8, zorder=0)
    axis.set_ylim(-1, 1)
    axis.grid(axis="x", color=GREY, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8)

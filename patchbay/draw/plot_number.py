"""The figure of one number, as meters give it: the value with its interval, what a model without the signal scores or random draws do, and the groups of its table where it has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from patchbay.draw.style import COLOURS, FAINT, INK, blank
from patchbay.results.result import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 24  # rows


def is_number(result: Result) -> bool:
    """Whether a Result is one number with what belongs to it."""
    return result.axes == ()


def number(result: Result) -> Figure:
    """A row for the value, then one for each group: points with whiskers, the null as a dashed line, or a mark for each of its draws."""
    own: dict[str, Any] = {"value": float(result.values)}
    own |= {name: float(result[name]) for name in ("low", "high") if name in result.variables}
    rows: list[tuple[str, Mapping[str, Any]]] = [("all", own)]
    rows += [(str(row["group"]), row) for row in result.tables.get("groups", [])[:MOST]]
    drawn, axis = blank((5.6, 1.1 + 0.22 * len(rows)), result)
    for at, (_, row) in enumerate(rows):
        value = float(row["value"])
        if "low" in row and row["low"] == row["low"]:
            axis.plot(
                [float(row["low"]), float(row["high"])], [at, at], color=INK, linewidth=1.2, solid_capstyle="butt"
            )
        axis.plot([value], [at], color=COLOURS[0], marker="o", markersize=5)
    if "null" in result.variables:
        null = result["null"].double()
        if result.axes_of("null"):
            axis.plot(
                null.flatten().tolist(), [0] * null.numel(), color=FAINT, marker="|", ls="", label="null", zorder=0
            )
        else:
            axis.axvline(float(null), color=FAINT, linewidth=1, linestyle="--", label="null", zorder=0)
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel(result.unit)
    return drawn

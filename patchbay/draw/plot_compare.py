"""The figure of several knobs compared: effect by strength above the band of random knobs, and effect by what it costs on other text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from patchbay.draw.style import COLOURS, FAINT, GREY, INK, blank
from patchbay.results.letters import visible
from patchbay.results.result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Lines = NDArray[np.float64]

CAPTION = (
    "left: effect by strength with its interval, and in grey what random knobs do; right: the same effect by the divergence of neutral "
    "text, left of the dotted line within the cap; a ring is the recommended strength"
)


def is_comparison(result: Result) -> bool:
    """Whether a Result has the effects of several knobs at each strength."""
    return result.name == "effect" and result.axes == ("condition", "strength") and "low" in result


def comparison(result: Result) -> Figure:
    """Two panels that share the axis of the effect; the second where neutral text was measured."""
    costly = "kl" in result
    drawn, first = blank((8.4 if costly else 5.6, 3.8), result)
    grid = drawn.add_gridspec(1, 2 if costly else 1)
    first.set_subplotspec(grid[0])
    steps = np.asarray(result.labels_of("strength"), dtype=np.float64)
    _panel(first, result, np.broadcast_to(steps, result.values.shape))
    if "chance_low" in result:
        low, high = (_of(result, name) for name in ("chance_low", "chance_high"))
        first.fill_between(steps, low.min(0), high.max(0), color=FAINT, alpha=0.3, linewidth=0, label="random knobs")
    first.set_xlabel("strength")
    first.set_ylabel(f"effect ({result.unit})")
    if costly:
        second = drawn.add_subplot(grid[1], sharey=first)
        _panel(second, result, _of(result, "kl"), band=False)
        cap = (result.provenance.get("options") or {}).get("cap")
        if cap is not None:
            second.axvline(float(cap), color=INK, linewidth=0.8, linestyle=":")
        second.set_xlabel(f"KL on neutral text ({result.units['kl']})")
        second.tick_params(labelleft=False)
    drawn.legend(*first.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower left", ncols=2)
    return drawn


def _of(result: Result, name: str) -> Lines:
    return np.asarray(result[name].double().numpy(), dtype=np.float64)


def _panel(axis: Axes, result: Result, x: Lines, *, band: bool = True) -> None:
    """A line for each knob [condition, strength], a ring at its recommended strength."""
    steps, effect = list(result.labels_of("strength")), _of(result, "effect")
    low, high = (_of(result, name) for name in ("low", "high"))
    chosen: list[Any] = result["chosen"].tolist() if "chosen" in result else [float("nan")] * len(effect)
    for i, name in enumerate(result.labels_of("condition")):
        colour = COLOURS[i % len(COLOURS)]
        order = np.argsort(steps)
        axis.plot(
            x[i][order],
            effect[i][order],
            color=colour,
            linewidth=2,
            marker="o",
            markersize=4,
            label=visible(str(name), 44),
        )
        if band:
            axis.fill_between(x[i][order], low[i][order], high[i][order], color=colour, alpha=0.16, linewidth=0)
        if chosen[i] == chosen[i]:
            at = steps.index(chosen[i])
            axis.plot(
                [x[i][at]],
                [effect[i][at]],
                marker="o",
                markersize=11,
                fillstyle="none",
                color=colour,
                markeredgewidth=1.8,
            )
    axis.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    axis.grid(axis="y", color=GREY, linewidth=0.7)
    axis.set_axisbelow(True)

"""Result -> figure, chosen by the axes of its main variable. Draws what a Result holds and computes nothing of its own.

Two axes: a map of cells (layer by head, layer by position, ...), written into the cells where they are few. One axis of
parts, or a grid too wide to see: bars with whiskers, highest first. One axis of numbers (strength, n_parts, ...):
curves with bands from `low` and `high`. One number: a point with its whisker, beside its null. Differences of several
meters: a panel for each, in its own unit. Signed values get a diverging scale centred at 0 (blue above, red below);
others a sequential one (viridis); neither needs red told from green. Grey cells have no value. No window, no global state.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from patchbay.draw import plot_circuit
from patchbay.draw.graph import is_wiring
from patchbay.draw.plot_attribution import attribution
from patchbay.draw.plot_compare import comparison, is_comparison
from patchbay.draw.plot_dose import dose, is_dose
from patchbay.draw.plot_effects import effects, is_effects
from patchbay.draw.plot_number import is_number, number
from patchbay.draw.plot_wiring import wiring
from patchbay.draw.style import COLOURS, DIVERGING, FAINT, GREY, INK, SEQUENTIAL, blank, quantity, style, words
from patchbay.results.graph_file import is_graph
from patchbay.results.letters import visible as _visible
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    Cells = NDArray[np.float64]

CURVE_AXES = ("strength", "n_parts", "position", "query", "key", "draw", "prompt", "layer")  # steps that have an order
MAX_BARS, MAX_CELLS_WRITTEN, MAX_TICKS, MAX_COLUMNS = 24, 160, 32, 256


def figure(result: Result) -> Figure:
    """The figure of a Result. Its kind follows from the axes of the main variable; see the head of this file."""
    with style():
        drawn = _figure(result)
        FigureCanvasAgg(drawn)
    return drawn


def drawable(result: Result) -> bool:
    """Whether there is a figure for the axes of the main variable."""
    return is_graph(result) or (
        result.values.numel() > 0 and (is_wiring(result) or is_number(result) or len(result.axes) in (1, 2))
    )


def of_result(result: Result, *, graph: bool = False) -> Figure:
    """The figure of a Result, or with `graph` of a circuit's edges: what `Result.plot` draws."""
    return plot_circuit.circuit(result) if graph else figure(result)


def _figure(result: Result) -> Figure:
    if is_graph(result):
        return attribution(result)
    if not result.values.numel():
        raise PatchbayError(f"nothing to draw: {result.name} has shape {tuple(result.values.shape)}")
    if is_wiring(result):
        return wiring(result)
    if is_dose(result):
        return dose(result)
    if is_comparison(result):
        return comparison(result)
    if is_effects(result):
        return effects(result)
    if is_number(result):
        return number(result)
    axes = result.axes
    if result.tables.get("effects"):
        return _bars(result)
    if len(axes) == 2:
        if axes[0] in ("condition", "draw") and axes[1] in CURVE_AXES:
            return _curves(result)
        if axes[1] == "condition" and axes[0] in CURVE_AXES:
            return _curves(result)
        return _bars(result) if result.ranked and result.values.shape[1] > MAX_COLUMNS else _map(result)
    if len(axes) == 1:
        named = not all(isinstance(label, (int, float)) for label in result.labels_of(axes[0]))
        return _curves(result) if axes[0] in CURVE_AXES and not named else _bars(result)
    raise PatchbayError(
        f"no drawing for axes ({', '.join(axes)}); figures have one or two: take a mean or one step of the others"
    )


# --- maps -------------------------------------------------------------------------------------------


def _map(result: Result) -> Figure:
    """Cells of two axes, the first one downwards (layers count upwards, as in a stack)."""
    cells = _cells(result)  # [row, column]
    n_rows, n_columns = cells.shape
    written = cells.size <= MAX_CELLS_WRITTEN
    side = (0.52, 0.36) if written else (max(0.12, min(0.4, 7 / n_columns)), max(0.12, min(0.3, 5 / n_rows)))
    below = 0.07 * max((len(_visible(label)) for label in _steps(result, result.axes[1])), default=0)  # turned labels
    size = min(14.0, max(4.2, side[0] * n_columns + 1.9)), min(10.0, max(2.4, side[1] * n_rows + 1.4 + below))
    drawn, axis = blank(size, result)
    scale, colours = _scale(cells)
    upward = result.axes[0] == "layer"
    image = axis.imshow(
        np.ma.masked_invalid(cells), cmap=colours, norm=scale, aspect="auto", origin="lower" if upward else "upper"
    )
    axis.set_facecolor(GREY)  # shows where a cell has no value
    for which, name, count in (("y", result.axes[0], n_rows), ("x", result.axes[1], n_columns)):
        _name_steps(axis, which, name, _steps(result, name), count)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    if written:
        axis.set_xticks(np.arange(n_columns + 1) - 0.5, minor=True)
        axis.set_yticks(np.arange(n_rows + 1) - 0.5, minor=True)
        axis.grid(which="minor", color="white", linewidth=1.2)
        axis.tick_params(which="minor", length=0)
        _write_cells(axis, cells, image)
    _mark_highlights(axis, result)
    bar = drawn.colorbar(image, ax=axis, pad=0.02, fraction=0.05, aspect=18)
    bar.set_label(quantity(result))
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2, color=FAINT)
    return drawn


def _cells(result: Result) -> Cells:
    return np.asarray(result.values.double().numpy(), dtype=np.float64)


def _scale(cells: Cells) -> tuple[Normalize, str]:
    """Limits and colours: symmetric about 0 when values have both signs, else from the lowest to the highest."""
    finite = cells[np.isfinite(cells)]
    if not finite.size:
        return Normalize(0, 1), SEQUENTIAL
    low, high = float(finite.min()), float(finite.max())
    if low < 0:
        most = max(-low, high)
        return Normalize(-most, most), DIVERGING
    low = 0.0 if low < 0.5 * high else low
    return Normalize(low, high if high > low else low + 1.0), SEQUENTIAL


def _write_cells(axis: Axes, cells: Cells, image: Any) -> None:
    finite = np.abs(cells[np.isfinite(cells)])
    most = float(finite.max()) if finite.size else 0.0
    decimals = 0 if most >= 100 else 1 if most >= 10 else 2 if most >= 0.1 else 3
    for (row, column), value in np.ndenumerate(cells):
        if not math.isfinite(value):
            continue
        red, green, blue, _ = image.cmap(image.norm(value))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
        text = f"{value:.{decimals}f}" if most == 0 or most >= 0.01 else f"{value:.0e}"
        text = text[1:] if text.startswith("-") and not float(text) else text
        axis.text(column, row, text, ha="center", va="center", fontsize=7.5, color="white" if dark else INK)


def _mark_highlights(axis: Axes, result: Result) -> None:
    """Frames around the cells of highlighted parts."""
    if not result.ranked or len(result.axes) != 2:
        return
    layers, indices = result.labels_of("layer"), result.labels_of(result.axes[1])
    for part in result.highlights:
        if part.kind == result.axes[1] and part.layer in layers and part.index in indices:
            corner = (indices.index(part.index) - 0.5, layers.index(part.layer) - 0.5)
            for colour, width in (("white", 4.0), (COLOURS[1], 2.0)):
                axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=colour, linewidth=width, zorder=5))


def _steps(result: Result, name: str) -> list[Any]:
    """Labels of an axis, positions with their token where the Result knows it."""
    tokens = {str(row.get(name)): row.get("token") for row in result.tables.get("tokens", []) if name in row}
    labels = result.labels_of(name)
    return [f"{label} {tokens[str(label)]}" if tokens.get(str(label)) else label for label in labels]


def _name_steps(axis: Axes, which: str, name: str, labels: list[Any], count: int) -> None:
    """Ticks with the labels of an axis: all of them when few, numbers at round places when many."""
    texts = [_visible(label) for label in labels]
    named = any(not isinstance(label, (int, float)) for label in labels)
    stride = max(1, math.ceil(count / MAX_TICKS))
    places = list(range(0, count, stride))
    if not named and stride > 1:
        stride = next(
            step for step in (2, 4, 5, 8, 10, 16, 20, 32, 50, 100, 200, 500, 10**9) if count / step <= MAX_TICKS / 2
        )
        places = list(range(0, count, stride))
    long = which == "x" and named and (count > 6 or max(map(len, texts)) > 8)
    turned: dict[str, Any] = {"rotation": 90} if long else {}
    set_ticks = axis.set_xticks if which == "x" else axis.set_yticks
    set_ticks(places, [texts[place] for place in places], **turned)
    (axis.set_xlabel if which == "x" else axis.set_ylabel)(words(name))


# --- curves -----------------------------------------------------------------------------------------


def _curves(result: Result) -> Figure:
    """Curves over an ordered axis: the main variable (one line per condition), with bands from `low` and `high`."""
    over = (
        next(name for name in reversed(result.axes) if name in CURVE_AXES and name != "draw")
        if len(result.axes) == 2
        else ""
    )
    over = over or result.axes[0]
    drawn, axis = blank((5.6, 3.4), result)
    labels = result.labels_of(over)
    named = any(not isinstance(label, (int, float)) for label in labels)
    steps = np.arange(len(labels), dtype=np.float64) if named else np.asarray(labels, dtype=np.float64)
    others = [name for name in result.axes if name != over]
    lines = np.moveaxis(_cells(result), result.axes.index(over), -1).reshape(-1, len(steps))  # [line, step]
    names = [_visible(label) for label in result.labels_of(others[0])] if others else [words(result.name)]
    faint = others == ["draw"]
    for i, (line, name) in enumerate(zip(lines, names, strict=True)):
        colour = FAINT if faint else COLOURS[i % len(COLOURS)]
        axis.plot(
            steps, line, color=colour, linewidth=1 if faint else 2, marker="o", markersize=0 if faint else 4, label=name
        )
        if _beside(result, "low", "high"):
            low, high = (_line(result, v, over, i, len(steps)) for v in ("low", "high"))
            axis.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    shown = len(lines)
    if not others:
        shown += _side_curves(axis, result, steps)
    if (lines < 0).any() and (lines > 0).any():
        axis.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    axis.set_xlabel(words(over))
    axis.set_ylabel(quantity(result) if shown == 1 or others else result.unit)
    axis.grid(axis="y", color=GREY, linewidth=0.7)
    axis.set_axisbelow(True)
    if named:
        _name_steps(axis, "x", over, labels, len(labels))
    elif np.equal(np.mod(steps, 1), 0).all():
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    if shown > 1 and not faint:
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return drawn


def _beside(result: Result, *names: str) -> bool:
    """Whether variables may be drawn on the axis of the main one: they have its axes, and its unit."""
    there = set(names) <= set(result.variables)
    return there and all(result.axes_of(name) == result.axes and result.units[name] == result.unit for name in names)


def _line(result: Result, variable: str, over: str, i: int, count: int) -> Cells:
    array = np.asarray(result[variable].double().numpy(), dtype=np.float64)
    line: Cells = np.moveaxis(array, result.axes.index(over), -1).reshape(-1, count)[i]
    return line


def _side_curves(axis: Axes, result: Result, steps: Cells) -> int:
    """The other variables of the same axis and unit, thinner; the null as a grey band. Returns how many lines."""
    grounds = {"low", "high", "null_low", "null_high", "p"}
    if _beside(result, "null_mean", "null_high"):  # a band of shares says nothing on an axis of logits
        low = result["null_low"] if "null_low" in result else 2 * result["null_mean"] - result["null_high"]
        axis.fill_between(
            steps, low.double().numpy(), result["null_high"].double().numpy(), color=FAINT, alpha=0.25, lw=0
        )
    names = [name for name in result.variables[1:] if name not in grounds and _beside(result, name)]
    for i, name in enumerate(names, start=1):
        null = name == "null_mean"
        colour = FAINT if null else COLOURS[i % len(COLOURS)]
        label = "random control" if null else words(name)
        axis.plot(
            steps, result[name].double().numpy(), color=colour, lw=1.4, ls="--", marker="o", markersize=2.5, label=label
        )
    return len(names)


# --- bars -------------------------------------------------------------------------------------------


def _bars(result: Result) -> Figure:
    """Horizontal bars: the ranked parts, highest first, or the named steps of one axis in their order."""
    shown, left = _bar_rows(result)
    values = np.array([row["value"] for row in shown], dtype=np.float64)
    places = np.arange(len(shown))
    drawn, axis = blank((5.6, max(1.9, 0.25 * len(shown) + 1.2)), result)
    colours = [COLOURS[0] if value >= 0 else COLOURS[1] for value in values]
    axis.barh(places, values, height=0.68, color=colours)
    if shown and _beside(result, "low", "high"):
        ends = np.array([[row["value"] - row["low"], row["high"] - row["value"]] for row in shown]).T  # [end, bar]
        axis.errorbar(values, places, xerr=ends.clip(min=0), fmt="none", ecolor=INK, elinewidth=1, capsize=2.5)
    if shown and _beside(result, "null_mean"):
        null = [row["null_mean"] for row in shown]
        axis.plot(null, places, marker="|", markersize=11, mew=2, ls="", color=FAINT, label="random control")
        axis.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1)
    axis.set_yticks(places, [_visible(row["part"], 44) for row in shown])
    for row, text in zip(shown, axis.get_yticklabels(), strict=True):
        text.set_fontweight("bold" if row["part"] in result.highlights else "normal")
    axis.set_ylim(len(shown) - 0.4, -0.6)  # the first on top
    axis.axvline(0, color=INK, linewidth=0.8)
    axis.grid(axis="x", color=GREY, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    what = f"effect ({result.unit})" if result.tables.get("effects") else quantity(result)
    axis.set_xlabel(what + (f"   ({left})" if left else ""))
    return drawn


def _bar_rows(result: Result) -> tuple[list[dict[str, Any]], str]:
    """The rows to draw as bars, highest first for parts, and a word on those left out."""
    if ranking := result.tables.get("effects"):
        rows = [{"part": row[result.axes[0]], "value": row["effect"]} for row in ranking[:MAX_BARS]]
        total = result.sizes[result.axes[0]]
        return rows, f"strongest {len(rows)} of {total}" if total > len(rows) else ""
    if result.ranked:
        rows = sorted(result.table(MAX_BARS, by="abs"), key=lambda row: -row["value"])
        total = int((~result.values.isnan()).sum())
        return rows, f"strongest {len(rows)} of {total}" if total > len(rows) else ""
    beside = {v: result[v].tolist() for v in result.variables[1:] if result.axes_of(v) == result.axes}
    columns = {"part": result.labels_of(result.axes[0]), "value": result.values.tolist(), **beside}
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    if len(rows) <= MAX_BARS:
        return rows, ""
    measured = [row for row in rows if row["value"] == row["value"]]
    strongest = sorted(measured, key=lambda row: -abs(row["value"]))[:MAX_BARS]
    return sorted(strongest, key=lambda row: -row["value"]), f"strongest {len(strongest)} of {len(measured)}"

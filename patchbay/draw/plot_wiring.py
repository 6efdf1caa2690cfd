"""The map of a model's wiring: layers as columns, parts as nodes, channels as curves from writer to reader.

The width of a curve is its score, the colour what it is read as; a curve of a change that weakens is dashed. The strongest channels are drawn
(`n`), each pair of parts once per kind; filters are those of `graph.edges`. Nodes are coloured by role where roles are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch

from patchbay.draw.graph import Edge, edges
from patchbay.draw.style import COLOURS, INK, blank, style
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError, as_part

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

N_EDGES = 60
KIND_COLOURS = {"query": 0, "key": 1, "value": 2, "mlp": 3, "router": 4, "unembed": 5}  # places in COLOURS


def wiring(
    result: Result, *, roles: Mapping[str, Sequence[Part | str]] | None = None, n: int = N_EDGES, **chosen: Any
) -> Figure:
    """The map of a Result of `find.channels`. `roles`: name -> its parts, coloured and named. Other options: see `graph.edges`."""
    found = _once(edges(result, **chosen))[:n]
    if not found:
        raise PatchbayError(
            "no channel is left to draw: take a smaller least=, a larger p=, or more kinds, layers and parts"
        )
    columns, places = _layout(result, found)
    tallest = max(len(column) for column in columns)
    with style():
        drawn, axis = blank((max(6.4, 1.05 * len(columns) + 1.6), max(2.8, 0.34 * tallest + 1.5)), result)
        _edges(axis, found, places)
        _nodes(axis, places, {as_part(part): i for i, parts in enumerate((roles or {}).values()) for part in parts})
        _frame(axis, columns, found, list(roles or {}))
        FigureCanvasAgg(drawn)
    return drawn


def _once(found: list[Edge]) -> list[Edge]:
    """The strongest channel of each pair of parts and kind: components of one head lie on one another."""
    kept: dict[tuple[Part, Part, str | None], Edge] = {}
    for edge in found:
        kept.setdefault((edge.channel.writer, edge.reader, edge.channel.kind), edge)
    return list(kept.values())


def _column(part: Part) -> tuple[int, int]:
    """Where a part stands from left to right: layer, and attention before MLP."""
    if part.layer is None:
        return (-1, 0) if part.kind == "embed" else (10**9, 0)
    return part.layer, 0 if part.kind in ("head", "attn", "group") else 1


def _layout(result: Result, found: list[Edge]) -> tuple[list[list[Part]], dict[Part, tuple[float, float]]]:
    """Columns of parts, and the place of each. All heads of a drawn layer are shown; of neurons and experts only those with edges."""
    ends = {part for edge in found for part in (edge.channel.writer, edge.reader)}
    layers = {part.layer for part in ends}
    labels = [*result.labels_of("writer"), *(label.rpartition(".")[0] for label in result.labels_of("reader"))]
    for label in labels:
        if ".H" in label:
            part = as_part(label)
            if part.layer in layers:
                ends.add(part)
    keys = sorted({_column(part) for part in ends})
    columns = [sorted(part for part in ends if _column(part) == key) for key in keys]
    tallest = max(len(column) for column in columns)
    places = {}
    for x, column in enumerate(columns):
        start = (tallest - len(column)) / 2
        for y, part in enumerate(column):
            places[part] = (float(x), start + y)
    return columns, places


def _edges(axis: Axes, found: list[Edge], places: dict[Part, tuple[float, float]]) -> None:
    most = max(abs(edge.score) for edge in found) or 1.0  # all alike: thin lines
    for edge in reversed(found):  # the strongest on top
        start, end = places[edge.channel.writer], places[edge.reader]
        share = abs(edge.score) / most
        span, bend = end[0] - start[0], 0.04 * (KIND_COLOURS[str(edge.channel.kind)] - 1)  # kinds lie side by side
        line = FancyArrowPatch(
            start,
            end,
            connectionstyle=f"arc3,rad={bend - 0.12 * (span > 1):.3f}",
            arrowstyle="-",
            linewidth=0.4 + 2.8 * share**2,
            linestyle="--" if edge.score < 0 else "-",
            color=COLOURS[KIND_COLOURS[str(edge.channel.kind)]],
            alpha=0.25 + 0.6 * share,
            zorder=1,
            shrinkA=6,
            shrinkB=6,
        )
        axis.add_patch(line)


def _nodes(axis: Axes, places: dict[Part, tuple[float, float]], role: dict[Part, int]) -> None:
    for part, (x, y) in places.items():
        colour = COLOURS[role[part] % len(COLOURS)] if part in role else "white"
        axis.plot(
            x, y, marker="o" if part.kind == "head" else "s", markersize=15, mfc=colour, mec=INK, mew=0.8, zorder=3
        )
        text = {"head": f"H{part.index}", "expert": f"E{part.index}", "neuron": f"N{part.index}"}.get(
            part.kind, part.kind
        )
        shown = {"unembed": "U", "embed": "E", "mlp": "M", "attn": "A", "router": "R"}.get(text, text)
        axis.text(x, y, shown, ha="center", va="center", fontsize=6, zorder=4, color="white" if part in role else INK)


def _frame(axis: Axes, columns: list[list[Part]], found: list[Edge], roles: list[str]) -> None:
    names = []
    for column in columns:
        part = column[0]
        block = "heads" if part.kind in ("head", "attn") else "MLP"
        names.append(part.kind if part.layer is None else f"L{part.layer}\n{block}")
    tallest = max(len(column) for column in columns)
    axis.set_xlim(-0.6, len(columns) - 0.4)
    axis.set_ylim(tallest - 0.3, -0.7)
    axis.set_xticks(range(len(columns)), names)
    axis.set_yticks([])
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    kinds = [kind for kind in KIND_COLOURS if any(edge.channel.kind == kind for edge in found)]
    lines = [Line2D([], [], color=COLOURS[KIND_COLOURS[kind]], lw=2.5, label=f"read as {kind}") for kind in kinds]
    if any(edge.score < 0 for edge in found):
        lines.append(Line2D([], [], color=INK, lw=1.5, ls="--", label="weaker"))
    lines += [
        Line2D([], [], ls="", marker="o", ms=9, mfc=COLOURS[i % len(COLOURS)], mec=INK, label=name)
        for i, name in enumerate(roles)
    ]
    axis.legend(handles=lines, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    low, high = min(abs(edge.score) for edge in found), max(abs(edge.score) for edge in found)
    axis.set_xlabel(f"{len(found)} strongest channels, composition {low:.2f} (thin) to {high:.2f} (thick)")

"""An attribution graph: positions from left to right, layers upwards, the heaviest edges as lines, dashed where they push down.

Of a Result of several prompts the first is drawn. Diamonds are errors, squares tokens and logits, circles features; a node's size is its influence.
Biases, which stand at no position, are not drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.lines import Line2D

from patchbay.draw.style import COLOURS, FAINT, INK, blank, style
from patchbay.results.letters import visible
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

N_EDGES, N_NAMED = 150, 10
MARKS = {"feature": ("o", COLOURS[0]), "error": ("D", COLOURS[1]), "embed": ("s", INK), "logit": ("s", COLOURS[2])}
NAMES = {"feature": "feature", "error": "missed by the features", "embed": "token", "logit": "logit"}
Place = tuple[float, float]


def attribution(result: Result, n: int = N_EDGES) -> Figure:
    """The first prompt's graph with its `n` heaviest edges."""
    nodes, edges, tokens = (
        [row for row in result.tables[name] if row["prompt"] == 0] for name in ("nodes", "edges", "tokens")
    )
    places = _places([row for row in nodes if row["kind"] in MARKS])
    shown = sorted(
        (row for row in edges if row["source"] in places and row["target"] in places),
        key=lambda row: -abs(row["weight"]),
    )[:n]
    if not places:
        raise PatchbayError("this graph has no nodes to draw")
    top = max(y for _, y in places.values())
    with style():
        drawn, axis = blank((max(6.4, 0.9 * len(tokens) + 2.2), max(3.0, 0.62 * top + 1.8)), result)
        most = max((abs(row["weight"]) for row in shown), default=1.0) or 1.0
        for row in reversed(shown):
            (x0, y0), (x1, y1) = places[row["source"]], places[row["target"]]
            share = abs(row["weight"]) / most
            axis.plot(
                [x0, x1],
                [y0, y1],
                color=INK if row["weight"] >= 0 else COLOURS[1],
                lw=0.4 + 2.2 * share,
                alpha=0.15 + 0.65 * share,
                ls="-" if row["weight"] >= 0 else "--",
                zorder=1,
            )
        _nodes(axis, [row for row in nodes if row["node"] in places], places)
        axis.set_xticks(range(len(tokens)), [visible(str(row["token"]), 12) for row in tokens])
        layers = sorted(
            {(y, _level(row)) for row in nodes if row["node"] in places for y in [round(places[row["node"]][1])]}
        )
        axis.set_yticks([y for y, _ in layers], [name for _, name in layers])
        axis.set_xlim(-0.6, len(tokens) - 0.4)
        axis.set_ylim(-0.6, top + 0.7)
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
        axis.set_xlabel(f"position   (the {len(shown)} heaviest of {len(edges)} edges)")
        _legend(axis)
    return drawn


def _level(row: dict[str, Any]) -> str:
    return {"embed": "tokens", "logit": "logits"}.get(row["kind"], f"L{row['layer']}")


def _places(nodes: list[dict[str, Any]]) -> dict[str, Place]:
    """Nodes of one position and layer side by side, the most influential in the middle."""
    last = max((row["layer"] for row in nodes if row["kind"] != "logit"), default=-1)
    cells: dict[Place, list[dict[str, Any]]] = {}
    for row in nodes:
        y = last + 2 if row["kind"] == "logit" else row["layer"] + 1
        cells.setdefault((row["position"], y), []).append(row)
    places = {}
    for (x, y), rows in cells.items():
        step = min(0.22, 0.84 / len(rows))
        for i, row in enumerate(sorted(rows, key=lambda row: -row["influence"])):
            aside = (i + 1) // 2 * step * (1 if i % 2 else -1)
            places[row["node"]] = (x + aside, y + 0.12 * (i % 3 - 1) * (len(rows) > 3))
    return places


def _nodes(axis: Any, nodes: list[dict[str, Any]], places: dict[str, Place]) -> None:
    named = {
        row["node"]
        for row in sorted((r for r in nodes if r["kind"] in ("feature", "logit")), key=lambda row: -row["influence"])[
            :N_NAMED
        ]
    }
    most = max((row["influence"] for row in nodes if row["kind"] != "logit"), default=1.0) or 1.0
    for row in nodes:
        mark, colour = MARKS[row["kind"]]
        share = 1.0 if row["kind"] == "logit" else max(row["influence"], 0.0) / most
        x, y = places[row["node"]]
        axis.scatter([x], [y], s=14 + 90 * share, marker=mark, color=colour, edgecolor="white", lw=0.6, zorder=3)
        if row["node"] in named:
            text = (
                visible(str(row["token"]), 10)
                if row["kind"] == "logit"
                else row["part"].split(".", 1)[1].replace("mlp.", "")
            )
            axis.annotate(
                text, (x, y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=6, color=INK, zorder=4
            )


def _legend(axis: Any) -> None:
    lines = [
        Line2D([], [], ls="", marker=mark, color=colour, label=NAMES[kind]) for kind, (mark, colour) in MARKS.items()
    ]
    lines += [
        Line2D([], [], color=INK, lw=1.5, label="pushes up"),
        Line2D([], [], color=COLOURS[1], lw=1.5, ls="--", label="pushes down"),
    ]
    axis.legend(handles=lines, frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), labelcolor=INK)
    axis.grid(axis="y", color=FAINT, lw=0.3, alpha=0.5)

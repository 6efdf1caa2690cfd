"""The graph of a circuit: parts in columns by layer, its first edges as curves by what reads them, dashed where an edge works against the answer.

Reads the table "circuit" of a Result of `prove.circuit` and computes nothing. Width is the edge's score over the largest one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch

from patchbay.draw.style import COLOURS, INK, blank, style
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError, as_part

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

N_EDGES = 40
LAST = 10**9  # the column of the logits
Place = tuple[float, float]


@dataclass(frozen=True)
class Edge:
    """Writer and reader as they are named in the figure, the input that is read (q, k, v or nothing), and the score."""

    writer: str
    reader: str
    read: str
    score: float


def circuit(result: Result, n: int = N_EDGES) -> Figure:
    """The first `n` edges of a circuit that was made of edges. Raises PatchbayError for one made of parts."""
    found = [_edge(str(row["unit"]), float(row["score"])) for row in result.tables.get("circuit", [])[:n]]
    edges = [edge for edge in found if edge is not None]
    if not edges:
        raise PatchbayError(
            "this Result holds no circuit of edges to draw as a graph; prove.circuit on edge scores makes one"
        )
    columns = _columns(edges)
    places = {node: (float(x), y - len(nodes) / 2) for x, nodes in enumerate(columns) for y, node in enumerate(nodes)}
    with style():
        size = (max(6.4, 1.3 * len(columns) + 1.2), max(2.8, 0.42 * max(map(len, columns)) + 1.4))
        drawn, axis = blank(size, result)
        _draw(axis, edges, places)
        axis.set_xticks(range(len(columns)), [_heading(nodes[0]) for nodes in columns])
        axis.set_yticks([])
        axis.tick_params(length=0)
        axis.set_xlim(-0.5, len(columns) - 0.5)
        tallest = max(map(len, columns))
        axis.set_ylim(tallest / 2, -tallest / 2 - 0.8)
        for spine in axis.spines.values():
            spine.set_visible(False)
        axis.set_xlabel(f"the first {len(edges)} edges")
    return drawn


def _edge(unit: str, score: float) -> Edge | None:
    """ "L0.H3 -> L1.KV3.v" as an edge; None for what names no edge."""
    writer, arrow, reader = unit.partition(" -> ")
    if not arrow:
        return None
    head, _, read = reader.rpartition(".")
    if read in ("q", "k", "v"):
        return Edge(writer, head, read, score)
    return Edge(writer, head if read == "in" else reader, "", score)


def _column(node: str) -> tuple[int, int]:
    """Layer, and attention before MLP; the embedding first, the logits last."""
    if node in ("logits", "embed"):
        return (LAST, 0) if node == "logits" else (-1, 0)
    part: Part = as_part(node)
    return (part.layer if part.layer is not None else -1, 1 if part.kind in ("mlp", "expert", "neuron") else 0)


def _columns(edges: list[Edge]) -> list[list[str]]:
    nodes = {node for edge in edges for node in (edge.writer, edge.reader)}
    keys = sorted({_column(node) for node in nodes})
    return [sorted(node for node in nodes if _column(node) == key) for key in keys]


def _heading(node: str) -> str:
    layer, half = _column(node)
    return node if layer in (-1, LAST) else f"L{layer}\n{'MLP' if half else 'heads'}"


def _draw(axis: Axes, edges: list[Edge], places: dict[str, Place]) -> None:
    most = max(abs(edge.score) for edge in edges)
    colour = {"q": COLOURS[0], "k": COLOURS[1], "v": COLOURS[2], "": INK}
    for edge in reversed(edges):  # the strongest on top
        share = abs(edge.score) / most
        bend = {"q": -0.14, "k": 0.0, "v": 0.14, "": 0.05}[edge.read]  # inputs of one head lie side by side
        axis.add_patch(
            FancyArrowPatch(
                places[edge.writer],
                places[edge.reader],
                connectionstyle=f"arc3,rad={bend}",
                arrowstyle="-|>",
                mutation_scale=8,
                linewidth=0.6 + 2.4 * share,
                linestyle="--" if edge.score < 0 else "-",
                color=colour[edge.read],
                alpha=0.35 + 0.6 * share,
                shrinkA=11,
                shrinkB=12,
                zorder=1,
            )
        )
    for node, (x, y) in places.items():
        text = node.partition(".")[2] or node
        axis.text(
            x, y, text, ha="center", va="center", fontsize=7, zorder=3,
            bbox={"boxstyle": "round,pad=0.35", "fc": "white", "ec": INK, "lw": 0.8},
        )  # fmt: skip
    names = {"q": "read by a query", "k": "by a key", "v": "by a value", "": "by an MLP or the logits"}
    shown = [read for read in names if any(edge.read == read for edge in edges)]
    lines = [Line2D([], [], color=colour[read], lw=2, label=names[read]) for read in shown]
    if any(edge.score < 0 for edge in edges):
        lines.append(Line2D([], [], color=INK, lw=1.2, ls="--", label="against the answer"))
    axis.legend(handles=lines, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))

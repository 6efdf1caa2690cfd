"""Units of a circuit: the edges of a graph, or parts with all that they send, with their scores and their order."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch
from torch import Tensor

from patchbay.prove._graph import Graph
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError


@dataclass
class Units:
    """What a circuit is made of: edges, or parts with all that they send. `of` [writer, reader] is the unit, -1 always kept."""

    graph: Graph
    labels: list[str]
    scores: Tensor
    of: Tensor

    def keep(self, members: Tensor) -> Tensor:
        """Circuits [circuit, unit] as edges [circuit, writer, reader]."""
        return self.graph.valid & ((self.of < 0) | members[:, self.of.clamp_min(0)])


def units_of(graph: Graph, scores: Result | list[Part]) -> Units:
    if isinstance(scores, Result) and scores.axes == ("edit",):
        place = {graph.label(edge): edge for edge in graph.edges}
        labels = [str(label) for label in scores.labels_of("edit")]
        if set(labels) != set(place):
            odd = next(iter(set(labels) ^ set(place)))
            raise PatchbayError(
                f"scores are of another graph than this model's {len(place)} edges, for example {odd!r}"
            )
        of = torch.full(graph.valid.shape, -1)
        for unit, label in enumerate(labels):
            of[place[label]] = unit
        values = scores.values.double()
        if "exact" in scores:  # what was patched one by one is known better than estimated
            values = torch.where(scores["exact"].isnan(), values, scores["exact"].double())
        return Units(graph, labels, values, of)
    if isinstance(scores, Result):
        rows = [(row["part"], float(row["value"])) for row in scores.table()]  # raises where it ranks no parts
    else:
        parts = list(dict.fromkeys(scores))
        rows = [(part, float(len(parts) - i)) for i, part in enumerate(parts)]
    of = torch.full(graph.valid.shape, -1)
    for unit, (part, _) in enumerate(rows):
        of[_writers(graph, part)] = unit
    return Units(graph, [str(part) for part, _ in rows], torch.tensor([value for _, value in rows]).double(), of)


def _writers(graph: Graph, part: Part) -> list[int]:
    """The writers that a part stands for."""
    found = [i for i, writer in enumerate(graph.writers) if writer == part]
    if not found and part.kind == "attn":
        found = [i for i, writer in enumerate(graph.writers) if writer.layer == part.layer and writer.kind == "head"]
    if not found:
        raise PatchbayError(
            f"{part} is no writer of this model's graph: circuits are of edges, heads, attentions and MLPs "
            f"({', '.join(map(str, graph.writers[:6]))}, ...)"
        )
    return found


def order_of(units: Units, select: str) -> list[int]:
    """Units, best first; a unit without a score comes last."""
    size = (units.scores if select == "value" else units.scores.abs()).nan_to_num(-torch.inf)
    ranked = size.argsort(descending=True, stable=True).tolist()
    return _greedy(units, size) if select == "greedy" else ranked


def tied(units: Units) -> tuple[int, int]:
    """How many units have another's score, up to rounding, and how many have none but 0."""
    size = units.scores.abs().nan_to_num(0.0)
    step = 1e-6 * float(size.max()) or 1.0
    _, place, counts = (units.scores.nan_to_num(0.0) / step).round().unique(return_inverse=True, return_counts=True)
    return int((counts[place] > 1).sum()), int((size <= step).sum())


def _greedy(units: Units, size: Tensor) -> list[int]:
    """Grown from the logits: always the largest edge that is read by a part in the circuit; its writer's own readings come next."""
    graph = units.graph
    if int((units.of >= 0).sum()) != len(units.labels):
        raise PatchbayError(
            "select='greedy' follows edges from the logits back: give edge scores, or select='abs' or 'value'"
        )
    into: dict[int, list[int]] = {}
    for writer, reader in graph.edges:
        into.setdefault(reader, []).append(writer)
    waiting: list[tuple[float, int, int]] = []
    opened: set[int] = set()

    def open_reader(reader: int) -> None:
        if reader not in opened:
            opened.add(reader)
            for writer in into.get(reader, []):
                unit = int(units.of[writer, reader])
                heapq.heappush(waiting, (-float(size[unit]), unit, writer))

    open_reader(len(graph.readers) - 1)
    out = []
    while waiting:
        _, unit, writer = heapq.heappop(waiting)
        out.append(unit)
        for reader in _read_by(graph, graph.writers[writer]):
            open_reader(reader)
    return out + sorted(set(range(len(units.labels))) - set(out))


def _read_by(graph: Graph, part: Part) -> list[int]:
    """The readers through which a writer gets its input."""
    if part.layer is None:
        return []
    if part.kind == "mlp":
        return graph.of(part.layer, "mlp.in")
    found = graph.of(part.layer, "attn.out")
    if part.kind == "head":
        model, own = graph.model, part.index or 0
        group = own * model.n_groups(part.layer) // model.n_heads(part.layer)
        for signal, index in (("attn.q", own), ("attn.k", group), ("attn.v", group)):
            found += [i for i in graph.of(part.layer, signal) if graph.readers[i].index == index]
    return found

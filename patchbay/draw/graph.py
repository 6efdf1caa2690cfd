"""The wiring of a model as a graph: edges of a Result of `find.channels` or `find.channel_changes`, for drawing and for networkx.

Reads what the Result holds and computes nothing. `edges` picks by score, kind, layer and part; `to_networkx` gives a
networkx.MultiDiGraph (networkx is the extra `graph`), one node per part and one edge per channel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patchbay.signal.channel import Channel, parse_channel
from patchbay.signal.port import Part, PatchbayError, as_part

if TYPE_CHECKING:
    from patchbay.results.result import Result


@dataclass(frozen=True)
class Edge:
    """A channel with its score, its distance from the null and its adjusted p."""

    channel: Channel
    score: float
    z: float
    p: float

    @property
    def reader(self) -> Part:
        assert self.channel.reader is not None
        return self.channel.reader


def is_wiring(result: Result) -> bool:
    """Whether a Result holds a map of writers and readers."""
    return "whole" in result and result.axes_of("whole") == ("writer", "reader") and result.parts is not None


def edges(
    result: Result,
    *,
    of: str = "list",
    least: float = 0.0,
    p: float = 1.0,
    kinds: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    parts: Sequence[Part | str] | None = None,
    n: int | None = None,
) -> list[Edge]:
    """Channels, largest first. `of`: "list" (the ranked channels, components included) or "whole" (every whole writer and
    reader). `least`: |score| at least; `p`: adjusted p at most; `kinds`: query key value mlp router unembed; `layers`: both
    ends among them; `parts`: an end among them (roles: pass the parts of a role); `n`: the first n of these."""
    if not is_wiring(result):
        raise PatchbayError("this Result holds no wiring; find.channels and find.channel_changes return one")
    if of not in ("list", "whole"):
        raise PatchbayError(f"of={of!r}; possible are 'list' and 'whole'")
    found = _listed(result) if of == "list" else _whole(result)
    wanted = None if parts is None else {as_part(part) for part in parts}
    kept = []
    for edge in found:
        ends = (edge.channel.writer, edge.reader)
        inside = layers is None or all(part.layer is None or part.layer in layers for part in ends)
        named = wanted is None or any(part in wanted for part in ends)
        if (
            abs(edge.score) >= least
            and edge.p <= p
            and (kinds is None or edge.channel.kind in kinds)
            and inside
            and named
        ):
            kept.append(edge)
    return sorted(kept, key=lambda edge: -abs(edge.score))[:n]


def _listed(result: Result) -> list[Edge]:
    out = []
    for row in result.table():
        out.append(
            Edge(parse_channel(row["part"]), row["value"], row.get("z", math.nan), row.get("p_adjusted", math.nan))
        )
    return out


def _whole(result: Result) -> list[Edge]:
    writers, readers = result.labels_of("writer"), result.labels_of("reader")
    scores, z, p = (result[name].tolist() for name in ("whole", "whole_z", "whole_p"))
    return [
        Edge(parse_channel(f"{writer}>{reader}"), scores[i][j], z[i][j], p[i][j])
        for i, writer in enumerate(writers)
        for j, reader in enumerate(readers)
        if not math.isnan(scores[i][j])
    ]


def to_networkx(result: Result, **chosen: Any) -> Any:
    """A networkx.MultiDiGraph: nodes are parts (`layer`, `kind`), edges channels (`weight`, `z`, `p_adjusted`, `kind`, `component`,
    key the channel's text). Options are those of `edges`; by default every whole writer and reader with an adjusted p of 0.05."""
    try:
        import networkx
    except ImportError as error:
        raise PatchbayError("to_networkx needs networkx: pip install 'patchbay-lm[graph]'") from error
    graph = networkx.MultiDiGraph()
    options: dict[str, Any] = {"of": "whole", "p": 0.05} | chosen
    for edge in edges(result, **options):
        for part in (edge.channel.writer, edge.reader):
            graph.add_node(str(part), layer=part.layer, kind=part.kind)
        graph.add_edge(
            str(edge.channel.writer),
            str(edge.reader),
            key=str(edge.channel),
            weight=edge.score,
            z=edge.z,
            p_adjusted=edge.p,
            kind=edge.channel.kind,
            component=edge.channel.component,
        )
    return graph

"""Places: what a dictionary that is trained reads and writes, from one text.

"L0.resid_out"                                            one signal
"L0.mlp.in to L0.mlp.out"                                 a transcoder
"L0.resid_out, L1.resid_out"                              a crosscoder: one set of features for all of them
"L0.mlp.in to L0.mlp.out, L1.mlp.in to L1.mlp.out"        a cross-layer transcoder: features for each, which write in all after it too
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError, Port, parse_port

Kind = Literal["plain", "transcoder", "crosscoder", "cross_layer"]


@dataclass(frozen=True)
class Places:
    """What is read and what is written, in order of layers; of a crosscoder of two models the same place in each of them."""

    reads: tuple[Port, ...]
    writes: tuple[Port, ...]
    kind: Kind

    @property
    def layers(self) -> list[int]:
        return [port.layer or 0 for port in self.reads]

    @property
    def ports(self) -> list[Port]:
        return list(dict.fromkeys((*self.reads, *self.writes)))

    @property
    def blocks(self) -> int:
        """How many sets of features there are."""
        return len(self.reads) if self.kind == "cross_layer" else 1


def places_of(model: Model, at: str, *, models: int = 1) -> Places:
    """The places of a text; `models`: of how many models the signal is read side by side."""
    pairs = [[parse_port(end) for end in one.split(" to ")] for one in at.split(",")]
    reads, writes = tuple(pair[0] for pair in pairs), tuple(pair[-1] for pair in pairs)
    lengths = {len(pair) for pair in pairs}
    whole = all(port.index is None and port.layer is not None for pair in pairs for port in pair)
    inside = all(len({port.layer for port in pair}) == 1 for pair in pairs)
    alike = all(len({port.signal for port in end}) == 1 for end in (reads, writes))
    layers = [port.layer for port in reads]
    if not (whole and inside and alike and len(lengths) == 1 and max(lengths) <= 2) or len(set(layers)) < len(layers):
        raise PatchbayError(
            f"at={at!r}: one signal of a layer, such as 'L0.resid_out', or two, 'L0.mlp.in to L0.mlp.out'; with commas of several layers, each "
            "once and the same signals in all: a crosscoder, or a cross-layer transcoder"
        )
    for port in (*reads, *writes):
        model.require(port)
    order = sorted(range(len(reads)), key=lambda i: layers[i] or 0)
    reads, writes = tuple(reads[i] for i in order), tuple(writes[i] for i in order)
    if models > 1:
        if len(reads) > 1 or reads != writes:
            raise PatchbayError(
                f"at={at!r}: of two models, one signal of one layer is read in each, such as 'L1.resid_out'"
            )
        return Places(reads * models, writes * models, "crosscoder")
    single: Kind = "plain" if reads == writes else "transcoder"
    several: Kind = "crosscoder" if reads == writes else "cross_layer"
    return Places(reads, writes, several if len(reads) > 1 else single)

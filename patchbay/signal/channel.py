"""Channels as text and value: `L0.H1.C3>L2.H0.q` is component 3 of a head's output, read by a later head's query.

A writer is a head, MLP, neuron, expert or the embedding, whole or by component (`.C3`), or what a part adds whatever the prompt
(`L0.attn.bias`, `L0.mlp.bias`, `embed.positions`). A reader is a head's query, key or value (`.q .k .v`), an MLP or expert,
a router, or the unembedding. Who writes before whom reads follows from the layers, and from whether a family runs attention
and MLP side by side. Data only: whether a model has it, and its weights, are read in `wiring/`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from patchbay.signal.port import Part, PatchbayError, parse_part

READS = {"query": "q", "key": "k", "value": "v", "mlp": "", "router": "", "unembed": ""}  # kind -> its letter in a text
READING_PARTS = {"head": ("query", "key", "value"), "mlp": ("mlp",), "expert": ("mlp",), "router": ("router",)}
READING_PARTS |= {"unembed": ("unembed",)}
WRITES = ("head", "mlp", "neuron", "expert", "embed", "positions", "bias")
NAMED = {"positions": ("embed",), "bias": ("attn", "mlp")}  # writers that are no part of their own: `embed.positions`
FORMS = (
    "L0.H1.C3>L2.H0.q (component 3 of a head to a query), L0.H1>L2.H0.v, embed>L1.mlp, L0.attn.bias>unembed, L0.H1.C3"
)


@dataclass(frozen=True)
class Channel:
    """One writer, or one component of it, and one reader. `component`: a number, None for the whole writer, or "bias" or
    "positions" for what a part adds besides. Without a reader, the writer's component alone."""

    writer: Part
    component: int | str | None = None
    reader: Part | None = None
    kind: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.component, str) and self.writer.kind not in NAMED.get(self.component, ()):
            raise PatchbayError(f"{self.writer} has no {self.component!r}; channels are written {FORMS}")
        if self.writer.kind not in ("head", "mlp", "neuron", "expert", "embed", "attn"):
            raise PatchbayError(f"{self.writer} does not write into the stream by itself; channels are written {FORMS}")
        if self.writer.kind == "attn" and self.component != "bias":
            raise PatchbayError(f"{self.writer} writes by its heads (L0.H1) and its bias (L0.attn.bias)")
        if (self.reader is None) != (self.kind is None):
            raise PatchbayError(f"a channel has a reader and its kind, or neither; got {self.reader} and {self.kind}")
        if self.reader is not None and self.kind not in READING_PARTS.get(self.reader.kind, ()):
            possible = READING_PARTS.get(self.reader.kind)
            raise PatchbayError(
                f"{self.reader} does not read as {self.kind!r}; it reads as {', '.join(possible)}"
                if possible
                else f"{self.reader} reads nothing by itself; readers are heads, MLPs, experts, routers and unembed"
            )

    @property
    def source(self) -> str:
        """The writing side as text, `L0.H1.C3`."""
        if self.component is None:
            return str(self.writer)
        return (
            f"{self.writer}.{self.component}" if isinstance(self.component, str) else f"{self.writer}.C{self.component}"
        )

    @property
    def target(self) -> str:
        """The reading side as text, `L2.H0.q`; empty without a reader."""
        if self.reader is None or self.kind is None:
            return ""
        return f"{self.reader}.{READS[self.kind]}" if READS[self.kind] else str(self.reader)

    def __str__(self) -> str:
        return f"{self.source}>{self.target}" if self.reader is not None else self.source

    __repr__ = __str__


_SOURCE = re.compile(r"^(.*?)(?:\.C(\d+)|\.(bias|positions))?$", re.IGNORECASE)
_TARGET = re.compile(r"^(.*?)(?:\.(q|k|v|query|key|value))?$", re.IGNORECASE)


def parse_channel(text: str | Channel) -> Channel:
    """Read `L0.H1.C3>L2.H0.q` and its like; a Channel is returned as it is."""
    if isinstance(text, Channel):
        return text
    if not isinstance(text, str):
        raise PatchbayError(f"expected a channel such as {FORMS}, got {type(text).__name__}")
    pieces = [piece.strip() for piece in text.split(">")]
    if len(pieces) > 2 or not all(pieces):
        raise PatchbayError(f"{text!r} is not a channel; channels are written {FORMS}")
    found = _SOURCE.match(pieces[0])
    assert found is not None
    name, number, word = found.groups()
    component: int | str | None = int(number) if number else word.lower() if word else None
    if len(pieces) == 1:
        return Channel(parse_part(name), component)
    aim = _TARGET.match(pieces[1])
    assert aim is not None
    reader = parse_part(aim.group(1))
    letter = (aim.group(2) or "")[:1].lower()
    kinds = READING_PARTS.get(reader.kind, ("",))
    kind = next((k for k in kinds if READS.get(k) == letter), None)
    if kind is None:
        raise PatchbayError(
            f"{text!r}: {reader} "
            + (
                "is read as .q, .k or .v"
                if reader.kind == "head"
                else f"has no .{letter}"
                if letter
                else "does not read"
            )
            + f"; channels are written {FORMS}"
        )
    return Channel(parse_part(name), component, reader, kind)

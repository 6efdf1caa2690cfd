"""Addresses: which part of a model, and which of its signals. Data only; nothing here knows a model or imports torch.

A **Part** is a place: `L3.H5` (head), `L3.KV1` (key/value group), `L2.N77` (neuron), `L4.E2` (expert), `L3.F12`, `L3.mlp.F12`, `L3.attn.F12`
(feature of a dictionary of the stream, the MLP, attention), `L3.attn`, `L3.mlp`, `L3.router`, `L3` (layer), `embed`, `final_norm`, `unembed`. A **Port** is one signal at a part: `L3.H5.z`, `L3.resid_out`,
`logits`. This text is what prints, what files hold, what the command line and the app accept; it is parsed here and nowhere
else. The axis names of every signal are fixed here too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, total_ordering

from patchbay.errors import PatchbayError as PatchbayError  # where addresses are read, their refusals are caught
from patchbay.errors import suggest as suggest
from patchbay.signal.card import card

AXES: tuple[str, ...] = (
    "prompt",
    "position",
    "query",
    "key",
    "layer",
    "head",
    "neuron",
    "expert",
    "feature",
    "d_model",
    "d_head",
)
AXES += ("vocab", "edit", "choice")

# signal -> (axes of the whole signal of a layer, may it be patched)
SIGNALS: dict[str, tuple[tuple[str, ...], bool]] = {
    "embed": (("prompt", "position", "d_model"), True),
    "resid_in": (("prompt", "position", "d_model"), True),
    "resid_mid": (("prompt", "position", "d_model"), True),
    "resid_out": (("prompt", "position", "d_model"), True),
    "attn.q": (("prompt", "head", "query", "d_head"), True),
    "attn.k": (("prompt", "head", "key", "d_head"), True),
    "attn.v": (("prompt", "head", "key", "d_head"), True),
    "attn.pattern": (("prompt", "head", "query", "key"), True),
    "attn.z": (("prompt", "position", "head", "d_head"), True),
    "attn.head_out": (("prompt", "position", "head", "d_model"), True),
    "attn.out": (("prompt", "position", "d_model"), True),
    "mlp.in": (("prompt", "position", "d_model"), True),
    "mlp.act": (("prompt", "position", "neuron"), True),
    "mlp.out": (("prompt", "position", "d_model"), True),
    "router.logits": (("prompt", "position", "expert"), True),
    "router.weights": (("prompt", "position", "expert"), True),
    "router.experts": (("prompt", "position", "choice"), False),
    "experts.out": (("prompt", "position", "expert", "d_model"), True),
    "attn_features.act": (("prompt", "position", "feature"), True),
    "attn_features.error": (("prompt", "position", "d_model"), True),
    "mlp_features.act": (("prompt", "position", "feature"), True),
    "mlp_features.error": (("prompt", "position", "d_model"), True),
    "features.act": (("prompt", "position", "feature"), True),
    "features.error": (("prompt", "position", "d_model"), True),
    "final_norm": (("prompt", "position", "d_model"), True),
    "logits": (("prompt", "position", "vocab"), True),
}
WHOLE_MODEL = ("embed", "final_norm", "logits")  # signals that belong to no layer
LAYER = ("resid_in", "resid_mid", "resid_out")
HOMES = (
    "features",
    "attn_features",
    "mlp_features",
)  # of dictionaries that are attached, by where they write: one of each in a layer

# kind of part -> (letters in its text, {signal name at the part: signal of the layer})
KINDS: dict[str, tuple[str, dict[str, str]]] = {
    "head": (
        "H",
        {"q": "attn.q", "k": "attn.k", "v": "attn.v", "pattern": "attn.pattern", "z": "attn.z", "out": "attn.head_out"},
    ),
    "group": ("KV", {"k": "attn.k", "v": "attn.v"}),
    "neuron": ("N", {"act": "mlp.act"}),
    "expert": ("E", {"out": "experts.out", "weight": "router.weights", "logit": "router.logits"}),
    "feature": ("F", {"act": "features.act"}),
    "attn_feature": ("attn.F", {"act": "attn_features.act"}),
    "mlp_feature": ("mlp.F", {"act": "mlp_features.act"}),
}
FEATURES = ("feature", "attn_feature", "mlp_feature")
INDEX_AXIS = {"head": "head", "group": "head", "neuron": "neuron", "expert": "expert"} | dict.fromkeys(
    FEATURES, "feature"
)
MAIN_SIGNAL = {
    "head": "z",
    "group": "v",
    "neuron": "act",
    "expert": "out",
    "attn": "out",
    "mlp": "out",
} | dict.fromkeys((*FEATURES, *HOMES), "act")
LETTERS = {letters.upper(): kind for kind, (letters, _) in KINDS.items()}


@total_ordering
@dataclass(frozen=True)
class Part:
    """A place in a model: `kind` is one of head, group, neuron, expert, feature, mlp_feature, attn_feature, attn, mlp, router,
    layer, features, mlp_features, attn_features (all of a dictionary), embed, final_norm, unembed."""

    layer: int | None
    kind: str
    index: int | None = None

    def __lt__(self, other: Part) -> bool:
        return _order(self.layer, self.kind, self.index) < _order(other.layer, other.kind, other.index)

    def __str__(self) -> str:
        if self.layer is None:
            return self.kind
        if self.kind == "layer":
            return f"L{self.layer}"
        if self.index is None:
            return f"L{self.layer}.{self.kind}"
        return f"L{self.layer}.{KINDS[self.kind][0]}{self.index}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [
            [f"{self}.{name}" if self.layer is not None else name, ", ".join(SIGNALS[signal][0])]
            for name, signal in signals_of(self.kind).items()
        ]
        return card(f"{self} ({self.kind})", rows, columns=("signal", "axes of the layer's"))

    def port(self, signal: str | None = None) -> Port:
        """The port of `signal` at this part; without a name, the part's main one (head z, neuron act, expert out, ...)."""
        name = signal or MAIN_SIGNAL.get(self.kind)
        offered = signals_of(self.kind)
        if name not in offered:
            raise PatchbayError(
                f"{self}: asked for signal {signal or 'the main one'!r}, this part has {', '.join(offered) or 'none'}"
                + suggest(str(signal), list(offered))
            )
        # keys and values of a query head belong to its group: only the model knows which, so `Head.k` resolves that
        return Port(offered[name], self.layer, self.index if self.kind in KINDS else None)


def _order(*values: int | str | None) -> tuple[tuple[bool, int | str], ...]:
    """A sort key in which None, the whole model or the whole signal, comes first."""
    return tuple((value is not None, 0 if value is None else value) for value in values)


def signals_of(kind: str) -> dict[str, str]:
    """Signal names that a kind of part offers, with the layer signal that each one is a slice of."""
    if kind in KINDS:
        return KINDS[kind][1]
    if kind == "layer":
        return {name: name for name in LAYER}
    if kind in ("embed", "final_norm"):
        return {"out": kind}
    if kind == "unembed":
        return {"logits": "logits"}
    return {name.split(".")[1]: name for name in SIGNALS if name.startswith(kind + ".")}


@cache
def position_axis(signal: str) -> int:
    return next(i for i, axis in enumerate(SIGNALS[signal][0]) if axis in ("position", "query", "key"))


@total_ordering
@dataclass(frozen=True)
class Port:
    """The typed address of one signal.

    `signal` is a key of `SIGNALS`; `layer` is None for signals of the whole model; `index` picks one head, key/value group,
    neuron, expert or feature (None: all of them, on their own axis); `query` limits an attention pattern to some query rows.
    """

    signal: str
    layer: int | None = None
    index: int | None = None
    query: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.signal not in SIGNALS:
            raise PatchbayError(
                f"no signal {self.signal!r}; signals are {', '.join(SIGNALS)}" + suggest(self.signal, list(SIGNALS))
            )
        if (self.layer is None) != (self.signal in WHOLE_MODEL):
            raise PatchbayError(f"{self.signal} {'belongs to no' if self.signal in WHOLE_MODEL else 'needs a'} layer")
        if self.index is not None and self.index_axis is None:
            raise PatchbayError(f"{self.signal} has axes {', '.join(SIGNALS[self.signal][0])}: none to index")
        if self.query is not None and (self.signal != "attn.pattern" or not self.query):
            raise PatchbayError(
                f"{self.signal}: query rows {self.query} asked; one or more can be, of attn.pattern alone"
            )

    def __lt__(self, other: Port) -> bool:
        mine, theirs = (_order(p.layer, p.signal, p.index, *(p.query or ())) for p in (self, other))
        return mine < theirs

    @property
    def index_axis(self) -> str | None:
        """The axis that `index` picks from: head, neuron, expert or feature; None for signals of width d_model."""
        return next((axis for axis in SIGNALS[self.signal][0] if axis in ("head", "neuron", "expert", "feature")), None)

    @property
    def axes(self) -> tuple[str, ...]:
        """Axis names of the tensor that a tap of this port returns."""
        whole = SIGNALS[self.signal][0]
        return whole if self.index is None else tuple(axis for axis in whole if axis != self.index_axis)

    @property
    def position_axis(self) -> int:
        """Where the position (query, for q and pattern; key, for k and v) stands in the whole signal's axes."""
        return position_axis(self.signal)

    @property
    def tapped_axis(self) -> int:
        """Where the position stands in `axes`, those of what a tap of this port returns."""
        return self.axes.index(SIGNALS[self.signal][0][self.position_axis])

    @property
    def editable(self) -> bool:
        return SIGNALS[self.signal][1]

    @property
    def part(self) -> Part:
        """The part whose signal this is."""
        if self.layer is None:
            return Part(None, "unembed" if self.signal == "logits" else self.signal)
        if self.signal in LAYER:
            return Part(self.layer, "layer")
        if self.index is None:
            return Part(self.layer, self.signal.split(".")[0])
        if self.index_axis == "feature":
            return Part(self.layer, self.signal.split(".")[0].removesuffix("s"), self.index)
        kind = {"neuron": "neuron", "expert": "expert"}.get(str(self.index_axis), "head")
        return Part(self.layer, "group" if self.signal in ("attn.k", "attn.v") else kind, self.index)

    def rows(self, *query: int) -> Port:
        """This pattern at some query rows only (negative counts from the end): only those rows are computed."""
        return Port(self.signal, self.layer, self.index, tuple(query))

    def __str__(self) -> str:
        rows = "" if self.query is None else "[" + ",".join(str(i) for i in self.query) + "]"
        if self.layer is None:
            return self.signal
        if self.index is None:
            return f"L{self.layer}.{self.signal}{rows}"
        name = next(short for short, full in signals_of(self.part.kind).items() if full == self.signal)
        return f"{self.part}.{name}{rows}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return card(str(self), [["axes", ", ".join(self.axes)], ["", "tap, edit" if self.editable else "tap"]])


_PART = re.compile(
    r"^L(\d+)(?:\.(H|KV|N|E|(?:mlp\.|attn\.)?F)(\d+)|\.(attn|mlp|router|experts|(?:mlp_|attn_)?features))?$",
    re.IGNORECASE,
)
_ROWS = re.compile(r"^(.*)\[(-?\d+(?:,-?\d+)*)\]$")
FORMS = (
    "L3.H5 (head), L3.KV1 (key/value group), L2.N77 (neuron), L4.E2 (expert), L3.F12 or L3.mlp.F12 (feature), L3.attn, L3.mlp, L3, embed, "
    "unembed"
)


def parse_part(text: str) -> Part:
    """Read `L3.H5` and its like. Raises PatchbayError naming the forms when the text is none of them."""
    text = text.strip()
    if text in ("embed", "final_norm", "unembed"):
        return Part(None, text)
    found = _PART.match(text)
    if not found:
        raise PatchbayError(f"{text!r} is not a part; parts are written {FORMS}")
    layer, letters, index, room = found.groups()
    if letters:
        return Part(int(layer), LETTERS[letters.upper()], int(index))
    return Part(int(layer), room.lower() if room else "layer")


def parse_port(text: str) -> Port:
    """Read `L3.H5.z`, `L3.resid_out`, `L2.mlp.out`, `L1.H0.pattern[-1]`, `logits` and their like."""
    text = text.strip()
    rows = _ROWS.match(text)
    if rows:
        return parse_port(rows.group(1)).rows(*(int(i) for i in rows.group(2).split(",")))
    if text in WHOLE_MODEL:
        return Port(text)
    head, _, signal = text.rpartition(".")
    found = re.match(r"^L(\d+)\.(.+)$", text, re.IGNORECASE)
    if found and found.group(2) in SIGNALS:
        return Port(found.group(2), int(found.group(1)))
    if _is_part(text):
        raise PatchbayError(f"{text!r} is not a port: {_signals_at(parse_part(text))}")
    if not head or not _is_part(head):
        near = suggest(found.group(2), list(SIGNALS)) if found else suggest(text, WHOLE_MODEL)
        raise PatchbayError(
            f"{text!r} is not a port; a port is a part and a signal, like L3.H5.z, L3.resid_out, L2.mlp.out, logits. Signals of a "
            f"layer are {', '.join(name for name in SIGNALS if name not in WHOLE_MODEL)}{near}"
        )
    return parse_part(head).port(signal)


def _is_part(text: str) -> bool:
    return text in ("embed", "final_norm", "unembed") or _PART.match(text) is not None


def _signals_at(part: Part) -> str:
    """`L3.H5 is a head and has signals: L3.H5.q, L3.H5.k, ...`."""
    offered = [f"{part}.{name}" for name in signals_of(part.kind)] if part.layer is not None else [*WHOLE_MODEL]
    return f"{part} is a part, and a port is one of its signals: {', '.join(offered)}"


def by_group(text: str) -> bool:
    """Whether a port's text names the keys or values of a query head: which group these are, only the model knows."""
    return re.match(r"^\s*L\d+\.H\d+\.[kv]\s*$", text, re.IGNORECASE) is not None


def by_home(port: Port) -> tuple[str, str] | None:
    """Of a signal of a dictionary, where it is attached ("features", "mlp_features", "attn_features") and which signal it is."""
    home, _, name = port.signal.partition(".")
    return (home, name) if home in HOMES else None


def as_port(value: Port | str | object) -> Port:
    """A Port from a Port or its text. Raises PatchbayError for a part, with its signals, and for the keys and values of a query
    head, which belong to a group that the text alone does not tell."""
    if isinstance(value, Port):
        return value
    if isinstance(value, str):
        if by_group(value):
            raise PatchbayError(
                f"{value}: keys and values belong to a head's key/value group, which the model knows: give "
                f"model.port({value.strip()!r}), or the group, like L3.KV1.k"
            )
        return parse_port(value)
    part = value if isinstance(value, Part) else getattr(value, "part", None)
    if isinstance(part, Part):
        raise PatchbayError(f"expected a port: {_signals_at(part)}")
    raise PatchbayError(
        f"expected a port, such as model.layers[3].heads[5].z or its text 'L3.H5.z', got {type(value).__name__}"
    )


def as_part(value: Part | str | object) -> Part:
    """A Part from a Part, its text, or a view such as `model.layers[3].heads[5]`."""
    if isinstance(value, Part):
        return value
    if isinstance(value, str):
        return parse_part(value)
    part = getattr(value, "part", None)
    if isinstance(part, Part):
        return part
    raise PatchbayError(f"expected a part ({FORMS}) or a part of a model, got {type(value).__name__}")

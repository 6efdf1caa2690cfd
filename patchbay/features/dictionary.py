"""Dictionary: many directions of a signal, few of which are active at a token (sparse autoencoders and transcoders). Data; it knows no model.

    pre = (x - a b_dec) W_enc + b_enc           a: 1 where the decoder's bias is taken from what is read, else 0
    z = select(pre)                             [feature], few of them not 0
    x^ = z W_dec + b_dec (+ x W_skip)           e = x - x^ is the error

    relu      z = relu(pre)
    jumprelu  z = relu(pre) where pre > threshold, else 0; gated and batch-topk dictionaries are this one when they are used
    topk      the k largest of relu(pre) at each token, the others 0
    groupmax  the largest of relu(pre) in each of k groups of neighbours, the others 0

Gated (Rajamanoharan et al. 2024): gate u + b_gate > 0 and value relu(e^r u + b_mag), u = (x - a b_dec) W_enc, which is jumprelu with weights
W_enc e^r, bias b_mag and threshold b_mag - e^r b_gate. Numbers are those of the files, in float32 or more.

Of several layers:

crosscoder              z = select(sum_s x_s W_enc_s + b_enc)    x^_s = z W_dec_s + b_s           s: the layers `before` and its own
cross-layer transcoder  z_l = select(x_l W_enc_l + b_enc_l)      y^_m = sum_{l <= m} z_l W_dec_lm + b_m

A crosscoder's features are complete where the last of its sites is: they are parts of that layer, and an edit writes there, along that site's
decoder. A cross-layer transcoder is a dictionary for each layer (the first carries the others, `rest`), whose edits write at `later` layers too.
(Lindsey et al. 2024, "Sparse Crosscoders"; Ameisen et al. 2025, "Circuit Tracing".)
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchbay.features import saved
from patchbay.features.shapes import TENSORS, Form, Norm, check
from patchbay.signal.port import PatchbayError, parse_port


@dataclass(frozen=True, eq=False, repr=False)
class Dictionary:
    """Features of `reads` at `layer`, written to `writes` (the same signal, but for a transcoder). Made by `pb.load_dictionary`,
    `train.dictionary`, or from tensors of your own; `model.with_dictionaries(it)` makes its features parts of a model.

    `W_enc` [d_in, feature], `W_dec` [feature, d_out], `b_enc` [feature], `b_dec` [d_out]; `threshold` [feature] or one number, of
    jumprelu; `k`, of topk and groupmax. `subtract`: b_dec is taken from what is read. `normalise`: what is done to each token before it is
    encoded and undone after. `density`: share of tokens at which each feature is active, where it is known.

    A crosscoder reads `before` layers too: W_enc is then [layers x d, feature], `decoders` [before, feature, d] and `biases` [before, d] are
    theirs. A layer of a cross-layer transcoder writes at `later` layers too, by `onward` [later, feature, d]; `rest`: the other layers of its
    `family`, with the first.
    """

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    form: Form = "relu"
    layer: int = 0
    reads: str = "resid_out"
    writes: str = ""
    threshold: Tensor | None = None
    k: int | None = None
    W_skip: Tensor | None = None
    subtract: bool = False
    normalise: Norm = "none"
    density: Tensor | None = None
    source: str = ""
    notes: tuple[str, ...] = ()
    trained_on: dict[str, Any] = field(default_factory=dict)  # model, start token, context: what a file says of it
    before: tuple[int, ...] = ()
    decoders: Tensor | None = None
    biases: Tensor | None = None
    later: tuple[int, ...] = ()
    onward: Tensor | None = None
    family: str = ""
    rest: tuple[Dictionary, ...] = ()

    def __post_init__(self) -> None:
        for name in TENSORS:
            value = getattr(self, name)
            if value is not None:
                value = torch.as_tensor(value).detach()
                object.__setattr__(self, name, value if value.dtype == torch.float64 else value.float())
        object.__setattr__(self, "writes", self.writes or self.reads)
        check(self)

    # ---- shape ----

    @property
    def d_in(self) -> int:
        return int(self.W_enc.shape[0])

    @property
    def d_out(self) -> int:
        return int(self.W_dec.shape[1])

    @property
    def n_features(self) -> int:
        return int(self.W_dec.shape[0])

    @property
    def transcodes(self) -> bool:
        return self.reads != self.writes

    @property
    def sites(self) -> tuple[int, ...]:
        """The layers that it reads, its own last."""
        return (*self.before, self.layer)

    @property
    def spans(self) -> bool:
        """Whether it reads or writes more layers than its own."""
        return bool(self.before or self.later or self.family)

    @cached_property
    def digest(self) -> str:  # SHA-256 of all that its features are made of, 16 hex digits
        digest = hashlib.sha256(
            f"{self.form} {self.k} {self.subtract} {self.normalise} {self.layer} {self.reads} {self.writes}".encode()
        )
        digest.update(f"{self.before}{self.later}".encode() if self.spans else b"")
        for name in (name for name in TENSORS if name != "density"):
            value = getattr(self, name)
            if value is not None:
                digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
                digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    # ---- features ----

    def pre(self, x: Tensor) -> Tensor:
        """Pre-activations [..., feature] of what is read, [..., d_in]."""
        x = self._normed(self._cast(x))
        return (x - self.b_dec if self.subtract else x) @ self.W_enc + self.b_enc

    def encode(self, x: Tensor) -> Tensor:
        """Activations [..., feature] of what is read, [..., d_in]."""
        return self.select(self.pre(x))

    def select(self, pre: Tensor) -> Tensor:
        """Activations from pre-activations, [..., feature]; which they are depends on no other token."""
        value = pre.relu()
        if self.form == "relu":
            return value
        if self.form == "jumprelu":
            return torch.where(pre > self.threshold, value, 0.0)
        assert self.k is not None
        if self.form == "topk":
            top = value.topk(self.k, dim=-1)
            return torch.zeros_like(value).scatter(-1, top.indices, top.values)
        groups = value.unflatten(-1, (self.k, -1))
        best = groups.max(-1, keepdim=True)
        return torch.zeros_like(groups).scatter(-1, best.indices, best.values).flatten(-2)

    def decode(self, z: Tensor, x: Tensor) -> Tensor:
        """What is written, [..., d_out], of activations; `x` is what was read."""
        written = z @ self.W_dec.to(z) + self.b_dec.to(z)
        if self.W_skip is not None:
            written = written + self._cast(x) @ self.W_skip
        factor = self.factor(x)
        if factor is None:
            return written
        written = written * factor
        return written + self._cast(x).mean(-1, keepdim=True) if self.normalise == "layer_norm" else written

    def factor(self, x: Tensor) -> Tensor | None:
        """By what a token's decoded features are multiplied, [..., 1]; None where tokens are not normalised."""
        x = self._cast(x)
        if self.normalise == "none":
            return None
        if self.normalise == "layer_norm":
            return x.std(-1, keepdim=True)
        return x.norm(dim=-1, keepdim=True) / self.d_in**0.5

    def _normed(self, x: Tensor) -> Tensor:
        factor = self.factor(x)
        if factor is None:
            return x
        return (x - x.mean(-1, keepdim=True)) / (factor + 1e-5) if self.normalise == "layer_norm" else x / factor

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(torch.promote_types(self.W_enc.dtype, x.dtype if x.is_floating_point() else torch.float32))

    def rebuilt(self, z: Tensor, x: Tensor) -> Tensor:
        """What it says of all that it writes in one piece, [..., sites x d_out]: of a crosscoder every site's, in order."""
        if self.decoders is None or self.biases is None:
            return self.decode(z, x)
        earlier = [z @ rows.to(z) + b.to(z) for rows, b in zip(self.decoders, self.biases, strict=True)]
        return torch.cat([*earlier, self.decode(z, x)], dim=-1)

    # ---- files, and others made of it ----

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write it as SAELens 6 does (a cross-layer transcoder as circuit-tracer does), which `pb.load_dictionary` and others read.

        Raises PatchbayError for forms that these have not. A crosscoder's form is our own."""
        return saved.write(self, folder, overwrite=overwrite)

    def to(self, *where: Any) -> Dictionary:
        """The same on a device, or in a dtype of 32 bits or more."""
        held = ((name, getattr(self, name)) for name in TENSORS)
        moved: dict[str, Any] = {name: value.to(*where) for name, value in held if value is not None}
        return replace(self, **moved, rest=tuple(one.to(*where) for one in self.rest))

    def double(self) -> Dictionary:
        return self.to(torch.float64)

    def __repr__(self) -> str:
        what = {
            "relu": "ReLU",
            "jumprelu": "JumpReLU",
            "topk": f"TopK, k {self.k}",
            "groupmax": f"GroupMax, k {self.k}",
        }[self.form]
        wide = f"{self.d_in // len(self.sites)} numbers wide"
        lines = [f"Dictionary of {self.n_features} features ({what}) at {self.place}, {wide}"]
        lines += [f"  and of layers {', '.join(str(one.layer) for one in self.rest)}"] if self.rest else []
        lines += [f"  from {self.source}"] if self.source else []
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    @property
    def place(self) -> str:
        """Where it sits, as text: `L3.resid_out`, `L1.resid_out, L2.resid_out`, `L3.mlp.in to L3.mlp.out`."""
        reads = ", ".join(f"L{layer}.{self.reads}" for layer in self.sites)
        writes = ", ".join(f"L{layer}.{self.writes}" for layer in (self.layer, *self.later))
        return reads + (f" to {writes}" if self.transcodes or self.later else "")


def placed(it: Dictionary, at: str) -> Dictionary:
    """The same at another place: a port's text, or two with " to " between them for what is read and what is written; of a crosscoder one
    for each layer that it reads, with commas; of a cross-layer transcoder that of its first layer."""
    ends = at.split(" to ")
    reads, writes = ([parse_port(one) for one in end.split(",")] for end in (ends[0], ends[-1]))
    layers = [port.layer or 0 for port in reads]
    same = all(
        len({port.signal for port in end}) == 1 and None not in {port.layer for port in end} for end in (reads, writes)
    )
    if (
        len(ends) > 2
        or not same
        or len(reads) != len(it.sites)
        or (writes[-1].layer, len(writes)) != (layers[-1], len(reads))
    ):
        what = "one signal of a layer, such as 'L3.resid_out', or two, 'L3.mlp.in to L3.mlp.out'"
        what = (
            what
            if len(it.sites) == 1
            else f"{len(it.sites)} signals of one kind with commas, such as 'L1.resid_out, L2.resid_out'"
        )
        raise PatchbayError(f"at={at!r}: {what}")
    if it.rest and layers != [it.layer]:
        raise PatchbayError(f"at={at!r}: the first layer of this cross-layer transcoder is {it.layer}")
    signals: dict[str, Any] = {"reads": reads[0].signal, "writes": writes[0].signal}
    rest = tuple(replace(one, **signals) for one in it.rest)
    return replace(it, layer=layers[-1], before=tuple(layers[:-1]), rest=rest, **signals)


def gated(b_gate: Tensor, b_mag: Tensor, r_mag: Tensor, W_enc: Tensor) -> dict[str, Any]:
    """A gated encoder as the jumprelu one that computes the same."""
    rate = r_mag.double().exp()
    return {
        "W_enc": (W_enc.double() * rate).to(W_enc.dtype),
        "b_enc": b_mag,
        "threshold": (b_mag.double() - rate * b_gate.double()).to(b_mag.dtype),
        "form": "jumprelu",
    }

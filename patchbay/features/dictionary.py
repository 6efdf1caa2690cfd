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
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from patchbay.features import saved
from patchbay.signal.port import PatchbayError, parse_port

Form = Literal["relu", "jumprelu", "topk", "groupmax"]
FORMS: tuple[str, ...] = get_args(Form)
Norm = Literal["none", "layer_norm", "constant_norm_rescale"]
TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold", "W_skip", "density")


@dataclass(frozen=True, eq=False, repr=False)
class Dictionary:
    """Features of `reads` at `layer`, written to `writes` (the same signal, but for a transcoder). Made by `pb.load_dictionary`,
    `train.dictionary`, or from tensors of your own; `model.with_dictionaries(it)` makes its features parts of a model.

    `W_enc` [d_in, feature], `W_dec` [feature, d_out], `b_enc` [feature], `b_dec` [d_out]; `threshold` [feature] or one number, of
    jumprelu; `k`, of topk and groupmax. `subtract`: b_dec is taken from what is read. `normalise`: what is done to each token before it is
    encoded and undone after. `density`: share of tokens at which each feature is active, where it is known.
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

    def __post_init__(self) -> None:
        for name in TENSORS:
            value = getattr(self, name)
            if value is not None:
                value = torch.as_tensor(value).detach()
                object.__setattr__(self, name, value if value.dtype == torch.float64 else value.float())
        object.__setattr__(self, "writes", self.writes or self.reads)
        _check(self)

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

    @cached_property
    def digest(self) -> str:  # SHA-256 of all that its features are made of, 16 hex digits
        digest = hashlib.sha256(
            f"{self.form} {self.k} {self.subtract} {self.normalise} {self.layer} {self.reads} {self.writes}".encode()
        )
        for name in TENSORS[:-1]:
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

    # ---- files, and others made of it ----

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write it as SAELens 6 does, which `pb.load_dictionary` and others read. Raises PatchbayError for forms that SAELens has not."""
        return saved.write(self, folder, overwrite=overwrite)

    def to(self, *where: Any) -> Dictionary:
        """The same on a device, or in a dtype of 32 bits or more."""
        held = ((name, getattr(self, name)) for name in TENSORS)
        moved: dict[str, Any] = {name: value.to(*where) for name, value in held if value is not None}
        return replace(self, **moved)

    def double(self) -> Dictionary:
        return self.to(torch.float64)

    def __repr__(self) -> str:
        what = {
            "relu": "ReLU",
            "jumprelu": "JumpReLU",
            "topk": f"TopK, k {self.k}",
            "groupmax": f"GroupMax, k {self.k}",
        }[self.form]
        place = f"L{self.layer}.{self.reads}" + (f" to L{self.layer}.{self.writes}" if self.transcodes else "")
        lines = [f"Dictionary of {self.n_features} features ({what}) at {place}, {self.d_in} numbers wide"]
        lines += [f"  from {self.source}"] if self.source else []
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    @property
    def place(self) -> str:
        """Where it sits, as text: `L3.resid_out`, `L3.mlp.in to L3.mlp.out`."""
        return f"L{self.layer}.{self.reads}" + (f" to L{self.layer}.{self.writes}" if self.transcodes else "")


def placed(dictionary: Dictionary, at: str) -> Dictionary:
    """The same at another place: a port's text, or two with " to " between them for what is read and what is written."""
    ports = [parse_port(one) for one in at.split(" to ")]
    if not 1 <= len(ports) <= 2 or len({port.layer for port in ports}) > 1 or ports[0].layer is None:
        raise PatchbayError(
            f"at={at!r}: one signal of a layer, such as 'L3.resid_out', or two, 'L3.mlp.in to L3.mlp.out'"
        )
    return replace(dictionary, layer=ports[0].layer, reads=ports[0].signal, writes=ports[-1].signal)


def gated(b_gate: Tensor, b_mag: Tensor, r_mag: Tensor, W_enc: Tensor) -> dict[str, Any]:
    """A gated encoder as the jumprelu one that computes the same."""
    rate = r_mag.double().exp()
    return {
        "W_enc": (W_enc.double() * rate).to(W_enc.dtype),
        "b_enc": b_mag,
        "threshold": (b_mag.double() - rate * b_gate.double()).to(b_mag.dtype),
        "form": "jumprelu",
    }


def _check(it: Dictionary) -> None:
    """Refuse tensors that do not fit one another, or hold no numbers, by name."""
    d, n, out = it.W_enc.shape[0] if it.W_enc.ndim == 2 else -1, len(it.W_dec), it.W_dec.shape[-1]
    wanted = {"W_enc": (d, n), "W_dec": (n, out), "b_enc": (n,), "b_dec": (out,), "W_skip": (d, out), "density": (n,)}
    for name, shape in wanted.items():
        value = getattr(it, name)
        if value is not None and tuple(value.shape) != shape:
            told = f"W_enc {list(it.W_enc.shape)}, W_dec {list(it.W_dec.shape)}"
            raise PatchbayError(
                f"a dictionary: {name} has shape {list(value.shape)}, not {list(shape)} ({told}, [d, feature] and [feature, d])"
            )
    for name in TENSORS:
        value = getattr(it, name)
        if value is not None and not bool(torch.isfinite(value).all()) and name != "density":
            bad = int((~torch.isfinite(value)).sum())
            raise PatchbayError(f"a dictionary: {name} holds {bad} numbers that are NaN or infinite")
    if it.form not in FORMS:
        raise PatchbayError(f"a dictionary of form {it.form!r}; possible are {', '.join(FORMS)}")
    if (it.threshold is not None) != (it.form == "jumprelu"):
        raise PatchbayError(
            f"a dictionary of form {it.form} {'needs' if it.form == 'jumprelu' else 'has no'} threshold"
        )
    if it.threshold is not None and it.threshold.numel() not in (1, n):
        raise PatchbayError(f"a dictionary: {it.threshold.numel()} thresholds for {n} features")
    if (it.k is not None) != (it.form in ("topk", "groupmax")) or (it.k is not None and not 0 < it.k <= n):
        raise PatchbayError(f"a dictionary of form {it.form} with k={it.k}, of {n} features")
    if it.form == "groupmax" and n % (it.k or 1):
        raise PatchbayError(f"a dictionary of form groupmax: {n} features do not make {it.k} groups")
    if it.subtract and d != out:
        raise PatchbayError(
            f"a dictionary that reads {d} numbers and writes {out} cannot take b_dec from what it reads"
        )
    if it.normalise not in get_args(Norm):
        raise PatchbayError(f"a dictionary with normalise={it.normalise!r}; possible are {', '.join(get_args(Norm))}")
    named = {one.name for one in fields(it)}
    assert set(TENSORS) <= named

"""One checkpoint at several precisions: what is kept of a model's weights so that a load of them in other digits is known again.

A cast rounds every number by one rule, so that a float32 model knows to the bit what its checkpoint is in bfloat16 and in float16.
Of each tensor the SHA-256 is kept in its own dtype and in every coarser one (8 hex digits each); two loads of one checkpoint share
the digests of the coarser dtype. Where neither is a rounding of the other (float16 and bfloat16, quantised weights) 32 numbers of
each tensor, at places that its shape alone decides, have to agree within what both digits round: one step of bfloat16, or the
quantisation's step for its bits. A copy that was trained by less than that step in its quantised matrices alone is not told apart
from its origin; any change of what is not quantised is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from patchbay.model.carried import quantisation
from patchbay.model.fingerprint import brought, switched
from patchbay.model.linear import some_rows

if TYPE_CHECKING:
    from patchbay.jacks.modelled import Modelled as Model

DIGITS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
COARSER = {  # dtype -> those that its numbers are digested in
    torch.float64: ("float32", "float16", "bfloat16"),
    torch.float32: ("float32", "float16", "bfloat16"),
    torch.float16: ("float16",),
    torch.bfloat16: ("bfloat16",),
}
SAMPLES = 32  # of each tensor
HALF = 2.0**-8  # one step of bfloat16, relative
SUBNORMAL = 2.0**-24  # of float16

Kept = dict[str, dict[str, Any]]


def precisions(model: Model) -> Kept:
    """tensor -> `digests` by dtype, `samples`, `largest`, and `bits` where it is quantised; made once for these weights."""
    held: tuple[str, Kept] | None = model.__dict__.get("_precisions")
    if held is None or held[0] != model.fingerprint:
        held = (model.fingerprint, kept_of(model.hf))
        model.__dict__["_precisions"] = held
    return held[1]


@torch.no_grad()
def kept_of(hf: nn.Module) -> Kept:
    """What `precisions` keeps of a Hugging Face model."""
    made = quantisation(hf)
    bits = _bits(made) if made else 0
    packed = {name: module for name, module in hf.named_modules() if _packed(module)}
    kept: Kept = {}
    for name, value in hf.state_dict().items():
        owner = next((place for place in _owners(name) if place in packed), None)
        if owner is None or name == f"{owner}.bias":
            module = hf.get_submodule(name.rpartition(".")[0])
            one = _plain(brought(hf, name, value), turned=isinstance(module, Conv1D))
            written_out = made.get("method") == "gguf" and value.ndim > 1  # rounded in the file, plain numbers here
            kept[name] = {**one, "digests": {}, "bits": bits} if written_out else one
    for name, module in packed.items():
        kept[f"{name}.weight"] = _asked(module, bits)
    if acts := switched(hf):
        kept["adapters"] = {"digests": {"as it is": _digest("\n".join(acts).encode())}}
    return kept


def one_checkpoint(first: Kept, second: Kept) -> bool:
    """Whether two models hold the numbers of one checkpoint, as far as the digits of both tell."""
    return bool(first) and set(first) == set(second) and all(_same(first[name], second[name]) for name in first)


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two tensors are one, by the digest of the finest dtype that both have, else by their samples."""
    shared = next(
        (name for name in ("as it is", *DIGITS.values()) if name in a["digests"] and name in b["digests"]), None
    )
    if shared is not None:
        return bool(a["digests"][shared] == b["digests"][shared])
    if len(a.get("samples", ())) != len(b.get("samples", ())) or not a.get("samples"):
        return False
    largest = max(a["largest"], b["largest"])
    step = sum(2 * largest / (2 ** one["bits"] - 3) for one in (a, b) if one.get("bits"))
    pairs = zip(a["samples"], b["samples"], strict=True)
    return all(abs(x - y) <= step + HALF * max(abs(x), abs(y)) + SUBNORMAL for x, y in pairs)


# ---- one tensor ----------------------------------------------------------------------------------------


def _plain(value: Any, *, turned: bool) -> dict[str, Any]:
    """A tensor of numbers. `turned`: it is stored [in, out], and its samples are counted as of [out, in]."""
    if not isinstance(value, Tensor):
        return {"digests": {"as it is": _digest(repr(value).encode())}}
    held = value.detach().cpu().contiguous()
    if held.dtype not in COARSER:
        return {"digests": {"as it is": _digest(_bytes(held))}}
    digests = {
        DIGITS[dtype]: _digest(_bytes(held.to(dtype))) for dtype in DIGITS if DIGITS[dtype] in COARSER[held.dtype]
    }
    if not held.numel():
        return {"digests": digests}
    seen = held.T if turned and held.ndim == 2 else held
    found = seen[_places(seen.shape)] if seen.ndim == 2 else seen.flatten()[_places((seen.numel(),))]
    return {"digests": digests, "samples": _short(found), "largest": float(held.abs().max())}


def _asked(module: nn.Module, bits: int) -> dict[str, Any]:
    """A quantised map by what it makes of a few unit vectors."""
    n_in, n_out = int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    to, of = _places((n_out, n_in))
    rows = some_rows(module, of)
    found = rows[torch.arange(len(of)), to.to(rows.device)]
    return {"digests": {}, "samples": _short(found), "largest": float(rows.abs().max()), "bits": bits}


def _places(shape: Any) -> tuple[Tensor, ...]:
    """The places that are looked at: spread over each axis, and the same for the same shape."""
    count = torch.arange(SAMPLES, dtype=torch.int64)
    return tuple((count * step + 7) % int(size) for size, step in zip(shape, (2654435761, 40503), strict=False))


def _short(numbers: Tensor) -> list[float]:
    return [float(f"{number:.6g}") for number in numbers.double().flatten().tolist()]


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())


def _digest(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()[:8]


# ---- quantised -----------------------------------------------------------------------------------------


def _packed(module: nn.Module) -> bool:
    """Whether the module is a map whose weight is no plain floating-point tensor."""
    weight = getattr(module, "weight", None)
    plain = type(weight) in (Tensor, nn.Parameter) and weight.dtype in COARSER  # type: ignore[union-attr]
    return hasattr(module, "in_features") and hasattr(module, "out_features") and not plain and not _wraps(module)


def _wraps(module: nn.Module) -> bool:
    return isinstance(getattr(module, "base_layer", None), nn.Module)


def _owners(name: str) -> Iterator[str]:
    """The modules around a name of a state, innermost first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _bits(made: Mapping[str, Any]) -> int:
    """Bits whose even steps are no finer than the format's: the largest step of a float format lies at its largest numbers."""
    bits = int(made.get("bits", 4))
    return min(bits - 1, 4) if made.get("format") == "float" else bits

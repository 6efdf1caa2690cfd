"""The matrix that a module maps with now, whatever it is made of: plain weights, an adapter beside them, a parametrisation,
weights that are quantised or lie elsewhere.

A plain linear layer is believed: its weight is what it multiplies by. Any other module (a LoRA layer, a quantised one, a class
of its own) is asked: what it makes of random inputs must be what the matrix makes of them. The matrix that is tried is its
own weight, then that with its active adapters' changes, then what a packed weight unpacks to, then the one that the unit vectors
give, which is what the module multiplies by whatever it holds. A module of which none is true is no linear map, and is refused. Nothing is kept: a weight
that is trained, merged or switched off is seen.

Some quantised layers (bitsandbytes 8-bit, torchao with dynamic activations) also round what they are given, by a step that
depends on it. Their matrix is exact, and `Read.off` says how far that rounding takes what they make from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from patchbay.signal.port import PatchbayError

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
QUANTISED = 6e-2  # a quantised layer may round its inputs too
ROWS = 1024  # unit vectors in one call

Linear = tuple[Tensor, Tensor | None]  # [in, out] and [out]


@dataclass(frozen=True)
class Read:
    """What a module maps with: matrix [in, out], bias [out]; `off`: how far, relative, it is from that on random inputs."""

    matrix: Tensor
    bias: Tensor | None
    off: float = 0.0


def linear_map(module: Any) -> Linear:
    """The matrix [in, out] and the bias [out] that a module maps with: `module(x) == x @ matrix + bias`."""
    found = read(module)
    return found.matrix, found.bias


def read(module: Any) -> Read:
    """The module's map, and how well it holds. Raises PatchbayError where it is no linear map."""
    with there(module):
        if is_plain(module):
            return Read(*_stored(module))
        made = _normed(module)
        return _asked(module) if made is None else Read(made.T, module.bias)


def in_first(module: nn.Module) -> bool:
    """Whether a linear map's weight is stored [in, out], as transformers' Conv1D stores it; others are [out, in]."""
    return isinstance(module, Conv1D)


def bias_of(module: nn.Module | None) -> Tensor | None:
    """What a linear map adds, [out]; None where it adds nothing."""
    if module is None:
        return None
    stored = getattr(module, "bias", False)
    if hasattr(module, "base_layer") or not (stored is None or isinstance(stored, Tensor)):
        return linear_map(module)[1]
    with there(module):
        found: Tensor | None = module.bias  # type: ignore[assignment]
        return found


def passes_gradients(module: nn.Module) -> bool:
    """Whether autograd through the module is multiplying by its matrix, up to what a quantised one rounds."""
    matrix = linear_map(module)[0].detach()
    generator = torch.Generator().manual_seed(0)
    stored = _floats(getattr(module, "weight", None))
    dtype = torch.float32 if stored is None else stored.dtype
    x = torch.randn(3, matrix.shape[0], generator=generator).to(matrix.device, dtype).requires_grad_()
    with torch.enable_grad(), _in_evaluation(module):
        out = module.forward(x)
        towards = torch.randn(out.shape, generator=generator, dtype=torch.float32).to(out)
        (found,) = torch.autograd.grad(out, x, towards, allow_unused=True) if out.requires_grad else (None,)
    if found is None:
        return False
    right = towards.double() @ matrix.double().T
    return bool((found.double() - right).abs().max() <= 2 * QUANTISED * right.abs().max())


def refuse_gradients(hf: nn.Module, tried: set[Any]) -> None:
    """Raise PatchbayError where gradients do not pass quantised weights; one layer of each kind is tried, and kept in `tried`."""
    if torch.is_inference_mode_enabled():
        raise PatchbayError(
            "gradients were asked under torch.inference_mode(), which keeps none: leave it, or use torch.no_grad()"
        )
    for name, module in hf.named_modules():
        kind = (type(module), type(getattr(module, "weight", None)))
        if kind in tried or not hasattr(module, "in_features") or is_plain(module) or _written_out(module):
            continue
        if not hasattr(module, "base_layer") and not passes_gradients(module):
            raise PatchbayError(
                f"gradients do not pass through {name}, a quantised {type(module).__name__}: what its inputs are worth would "
                "come out wrong. Load the model unquantised, or quantise its weights alone (not what they are given)"
            )
        tried.add(kind)


def _written_out(module: nn.Module) -> bool:
    """Whether it is a step of transformers' own model code on plain numbers (a router that is a Linear and more) or made of other modules,
    through which autograd goes."""
    if not type(module).__module__.startswith("transformers.models."):
        return False
    if next(module.children(), None) is not None:
        return True
    return _floats(getattr(module, "weight", None)) is not None and not overridden(module) and _normed(module) is None


def is_plain(module: Any) -> bool:
    """Whether the module's class and its weight say all: a linear layer of torch or transformers as it is."""
    own = type(module).forward in (nn.Linear.forward, Conv1D.forward)
    return (
        own
        and _floats(getattr(module, "weight", None)) is not None
        and not overridden(module)
        and _normed(module) is None
    )


def _floats(weight: Any) -> Tensor | None:
    """The weight where it is a plain matrix of floating-point numbers, no tensor of another kind (quantised, or distributed)."""
    if type(weight) not in (Tensor, nn.Parameter) or weight.ndim != 2 or not weight.is_floating_point():
        return None
    found: Tensor = weight
    return found


def width_in(module: Any) -> int:
    """How many numbers the module takes."""
    found = getattr(module, "in_features", None) or getattr(module, "nx", None)
    return int(found) if found is not None else linear_map(module)[0].shape[0]


def width_out(module: Any) -> int:
    """How many numbers the module makes."""
    found = getattr(module, "out_features", None) or getattr(module, "nf", None)
    return int(found) if found is not None else int(module.weight.shape[0])


def runs_on(module: nn.Module) -> torch.device:
    """The device on which the module computes: that of its weights, or where a loader brings them when it is called."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "offload", False) and one.execution_device is not None:  # type: ignore[union-attr]
            return torch.device(one.execution_device)  # type: ignore[union-attr]
    found = next(module.parameters(), None)
    return torch.device("cpu") if found is None else found.device


def rows(module: Any) -> Tensor:
    """The rows [token, d_model] of an embedding, or of an unembedding."""
    stored = isinstance(module, nn.Embedding) and type(module.weight) in (Tensor, nn.Parameter)
    if stored or is_plain(module):
        with there(module):
            weight: Tensor = module.weight
            return weight.T if isinstance(module, Conv1D) else weight
    if not hasattr(module, "num_embeddings") and not isinstance(getattr(module, "base_layer", None), nn.Embedding):
        return linear_map(module)[0].T
    base = getattr(module, "base_layer", module)
    with torch.no_grad(), _in_evaluation(module):
        places = torch.arange(base.num_embeddings, device=base.weight.device)
        return module.forward(places) / getattr(base, "embed_scale", 1.0)


def overridden(module: nn.Module) -> bool:
    """Whether somebody else than a session of ours or a loader put another forward on this one module."""
    forward = module.__dict__.get("forward")
    ours = isinstance(forward, partial) and str(getattr(forward.func, "__module__", "")).startswith("patchbay.")
    return forward is not None and not ours and not hasattr(module, "_hf_hook")


def _normed(module: Any) -> Tensor | None:
    """The weight under torch's older weight and spectral norms, which make it anew before each call: [out, in]."""
    if hasattr(module, "weight_g") and hasattr(module, "weight_v"):
        made: Tensor = torch._weight_norm(module.weight_v, module.weight_g, 0)
        return made
    if hasattr(module, "weight_orig") and hasattr(module, "weight_u"):
        weight: Tensor = module.weight_orig
        return weight / (module.weight_u @ (weight @ module.weight_v))
    return None


@contextmanager
def there(module: nn.Module) -> Iterator[None]:
    """Weights that are kept on another device or on disk are brought for the length of the block."""
    held: Any = nullcontext()
    if hasattr(module, "_hf_hook") and any(p.device.type == "meta" for p in module.parameters()):
        from accelerate.utils import align_module_device

        held = align_module_device(module)
    with held:
        yield


def _stored(module: Any) -> Linear:
    weight: Tensor = module.weight
    return weight if in_first(module) else weight.T, module.bias


# ---- modules that have to be asked -----------------------------------------------------------------------------------


@torch.no_grad()
def _asked(module: Any) -> Read:
    weight = getattr(getattr(module, "base_layer", module), "weight", None)
    plain = _floats(weight) is not None
    dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else torch.float32
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    call = partial(_forward, module, device, dtype)
    tolerance = TOLERANCE.get(dtype, 1e-2) if plain else QUANTISED
    for width in _widths(module, weight):
        x = torch.randn(3, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        try:
            y, bias = call(x), call(x.new_zeros(1, width))[0]
        except (RuntimeError, TypeError, AttributeError, AssertionError, IndexError):
            continue
        ways: list[Callable[[], Tensor]] = [*_candidates(module), *_unpacked(weight)]
        ways.append(partial(_by_unit_vectors, call, width, bias))
        for made in ways:
            matrix = made()
            if matrix.shape == (width, len(bias)) and (off := _off(x, matrix, bias, y)) <= tolerance:
                if not plain and not _is_rounding(call, matrix, bias, dtype):
                    continue
                has_bias = bool(bias.any()) or getattr(module, "bias", None) is not None
                return Read(matrix, bias if has_bias else None, 0.0 if plain else off)
    raise PatchbayError(
        f"{type(module).__name__} is no linear map that weights could be read of: what it makes of random inputs is not a "
        "matrix times these (signals can be tapped and edited all the same)"
    )


def _forward(module: nn.Module, device: torch.device, dtype: torch.dtype, x: Tensor) -> Tensor:
    """The module's own forward, hooks left out, as it is in evaluation."""
    with _in_evaluation(module):
        return module.forward(x.to(device, dtype)).detach()


@contextmanager
def _in_evaluation(module: nn.Module) -> Iterator[None]:
    training = [one for one in module.modules() if one.training]
    for one in training:
        one.training = False
    try:
        yield
    finally:
        for one in training:
            one.training = True


def _widths(module: Any, weight: Any) -> list[int]:
    """How many numbers the module may take, the likeliest first."""
    named = [getattr(module, name, None) for name in ("in_features", "infeatures", "nx")]
    shape = list(weight.shape)[::-1] if isinstance(weight, Tensor) and weight.ndim == 2 else []
    return list(dict.fromkeys(int(n) for n in (*named, *shape) if isinstance(n, int)))


def _candidates(module: Any) -> Iterator[Callable[[], Tensor]]:
    """Matrices that the module may map with, cheapest first. What a called adapter does to its base has happened by now."""
    base = getattr(module, "base_layer", None)
    stored = module if base is None else base
    weight = _floats(getattr(stored, "weight", None))
    if weight is None:
        return
    flat = isinstance(stored, Conv1D)
    yield lambda: weight if flat else weight.T
    if base is None:
        yield lambda: weight  # a class of its own that stores [in, out]
    elif hasattr(module, "get_delta_weight"):

        def with_adapters() -> Tensor:
            moved = weight
            for name in module.active_adapters:
                moved = moved + module.get_delta_weight(name).to(weight) if name in module.scaling else moved
            return moved if flat else moved.T

        if hasattr(module, "scaling"):
            yield with_adapters


def _unpacked(weight: Any) -> Iterator[Callable[[], Tensor]]:
    """What a tensor that packs its numbers says that they are. Where inputs are rounded too, single ones need not come out whole."""
    if isinstance(weight, Tensor) and type(weight) not in (Tensor, nn.Parameter):
        try:
            numbers = weight.dequantize()
        except (RuntimeError, NotImplementedError, AttributeError, TypeError):
            return
        if type(numbers) is Tensor and numbers.ndim == 2:
            yield lambda: numbers.T
            yield lambda: numbers


def _by_unit_vectors(call: Callable[[Tensor], Tensor], width: int, bias: Tensor) -> Tensor:
    """The matrix whose rows are what the module makes of unit vectors."""
    out = [call(torch.eye(width, dtype=torch.float32)[some]) - bias for some in torch.arange(width).split(ROWS)]
    return torch.cat(out)


@torch.no_grad()
def some_rows(module: Any, places: Tensor) -> Tensor:
    """Rows [place, out] of the matrix [in, out] of a module that has to be asked: what it makes of those unit vectors."""
    weight = getattr(module, "weight", None)
    dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else torch.float32
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    units = torch.zeros(len(places), module.in_features, dtype=torch.float64)
    units[torch.arange(len(places)), places] = 1.0
    with there(module):
        return _forward(module, device, dtype, units) - _forward(module, device, dtype, units[:1] * 0)


def _is_rounding(call: Callable[[Tensor], Tensor], matrix: Tensor, bias: Tensor, dtype: torch.dtype) -> bool:
    """Whether what a quantised map makes of random inputs differs from the matrix's product by no more than rounding does.

    Rounding what it is given leaves errors that have nothing to do with the inputs; a weight that is another leaves the input
    times the difference, a map that is not linear something along its output. So the errors of N inputs are correlated with each
    input and with each output, and the largest must be one that chance gives once in 10,000 times (some 6 deviations). Power: with
    int8 inputs a single weight off by one int8 step of a row of normal weights stands 3.7 sqrt(N / width) deviations out; N is 16 for
    each input, at most 2048, so that it is seen up to a width of about 500; wider, an output whose scale is off by a per mille is."""
    width = len(matrix)
    n = min(16 * width, 2048)
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    made = x.to(matrix.device) @ matrix.double() + bias.double()
    error, linear = call(x).double() - made, made - bias.double()  # [input, out]
    spread = error.std(0).clamp(min=1e-300)
    moved = x.to(matrix.device).T @ error / n  # [in, out]: by how much each weight would be another
    slope = (linear * error).sum(0) / linear.square().sum(0).clamp(min=1e-300)  # [out]
    likely = (2 * math.log(1e4 * (moved.numel() + slope.numel()))) ** 0.5
    least = 4 * torch.finfo(dtype).eps  # the matrix itself was read in this dtype
    single = (moved.abs() * n**0.5 > likely * spread) & (moved.abs() > least * matrix.abs().max())
    along = (slope.abs() * linear.norm(dim=0) > likely * spread) & (slope.abs() > least)
    return not bool(single.any() or along.any())


def _off(x: Tensor, matrix: Tensor, bias: Tensor, y: Tensor) -> float:
    made = x.to(matrix.device) @ matrix.double() + bias.double()
    off = (made - y.double()).abs().max() / y.double().abs().max().clamp(min=1e-30)
    return float(off)

"""The fingerprint of a model's weights: BLAKE3 over names, shapes, dtypes and bytes, 16 hex digits.

Weights that are no plain tensors count as what they are made of: quantised ones by their stored integers, scales and settings,
those that are kept on another device or on disk by their bytes there. Which adapters act, and with which factor, counts too: a model
whose adapter is switched off computes something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor, nn

from patchbay.model.linear import there


def version_of(hf: nn.Module) -> tuple[Any, ...]:
    """What changes when a weight changes, at no cost; a change made through `.data`, which PyTorch does not count, goes unnoticed."""
    return tuple(
        (name, value.data_ptr() if type(value) in (Tensor, nn.Parameter) else id(value), value._version)
        if isinstance(value, Tensor)
        else name
        for name, value in hf.state_dict().items()
    ) + tuple(switched(hf))


def fingerprint_of(hf: nn.Module) -> str:
    state = hf.state_dict()
    digest = blake3()
    for name in sorted(state):
        for part, tensor in _plain(name, brought(hf, name, state[name])):
            digest.update(f"{part}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(memoryview(tensor.flatten().view(torch.uint8).numpy()))
    for text in switched(hf):
        digest.update(text.encode())
    return digest.hexdigest()[:16]


def switched(hf: nn.Module) -> list[str]:
    """What decides how adapters act, beside their numbers; nothing for a model without them."""
    held = [(name, module) for name, module in hf.named_modules() if hasattr(module, "base_layer")]
    settings = ("disable_adapters", "active_adapters", "merged_adapters", "scaling")
    return [f"{name} {[getattr(module, key, None) for key in settings]}" for name, module in held]


def brought(hf: nn.Module, name: str, value: Any) -> Any:
    """The value itself, brought here where only its shape is."""
    if not (isinstance(value, Tensor) and value.device.type == "meta"):
        return value
    owner, _, own = name.rpartition(".")
    module = hf.get_submodule(owner)
    with there(module):
        held = getattr(module, own)
        return held.detach().cpu().clone() if held.device.type != "meta" else held.detach()


def _plain(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """A value of a state as plain tensors in memory, each with a text that says what it is."""
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__") and type(value) is not nn.Parameter:
        inner, settings = value.__tensor_flatten__()
        for part in sorted(inner):
            yield from _plain(f"{name}.{part}", getattr(value, part))
        yield f"{name} {type(value).__name__} {settings}", torch.zeros(0, dtype=torch.uint8)
    elif isinstance(value, Tensor) and value.is_quantized:
        yield f"{name} {value.qscheme()}", value.int_repr().cpu().contiguous()
        scale = value.q_per_channel_scales() if "channel" in str(value.qscheme()) else torch.tensor(value.q_scale())
        yield f"{name} scale", scale.double().cpu().contiguous()
    elif isinstance(value, Tensor):
        yield name, value.detach().cpu().contiguous()
    elif isinstance(value, list | tuple):
        for i, one in enumerate(value):
            yield from _plain(f"{name}.{i}", one)
    else:
        yield f"{name} {value}", torch.zeros(0, dtype=torch.uint8)

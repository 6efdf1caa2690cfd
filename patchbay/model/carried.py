"""What a model carries that its source does not name: adapters, and weights that are quantised. Data for records and for print."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NUMBERS_IN = re.compile(r"\d+")


def carried(hf: nn.Module, source: str = "") -> dict[str, Any]:
    """`adapters` that act, `quantisation`; each is left out where there is none. `source`: where the model was loaded from."""
    found: dict[str, Any] = {"adapters": adapters(hf, source), "quantisation": quantisation(hf)}
    return {key: value for key, value in found.items() if value}


# ---- adapters ----------------------------------------------------------------------------------------


def adapters(hf: nn.Module, source: str = "") -> list[dict[str, Any]]:
    """Adapters that change what modules compute now, merged ones among them: name, whether merged, SHA-256 of their numbers
    and factors, 16 hex digits; `folder` where `source` is the folder of the adapter (peft keeps no folder of those it loads)."""
    digests: dict[str, Any] = {}
    merged: set[str] = set()
    for place, module in hf.named_modules():
        if not isinstance(getattr(module, "base_layer", None), nn.Module):
            continue
        already = list(getattr(module, "merged_adapters", ()))
        merged |= set(already)
        active = [] if getattr(module, "disable_adapters", False) else list(getattr(module, "active_adapters", ()))
        for name in dict.fromkeys([*already, *active]):
            numbers = _numbers_of(module, name)
            if numbers:
                digest = digests.setdefault(name, hashlib.sha256())
                digest.update(f"{place} {getattr(module, 'scaling', {}).get(name)}".encode())
                for key, tensor in numbers:
                    digest.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
                    digest.update(memoryview(tensor.flatten().view(torch.uint8).numpy()))
    folder = {"folder": source} if source and (Path(source) / "adapter_config.json").is_file() else {}
    return [
        {"name": name, **folder, "merged": name in merged, "sha256": digest.hexdigest()[:16]}
        for name, digest in digests.items()
    ]


def _numbers_of(module: nn.Module, adapter: str) -> list[tuple[str, Tensor]]:
    """The tensors of one adapter on a module: those with its name among their address, the base's left out."""
    held = [(key, value) for key, value in module.state_dict().items() if not key.startswith("base_layer.")]
    return [(key, value.detach().cpu().contiguous()) for key, value in held if adapter in key.split(".")]


# ---- quantisation ------------------------------------------------------------------------------------


def quantisation(hf: nn.Module) -> dict[str, Any]:
    """`method` and `bits` of weights that are stored in fewer digits, by the model's settings or by what its layers hold, and
    `format` "float" where their steps are uneven; a GGUF file has several and gives no number. Empty for plain weights."""
    settings = getattr(getattr(hf, "config", None), "quantization_config", None)
    if settings is not None:
        given = dict(settings) if isinstance(settings, Mapping) else _plain(settings)
        method = given.get("quant_method") or type(settings).__name__
        bits = _bits(given)
        floats = {"format": "float"} if _of_floats(given) else {}
        return {"method": str(getattr(method, "value", method)), **({"bits": bits} if bits else {}), **floats}
    for module in hf.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "in_features") and isinstance(weight, Tensor) and not _is_plain(weight):
            kind = type(weight) if type(weight) not in (Tensor, nn.Parameter) else type(module)
            return (
                {"method": kind.__name__, "bits": 8 * weight.element_size()}
                if kind is type(module)
                else {"method": kind.__name__}
            )
    return {}


def _is_plain(weight: Tensor) -> bool:
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and weight.element_size() > 1


def _of_floats(given: Mapping[str, Any]) -> bool:
    """Whether settings store floats of few bits, whose steps grow with the number (fp4, nf4, fp8); what they compute in is no matter."""
    if given.get("load_in_8bit") or given.get("load_in_4bit"):
        return bool(given.get("load_in_4bit"))
    stored = {key: value for key, value in given.items() if "dtype" not in key and "compute" not in key}
    return re.search(r"fp\d|float\d", json.dumps(stored, default=str).lower()) is not None


def _plain(settings: Any) -> dict[str, Any]:
    try:
        return dict(settings.to_dict())
    except (AttributeError, TypeError, ValueError):
        return dict(vars(settings))


def _bits(given: Mapping[str, Any]) -> int | None:
    """Bits of one weight as the settings say: `bits`, `load_in_4bit`, or the first number of the weights' type ("int4")."""
    if isinstance(given.get("bits"), int):
        return int(given["bits"])
    for name, bits in (("load_in_4bit", 4), ("load_in_8bit", 8), ("_load_in_4bit", 4), ("_load_in_8bit", 8)):
        if given.get(name):
            return bits
    for name in ("weights", "weights_dtype", "weight_dtype", "quant_type", "quant_method"):
        value = given.get(name)
        text = value if isinstance(value, str) else json.dumps(value, default=str) if value else ""
        if found := NUMBERS_IN.search(text):
            return int(found[0])
    return None


def said(record: Mapping[str, Any]) -> list[str]:
    """Pieces for a line of print of what `carried` found, such as "bitsandbytes, 4 bits" and "adapter style (0f3a...)"."""
    pieces = []
    if made := record.get("quantisation"):
        pieces.append(f"{made['method']}" + (f", {made['bits']} bits" if made.get("bits") else ""))
    for one in record.get("adapters", ()):
        folder = f" of {one['folder']}" if one.get("folder") else ""
        pieces.append(f"adapter {one['name']}{folder} ({one['sha256'][:8]}{', merged' if one['merged'] else ''})")
    return pieces

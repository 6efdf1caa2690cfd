"""What makes a run of a model depend on more than its prompt: chance in train mode, and the other prompts of its batch.

Dropout, dropped layers and noise on routers act in train mode alone. Rotary positions scaled by "longrope" have one set of
frequencies for batches up to the trained length and another beyond it; those scaled by "dynamic" have other frequencies for every
length beyond it. There the longest prompt of a batch decides for all, so prompts of different regimes must not share one; where
tokens see all others, each length is a regime of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from patchbay.errors import PatchbayError


def refuse_randomness(hf: nn.Module) -> None:
    """Raise PatchbayError where a model in train mode changes at random."""
    if found := randomness(hf):
        raise PatchbayError(
            f"the model is in train mode and changes at random ({found}): two equal runs differ. "
            "Call model.hf.eval() first, or set its dropout to 0"
        )


def refuse_unrunnable(hf: nn.Module, modules: Sequence[Any] = ()) -> None:
    """Raise PatchbayError where a model's config has its outputs come back as tuples, also between its own modules, or
    where it holds only a share of its weights; and, of one whose layers' `modules` are known, where others stand in their place, or
    where it changes at random, as dropout in train mode does: two equal runs would differ."""
    if getattr(hf, "_is_fsdp_managed_module", False):
        raise PatchbayError(
            "the model's weights are sharded by FullyShardedDataParallel, and whole only while the wrapper runs it: call the wrapper "
            "inside model.edited(...) of a Model that was loaded before it was wrapped, or load the model unwrapped"
        )
    config: Any = getattr(hf, "config", None)
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    if any(getattr(one, "return_dict", True) is False for one in (config, inner)):
        raise PatchbayError(
            "the model's config has return_dict=False, under which transformers' own models fail or return tuples without names; "
            "set model.config.return_dict = True (a single call may still be given return_dict=False)"
        )
    for at in modules:
        at.refuse_replaced()
    if modules and (hf.training or any(at.layer.training for at in modules)):
        refuse_randomness(hf)


def randomness(hf: nn.Module) -> str:
    """Where a model in train mode changes at random, in words; empty when nowhere."""
    for name, module in hf.named_modules():
        if not module.training:
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return f"{name}: {type(module).__name__} of {module.p}"
        for key, value in vars(module).items():
            chance = isinstance(value, float) and value > 0
            if chance and ("drop" in key or "jitter" in key):
                return f"{name or type(module).__name__}.{key} of {value}"
    return ""


def regimes(model: Any, lengths: Iterable[int]) -> dict[int, int]:
    """The regime of each of these lengths; where that of the longest is 0, so is every shorter one's."""
    each = set(lengths)
    if model.causal and each and not model.regime(max(each)):
        return dict.fromkeys(each, 0)
    return {length: model.regime(length) for length in each}


_SCALED: WeakKeyDictionary[nn.Module, tuple[tuple[int, bool], ...]] = WeakKeyDictionary()  # by model, asked once


def rope_regime(hf: nn.Module, length: int) -> int:
    """0 for lengths whose rotary positions are alike; else a number that prompts of one scaling share."""
    if hf not in _SCALED:
        _SCALED[hf] = _scaled(hf)
    return max((length if dynamic else 1 for trained, dynamic in _SCALED[hf] if length > trained), default=0)


def _scaled(hf: nn.Module) -> tuple[tuple[int, bool], ...]:
    """Of each module whose rotary positions hang on the length: the trained length, and whether each length beyond it has its own."""
    found = []
    for module in hf.modules():
        kind: Any = getattr(module, "rope_type", None)
        kinds = [one for one in (kind.values() if isinstance(kind, dict) else (kind,)) if isinstance(one, str)]
        dynamic = any("dynamic" in one for one in kinds)
        if dynamic or "longrope" in kinds:
            found.append((_trained_length(module), dynamic))
    return tuple(found)


def _trained_length(module: Any) -> int:
    config = getattr(module, "config", None)
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    named = [scaling, *(part for part in scaling.values() if isinstance(part, dict))]
    inside = [
        part["original_max_position_embeddings"] for part in named if part.get("original_max_position_embeddings")
    ]
    other = [getattr(config, "original_max_position_embeddings", None), getattr(module, "original_max_seq_len", None)]
    found = [int(n) for n in (*inside, *other, getattr(config, "max_position_embeddings", None)) if n]
    return min(found) if found else 0

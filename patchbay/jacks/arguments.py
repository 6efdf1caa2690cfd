"""Arguments of others' code, found by what they are: a name of a dependency's argument may change from one release to the next.

transformers has called the cache of keys, values and states `past_key_values`, `layer_past`, `cache_params` and `cache`. A value is
recognised by what it can do; an argument of a signature by its annotation, then by the names known so far.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any

from torch import nn
from transformers import Cache

from patchbay.errors import PatchbayError

CACHE_NAMES = ("cache", "past_key_values", "cache_params", "past_key_value", "layer_past")


def named(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, those that were given by place by what `function` calls them."""
    return dict(zip(inspect.signature(function).parameters, args, strict=False)) | kwargs if args else kwargs


def is_cache(value: Any) -> bool:
    """Whether this is a cache: transformers' own, or what says how long it is and takes updates."""
    return isinstance(value, Cache) or (hasattr(value, "get_seq_length") and hasattr(value, "update"))


def cache_among(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Any:
    """The cache that a call was given, under whatever name; None without one.

    An argument of a known name is taken for one whatever it is: a cache of custom code need not be like any other."""
    found = next((value for value in (*args, *kwargs.values()) if is_cache(value)), None)
    named = (kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None)
    return found if found is not None else next(named, None)


def cache_of(output: Any) -> Any:
    """The cache that a model returned, by name or in a tuple (`return_dict=False`); None without one, or for tensors in tuples."""
    by_name = (found for name in CACHE_NAMES if (found := getattr(output, name, None)) is not None)
    found = next(by_name, None)
    if found is None and isinstance(output, tuple):
        found = next((value for value in output if is_cache(value)), None)
    return None if isinstance(found, tuple) else found


def cache_name(module: nn.Module) -> str | None:
    """By what name the forward of a module takes a cache; None where it takes none."""
    parameters = inspect.signature(module.forward).parameters
    typed = [name for name, at in parameters.items() if "Cache" in str(at.annotation)]
    known = [name for name in CACHE_NAMES if name in parameters]
    return next(iter([*[name for name in typed if name in known], *known, *typed]), None)


def with_cache(module: nn.Module, cache: Any) -> dict[str, Any]:
    """The arguments that give a module this cache, by the name that it takes it under."""
    name = cache_name(module)
    return {name or CACHE_NAMES[1]: cache}


def refuse_checkpoints() -> None:
    """Raise PatchbayError in code that runs under torch.utils.checkpoint, which runs it again in the backward pass."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            raise PatchbayError(
                "gradient checkpointing is on: layers run again in the backward pass, after the edits are gone; "
                "model.hf.gradient_checkpointing_disable(), or run in model.hf.eval()"
            )
        frame = frame.f_back

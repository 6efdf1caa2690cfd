"""Defaults of the process that others may have changed: the device and the dtype of tensors that are made without saying which.

Where our own code runs, tensors are made on the CPU whatever `torch.set_default_device` says; they follow the model's where they
meet it. The default dtype cannot be changed for one thread alone, so where numbers are made that would take it, another than
float32 is refused. What a model computes does not pass here: running, editing and generating are right under any default dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from patchbay.errors import PatchbayError

P = ParamSpec("P")
T = TypeVar("T")


def own_device() -> AbstractContextManager[Any]:
    """A block in which tensors are made on the CPU unless they are told another device."""
    return nullcontext() if torch.empty(0).device.type == "cpu" else torch.device("cpu")  # cheaper than to ask for it


def on_own_device(function: Callable[P, T]) -> Callable[P, T]:
    """The function, run in such a block."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with own_device():
            return function(*args, **kwargs)

    return call


def refuse_other_dtype(name: str) -> None:
    """Raise PatchbayError where `name` would make its numbers in a dtype that somebody has set as the default."""
    found = torch.get_default_dtype()
    if found != torch.float32:
        raise PatchbayError(
            f"torch.set_default_dtype({found}) is on, and {name} would make numbers of its own in it: call "
            f"torch.set_default_dtype(torch.float32) first; a model keeps the dtype that it was loaded in (pb.load(..., dtype={found}))"
        )

"""What a metric is: everything that its numbers depend on, as plain data to compare by.

A function is its bytecode, constants, defaults, what it closes over and the globals that it names, all the way down; a function
of an installed package is its name and that package's version. Two lambdas differ where they compute something else, and agree
where they are written alike. What cannot be told apart from another of its kind is refused by name.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import sys
import sysconfig
import types
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchbay.signal.port import PatchbayError

PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), torch.dtype, torch.device, slice, range)
INSTALLED = tuple({sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def identity(value: Any, what: str, seen: dict[int, int] | None = None) -> Any:
    """`value` as JSON-able data that is equal where it is the same; `what` names it where it cannot be told."""
    seen = {} if seen is None else seen
    if isinstance(value, PLAIN):
        return [type(value).__name__, repr(value)]
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return _array(value)
    if id(value) in seen:
        return ["again", seen[id(value)]]
    seen[id(value)] = len(seen)
    inner = functools.partial(identity, what=what, seen=seen)
    if isinstance(value, list | tuple):
        return [type(value).__name__, *map(inner, value)]
    if isinstance(value, set | frozenset):
        return [type(value).__name__, *(inner(item) for item in sorted(value, key=repr))]
    if isinstance(value, dict):
        return ["dict", *([inner(key), inner(item)] for key, item in value.items())]
    if isinstance(value, types.CodeType):
        return ["code", value.co_code.hex(), [inner(x) for x in value.co_consts], value.co_names, value.co_argcount]
    if isinstance(value, types.MethodType):
        return ["method", inner(value.__func__), inner(value.__self__)]
    if isinstance(value, types.ModuleType):
        return ["module", value.__name__, _version(value.__name__)]
    if isinstance(value, functools.partial):
        return ["partial", inner(value.func), inner(value.args), inner(value.keywords)]
    named = getattr(value, "__qualname__", None)
    if isinstance(value, types.FunctionType) and not _installed(value.__module__):
        return ["function", *map(inner, _read_by(value))]
    if named is not None and (_installed(value.__module__) or not isinstance(value, type)):
        return ["named", str(value.__module__), named, _version(str(value.__module__))]
    if isinstance(value, type):
        own = {name: item for name, item in vars(value).items() if callable(item) or isinstance(item, PLAIN)}
        return ["type", value.__module__, named, inner({n: x for n, x in own.items() if not n.startswith("__weakref")})]
    return ["object", inner(type(value)), *map(inner, _held_by(value, what))]


def _array(value: Any) -> list[Any]:
    tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return [type(value).__name__, str(tensor.dtype), list(tensor.shape), hashlib.sha256(data).hexdigest()]


def _read_by(function: types.FunctionType) -> list[Any]:
    """Code, defaults, closure and the globals that are named anywhere in the code."""
    names: list[str] = []
    codes = [function.__code__]
    for code in codes:
        names += code.co_names
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
    told = {name: function.__globals__[name] for name in sorted(set(names)) if name in function.__globals__}
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return [function.__code__, function.__defaults__, function.__kwdefaults__, vars(function), cells, told]


def _held_by(value: Any, what: str) -> list[Any]:
    """What an object holds: fields, tensors of a module, or its attributes; of a Model its fingerprint."""
    if hasattr(value, "fingerprint"):
        return [value.fingerprint]
    if is_dataclass(value):
        return [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, torch.nn.Module):
        return [dict(value.state_dict())]
    if hasattr(value, "__dict__"):
        return [vars(value)]
    raise PatchbayError(
        f"{what} reads an object of {type(value).__module__}.{type(value).__qualname__}, which cannot be told from another of "
        "its kind, so that a folder of finished batches could be mistaken: leave folder= out, or close over plain values"
    )


def _installed(module: str | None) -> bool:
    """Whether a module belongs to Python, to an installed package or to Patchbay itself: its version says what it is."""
    if module is None or module.partition(".")[0] == "patchbay":
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    return file.startswith(INSTALLED) if file else module in sys.builtin_module_names


def _version(module: str) -> str:
    top = module.partition(".")[0]
    try:
        return importlib.metadata.version("patchbay-lm" if top == "patchbay" else top)
    except importlib.metadata.PackageNotFoundError:
        return ""

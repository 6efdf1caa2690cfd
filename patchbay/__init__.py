"""Patchbay: find the parts of a language model that do a thing, prove it causally, and turn them like knobs.

The public names, all of them. Nothing is imported until it is used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchbay import find, measure, prove, tasks, tiny, train, turn
    from patchbay.edit import Edit, add, block, mean, project, replace, scale, zero
    from patchbay.families import Family
    from patchbay.knob import Knob, load_knob
    from patchbay.model import Model, load
    from patchbay.port import Part, PatchbayError, Port
    from patchbay.positions import Token
    from patchbay.replay import diff, replay
    from patchbay.result import Result, load_result
    from patchbay.run import Trace, run
    from patchbay.sweep import sweep
    from patchbay.task import Task

__version__ = "0.1.0"

_HOME = {
    "Edit": "edit",
    "Family": "families",
    "Knob": "knob",
    "Model": "model",
    "Part": "port",
    "PatchbayError": "port",
    "Port": "port",
    "Result": "result",
    "Task": "task",
    "Token": "positions",
    "Trace": "run",
    "add": "edit",
    "block": "edit",
    "diff": "replay",
    "load": "model",
    "load_knob": "knob",
    "load_result": "result",
    "mean": "edit",
    "project": "edit",
    "replace": "edit",
    "replay": "replay",
    "run": "run",
    "scale": "edit",
    "sweep": "sweep",
    "zero": "edit",
}
_FOLDERS = ("find", "measure", "prove", "tasks", "tiny", "train", "turn")

__all__ = [
    "Edit",
    "Family",
    "Knob",
    "Model",
    "Part",
    "PatchbayError",
    "Port",
    "Result",
    "Task",
    "Token",
    "Trace",
    "add",
    "block",
    "diff",
    "find",
    "load",
    "load_knob",
    "load_result",
    "mean",
    "measure",
    "project",
    "prove",
    "replace",
    "replay",
    "run",
    "scale",
    "sweep",
    "tasks",
    "tiny",
    "train",
    "turn",
    "zero",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"patchbay.{_HOME[name]}"), name)
    if name in _FOLDERS:
        return import_module(f"patchbay.{name}")
    raise AttributeError(f"patchbay has no {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """`patchbay.run` is the function, also after some file has imported the module of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

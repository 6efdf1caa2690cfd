"""Patchbay: find the parts of a language model that do a thing, prove it causally, and turn them like knobs.

The public names, all of them. Nothing is imported until it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchbay import blocks, corpus, decode, find, measure, prove, tasks, tiny, train, turn
    from patchbay.edits.edit import Edit, add, block, mean, project, replace, scale, zero
    from patchbay.edits.probe import Probe
    from patchbay.errors import PatchbayError
    from patchbay.features.dictionary import Dictionary
    from patchbay.features.load import load_dictionary
    from patchbay.knobs.directions import Directions
    from patchbay.knobs.knob import Knob, load_knob
    from patchbay.knobs.probing import probe
    from patchbay.model.families import Family
    from patchbay.model.kept import load_trace
    from patchbay.model.load import load
    from patchbay.model.model import Model
    from patchbay.model.run import Trace, run
    from patchbay.results.method import method
    from patchbay.results.replay import diff, replay
    from patchbay.results.result import Result, load_result
    from patchbay.signal.port import Part, Port
    from patchbay.signal.positions import Role, Token
    from patchbay.stories.compare import compare
    from patchbay.stories.panel import panel
    from patchbay.stories.why import why
    from patchbay.sweeps.sweep import sweep
    from patchbay.tasks.task import Task

__version__ = "0.1.0"

_HOME = {
    "Dictionary": "features.dictionary",
    "Directions": "knobs.directions",
    "Edit": "edits.edit",
    "Family": "model.families",
    "Knob": "knobs.knob",
    "Model": "model.model",
    "Part": "signal.port",
    "PatchbayError": "errors",
    "Port": "signal.port",
    "Probe": "edits.probe",
    "Result": "results.result",
    "Role": "signal.positions",
    "Task": "tasks.task",
    "Token": "signal.positions",
    "Trace": "model.run",
    "add": "edits.edit",
    "block": "edits.edit",
    "compare": "stories.compare",
    "diff": "results.replay",
    "load": "model.load",
    "load_dictionary": "features.load",
    "load_knob": "knobs.knob",
    "load_result": "results.result",
    "load_trace": "model.kept",
    "mean": "edits.edit",
    "method": "results.method",
    "panel": "stories.panel",
    "probe": "knobs.probing",
    "project": "edits.edit",
    "replace": "edits.edit",
    "replay": "results.replay",
    "run": "model.run",
    "scale": "edits.edit",
    "sweep": "sweeps.sweep",
    "why": "stories.why",
    "zero": "edits.edit",
}
_FOLDERS = ("blocks", "corpus", "decode", "find", "measure", "prove", "tasks", "tiny", "train", "turn")

__all__ = [
    "Dictionary",
    "Directions",
    "Edit",
    "Family",
    "Knob",
    "Model",
    "Part",
    "PatchbayError",
    "Port",
    "Probe",
    "Result",
    "Role",
    "Task",
    "Token",
    "Trace",
    "add",
    "block",
    "blocks",
    "compare",
    "corpus",
    "decode",
    "diff",
    "find",
    "load",
    "load_dictionary",
    "load_knob",
    "load_result",
    "load_trace",
    "mean",
    "measure",
    "method",
    "panel",
    "probe",
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
    "why",
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

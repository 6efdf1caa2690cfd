"""What is given to a method, checked by its annotation: refused in one sentence that shows the line to write."""

from __future__ import annotations

import inspect
from typing import Any

from patchbay.errors import PatchbayError, refuse_other_kinds, said, written
from patchbay.tasks.task import Task

LEFT_OUT = (
    "task",
    "positive",
    "negative",
    "neutral",
)  # prompts and texts that a method acts on: another stands for one, or none
MAKE = 'pb.Task.from_prompts(model, ["The capital of France is"], [" Paris"], [" Rome"])'


def check(value: Any, parameter: inspect.Parameter, name: str) -> None:
    """Raise PatchbayError where a value cannot be what the annotation says: a Task, a Knob, a number, a text."""
    kinds = [kind.strip() for kind in kinds_of(parameter).split("|")]
    found = said(value)
    if kinds[0] == "Task" and not (value is None and parameter.default is None):
        others = [kind for kind in kinds if kind not in ("Task", "None")]
        several = "list[Task]" in kinds and isinstance(value, list) and value and all(_is_task(v) for v in value)
        wide = isinstance(value, str) if others == ["str"] else others and value is not None
        if not (_is_task(value) or several or (wide and "list[Task]" not in kinds)):
            other = "a text or " if others == ["str"] else "texts, lists of token ids or "
            other = "" if not others or "list[Task]" in kinds else other
            raise PatchbayError(f"{name}: {parameter.name} takes {other}a Task, got {found}; make one: {MAKE}")
    if kinds == ["Knob"] and not hasattr(value, "edits_at"):
        raise PatchbayError(
            f'{name}: {parameter.name} takes a Knob, got {found}; pb.load_knob("file.knob") reads one, pb.turn makes one'
        )
    refuse_other_kinds(value, kinds_of(parameter), name, parameter.name)


def has_default(parameter: inspect.Parameter) -> bool:
    return parameter.default is not parameter.empty


def may_be_left_out(parameter: inspect.Parameter) -> bool:
    """Whether it is an input of prompts or texts that need not be given: no option, so it comes before the `*`."""
    return parameter.name in LEFT_OUT and parameter.default is None


def kinds_of(parameter: inspect.Parameter) -> str:
    """The annotation of a parameter as text without modules."""
    return written(parameter.annotation)


def _is_task(value: Any) -> bool:
    """A Task, or what is recorded as one is."""
    return isinstance(value, Task) or (type(value).__name__ == "Task" and hasattr(value, "to_json"))

"""A method's signature as JSON schema, and what JSON gives to its parameters.

A task is {"name": "facts_in_context", "n": 40} (a built-in one with its options) or {"prompts": [...], "right": [...], "wrong": [...],
"corrupted": [...]}; a Result or a knob is the name of one in the folder; everything else is as it stands in JSON.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from patchbay.decode._spoken import spoken
from patchbay.errors import PatchbayError, suggest
from patchbay.results.described import words
from patchbay.results.given import has_default, kinds_of
from patchbay.serve.guard import inside
from patchbay.serve.outside import refuse_outside

PLAIN = {int: "integer", float: "number", bool: "boolean", str: "string", type(None): "null"}
TASK = {
    "type": "object",
    "description": 'a built-in task, {"name": ..., "n": ...}, or {"prompts": [...], "right": [...], "wrong": [...]}',
}
ADDRESSES = ("endpoint", "unsafe_endpoint")  # names of parameters that say who is asked over a wire
FILES = ("folder", "path", "file")  # names of parameters that say where something is written
MOST_PROMPTS = 256


def parameters(method: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a method but its first model, which is the one that is served."""
    found = dict(inspect.signature(method).parameters)
    found.pop("model", None)
    return found


def schema(method: Callable[..., Any]) -> dict[str, Any]:
    """JSON schema of a method's inputs."""
    known = parameters(method)
    hints, said = _hints(method), words(inspect.getdoc(method) or "", list(known))
    properties: dict[str, Any] = {}
    for name, parameter in known.items():
        row = _kind(hints.get(name), kinds_of(parameter))
        if has_default(parameter) and _plain(parameter.default):
            row["default"] = parameter.default
        if name in said:
            row["description"] = said[name]
        properties[name] = row
    needed = [name for name, parameter in known.items() if not has_default(parameter)]
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}


def _hints(method: Callable[..., Any]) -> dict[str, Any]:
    """Annotations as types, where the method's file has their names."""
    plain = inspect.unwrap(method)
    found = {}
    for name, text in plain.__annotations__.items():
        try:
            found[name] = eval(text, plain.__globals__) if isinstance(text, str) else text
        except Exception:  # a name that is there for type checkers alone
            continue
    return found


def _kind(hint: Any, text: str) -> dict[str, Any]:
    names = {part.strip() for part in re.sub(r"\[.*?\]", "", text).split("|")}
    if "Task" in names:
        return dict(TASK) if names <= {"Task", "None"} else {"description": TASK["description"] + "; or texts"}
    if names & {"Result", "Knob"}:
        return {"type": "string", "description": "the name of a saved one in the folder"}
    return _of(hint)


def _of(hint: Any) -> dict[str, Any]:
    """The schema of a type; an empty one, which takes anything, where JSON has no such type."""
    if hint in PLAIN:
        return {"type": PLAIN[hint]}
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return {"enum": list(inner)}
    if origin in (typing.Union, types.UnionType):
        several = [_of(one) for one in inner]
        return {} if {} in several else {"anyOf": several}
    if origin is not None and isinstance(origin, type) and issubclass(origin, Sequence):
        return {"type": "array", "items": _of(inner[0]) if inner else {}}
    return {}


def _plain(value: Any) -> bool:
    return isinstance(value, int | float | str | bool | type(None)) or (
        isinstance(value, list | tuple) and all(map(_plain, value))
    )


# --- values -----------------------------------------------------------------------------------------------


class Giver:
    """Makes a method's arguments of what JSON holds. `model`: the one that is served; `folder`: where Results and knobs lie."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.model, self.folder = model, folder

    def arguments(self, method: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Raises PatchbayError for what the method has not, and for what lies outside the folder."""
        known = parameters(method)
        for name in given:
            if name not in known:
                raise PatchbayError(
                    f"there is no input {name!r}; inputs are {', '.join(known)}{suggest(name, list(known))}"
                )
            if name in ADDRESSES and given[name]:
                raise PatchbayError(
                    f"{name}: nothing outside the folder is asked for an agent; call the method in Python"
                )
        for name, parameter in known.items():
            if "Model" in kinds_of(parameter).split(" | ") and not has_default(parameter):
                raise PatchbayError(
                    f"{name}: a second model is needed, and one is served here; call the method in Python"
                )
        return {name: self.value(value, known[name]) for name, value in given.items()}

    def value(self, value: Any, parameter: inspect.Parameter) -> Any:
        kinds = [kind.strip() for kind in kinds_of(parameter).split("|")]
        if "Task" in kinds and isinstance(value, dict):
            return self.task(value)
        if isinstance(value, str) and kinds[0] == "Result":
            return self.result(value)
        if isinstance(value, str) and kinds[0] == "Knob":
            return self.knob(value)
        if isinstance(value, str) and parameter.name in FILES:
            return str(inside(self.folder, value))
        return self.checked(value)

    def checked(self, value: Any) -> Any:
        """Values in which no text names a file outside the folder; one that names a file inside is its path."""
        if isinstance(value, list | tuple | set):
            return type(value)(self.checked(one) for one in value)
        if isinstance(value, dict):
            return {str(key): self.checked(one) for key, one in value.items()}
        return self._text(value) if isinstance(value, str) else value

    def _text(self, text: str) -> str:
        """A text as it may be a file, `FILE:field=name`, or `method(option='FILE')`."""
        _refuse_written(text)
        refuse_outside(text, self.folder, Path.cwd())
        file, _, fields = text.rpartition(":")
        if file and re.fullmatch(r"\s*\w+\s*=.*", fields, re.DOTALL) and (own := self._own(file)) is not None:
            return f"{own}:{fields}"
        if (own := self._own(text)) is not None:
            return own
        try:
            name, values, options = spoken(text, "")
        except PatchbayError:
            return text
        placed, called = self.checked(values), self.checked(options)
        if (placed, called) == (values, options):
            return text
        return f"{name}({', '.join([*map(repr, placed), *(f'{key}={one!r}' for key, one in called.items())])})"

    def _own(self, text: str) -> str | None:
        """The path of a file in the folder, None where no file has that name."""
        try:
            found = inside(self.folder, text)
            return str(found) if found != self.folder.resolve() and found.exists() else None
        except (PatchbayError, OSError, ValueError, RuntimeError):  # leads out, or is no path at all
            return None

    def task(self, given: Mapping[str, Any]) -> Any:
        import patchbay as pb

        if "prompts" in given:
            options = dict(given)
            prompts = options.pop("prompts")
            if not isinstance(prompts, list) or not 1 <= len(prompts) <= MOST_PROMPTS:
                raise PatchbayError(f"prompts is a list of 1 to {MOST_PROMPTS}")
            possible = ("right", "wrong", "corrupted", "normalise", "aligned", "name")
            other = next((name for name in options if name not in possible), None)
            if other is not None:
                raise PatchbayError(f"a task of prompts has no {other!r}; it has {', '.join(possible)}")
            return pb.Task.from_prompts(self.model, prompts, **options)
        options = dict(given)
        name = options.pop("name", None)
        if name not in pb.tasks.__all__:
            raise PatchbayError(
                f"no task {name!r}; tasks are {', '.join(pb.tasks.__all__)}{suggest(str(name), pb.tasks.__all__)}"
            )
        if isinstance(options.get("n"), int) and options["n"] > MOST_PROMPTS:
            raise PatchbayError(f"n={options['n']}: up to {MOST_PROMPTS} prompts")
        make = getattr(pb.tasks, name)
        other = next((one for one in options if one not in inspect.signature(make).parameters), None)
        if other is not None:
            raise PatchbayError(
                f"task {name} has no {other!r}; it has {', '.join(list(inspect.signature(make).parameters)[1:])}"
            )
        return make(self.model, **self.checked(options))

    def result(self, name: str) -> Any:
        import patchbay as pb

        return pb.load_result(inside(self.folder, checked_name(name)))

    def knob(self, name: str) -> Any:
        from patchbay.knobs.knob import load_knob
        from patchbay.serve.named import check_size

        path = inside(self.folder, f"{checked_name(name)}.knob")
        if not path.is_file():
            raise PatchbayError(f"there is no knob {name!r} in the folder")
        check_size(path)
        return load_knob(path, self.model)


def _refuse_written(text: str) -> None:
    """Refuse tasks and meters with their options in one text, which may name files in more ways than can be looked through."""
    import patchbay as pb

    name, _, options = text.partition(":")
    if name in pb.tasks.__all__ and "=" in options:
        raise PatchbayError(
            f'{text!r:.100}: here a task with options is an object, {{"name": {name!r}, "n": 40}}, of an input that takes a task'
        )
    name, given, _ = text.partition("=")
    if given and name.strip().replace("-", "_") in pb.measure.__all__:
        raise PatchbayError(f'{text!r:.100}: here meters are an object, {{"{name.strip()}": {{"items": ...}}}}')


def checked_name(name: str) -> str:
    """A name that a Result or a knob may have in the folder."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,80}", name):
        raise PatchbayError(f"{name!r} is no name: letters, digits, '.', '_' and '-', beginning with a letter or digit")
    return name

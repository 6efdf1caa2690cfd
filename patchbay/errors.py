"""Requests that cannot be met, what may have been meant, and arguments held to their kinds. Imports nothing of the package."""

from __future__ import annotations

import inspect
import numbers
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from traceback import extract_tb
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

PACKAGE = str(Path(__file__).parent) + os.sep


class PatchbayError(ValueError):
    """A request that cannot be met. The message says what was asked, what was found and what is possible."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the user's line and the message, not the way through the library."""
        own = [frame for frame in extract_tb(self.__traceback__) if not frame.filename.startswith(PACKAGE)]
        asked = [frame for frame in own if "/lib/python" not in frame.filename] or own
        where = [f"line {asked[-1].lineno}: {asked[-1].line}".rstrip(": ")] if asked else []
        return [*where, f"{type(self).__name__}: {self}"]


def suggest(asked: str, known: list[str] | tuple[str, ...]) -> str:
    """`; did you mean ...?` when something near `asked` is known, else the empty string."""
    near = get_close_matches(asked, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ""


def one_of(name: str, value: Any, possible: Iterable[Any]) -> None:
    """Raise PatchbayError where an option has a value that it does not take."""
    known = list(possible)
    if value not in known:
        names = [str(one) for one in known]
        raise PatchbayError(f"{name}={value!r}; possible are {', '.join(names)}" + suggest(str(value), names))


def _number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not _truth(value)


def _truth(value: Any) -> bool:
    return isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")  # numpy's too


KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # a kind as annotations spell it: what to say, and what is one
    "int": ("a whole number", lambda value: _number(value, numbers.Integral)),
    "float": ("a number", lambda value: _number(value, numbers.Real)),
    "bool": ("True or False", _truth),
    "str": ("a text", lambda value: isinstance(value, str)),
    "Path": ("a path", lambda value: isinstance(value, os.PathLike)),
    "None": ("None", lambda value: value is None),
    "Model": (
        "a Model from patchbay.load(...)",
        lambda value: hasattr(value, "tokenizer") and not isinstance(value, type),
    ),
    "Result": ("a Result", lambda value: hasattr(value, "variables") and hasattr(value, "provenance")),
    "Task": ("a Task", lambda value: type(value).__name__ == "Task"),
    "Knob": ("a Knob", lambda value: hasattr(value, "edits_at")),
}


def _kind(text: str) -> tuple[str, Callable[[Any], bool]] | None:
    """What to say of a kind and what is one; None where it is not looked at."""
    if re.match(r"(?:dict|Mapping)\[", text):
        return "a dict by names", lambda value: isinstance(value, Mapping)
    many = re.match(r"(?:list|tuple|Sequence|Iterable)\[(.*)", text)
    if many is None:
        return KINDS.get(text)
    return ("a list of numbers", _numbers) if many[1].startswith(("int", "float")) else ("a list", _many)


def _many(value: Any) -> bool:
    return isinstance(value, Iterable)


def _numbers(value: Any) -> bool:
    """Whether it is a list of numbers, or something read one by one that may be."""
    several = isinstance(value, Iterable) and not isinstance(value, str | Mapping)
    return several and (not isinstance(value, Sequence) or all(hasattr(one, "__float__") for one in value))


def written(annotation: Any) -> str:
    """An annotation as text without modules, however it is written: `list[Part] | None` for `Optional[list[pb.Part]]` too."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", text)
    return re.sub(r"^Optional\[(.*)\]$", r"\1 | None", text)


def refuse_other_kinds(value: Any, annotation: str, name: str, argument: str) -> None:
    """Raise PatchbayError where a value is none of the kinds of an annotation, if all of these are known."""
    kinds = [_kind(kind.strip()) for kind in annotation.split("|")]
    known = [kind for kind in kinds if kind is not None]
    if len(known) < len(kinds) or any(holds(value) for _, holds in known):
        return
    possible = " or ".join(words for words, _ in known)
    raise PatchbayError(f"{name}: {argument} takes {possible}, got {said(value)}")


def said(value: Any) -> str:
    """A value in a few words: its kind, and its text where that is short."""
    kind = re.sub(r"^NoneType$", "None", type(value).__name__)
    return f"{kind} {value!r}" if isinstance(value, str | int | float) and len(repr(value)) < 60 else kind


def by_kind(function: Callable[P, T]) -> Callable[P, T]:
    """The function, each argument held to its annotation before anything runs: what is of another kind is refused by name."""
    parameters = inspect.signature(function).parameters
    held = {name: written(one.annotation) for name, one in parameters.items() if one.kind is not one.VAR_KEYWORD}
    held = {name: text for name, text in held.items() if all(_kind(kind.strip()) for kind in text.split("|"))}
    names, title = list(parameters), function.__qualname__

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            if name in held:
                refuse_other_kinds(value, held[name], title, name)
        return function(*args, **kwargs)

    return call


class EditNeverMade(UserWarning):
    """A block of edits ended and the model had not run in it."""

"""Commands from functions: the listing of a folder without importing it, and options from a signature.

A listing reads each file's text (ast), so that `--help` imports no method and no torch. An option's type is the parameter's
annotation (`signatures.py`); `reading.py` turns text into it. What a command line cannot write (a tensor, a function) is left
to Python.
"""

from __future__ import annotations

import ast
import collections.abc
import functools
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from patchbay.cli.signatures import PACKAGE, Source, source, written

ROOMS = {
    "find": "Find the parts that do a thing.",
    "prove": "Prove causally that parts do it, against controls.",
    "turn": "Turn parts like knobs, and save the knob.",
    "decode": "Continue prompts by a decoder, under knobs.",
    "train": "Train parts, dictionaries and lenses, or a variant beside its twin.",
    "measure": "Measure what a knob does, and what else it does.",
}
LATER = ("Task", "Result", "Knob", "Model")  # read with the model at hand
UNWRITABLE = ("Tensor", "Callable", "ndarray", "Edit", "Module")


class Listed(NamedTuple):
    """A method or task as its source text shows it."""

    name: str
    doc: str
    options: str
    path: Path


# --- listing, by ast ----------------------------------------------------------------------------------


@functools.cache
def methods(room: str) -> dict[str, Listed]:
    """Methods of a folder: each file that defines a function of its own name, with the file's first line."""
    return {name: one for name, path in files(room).items() if (one := listed(source(path), name)) is not None}


@functools.cache
def files(room: str) -> dict[str, Path]:
    """The methods of a folder and their files, by the listing alone: a file without `_` in front is a method."""
    return {path.stem: path for path in sorted((PACKAGE / room).glob("[a-z]*.py"))}


def listed(file: Source, name: str) -> Listed | None:
    """A function of a file, with the first line of the file; None where the file has no function of that name."""
    function = file.function(name)
    if function is None:
        return None
    return Listed(name, _first_line(file.doc or ast.get_docstring(function) or ""), _written(function, file), file.path)


def doc(module: str) -> str:
    """The docstring of a file of the package, by its name, without importing it."""
    return source(PACKAGE / f"{module}.py").doc


@functools.cache
def tasks() -> dict[str, Listed]:
    """Tasks: the functions that `patchbay.tasks` exports, with their own first line."""
    found = {}
    for line in source(PACKAGE / "tasks" / "__init__.py").tree.body:
        if isinstance(line, ast.ImportFrom) and line.module:
            file = source(PACKAGE / "tasks" / f"{line.module.rpartition('.')[2]}.py")
            for name in (alias.name for alias in line.names):
                if (function := file.function(name)) is not None:
                    doc = _first_line(ast.get_docstring(function) or file.doc)
                    found[name] = Listed(name, doc, _written(function, file), file.path)
    return dict(sorted(found.items()))


def rooms() -> list[str]:
    """The folders of methods that there are."""
    return [room for room in ROOMS if (PACKAGE / room / "__init__.py").is_file()]


def _first_line(doc: str) -> str:
    """The first sentence of a docstring's first paragraph."""
    paragraph = " ".join(doc.split("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) (?=[A-Z(`])", paragraph)[0].rstrip(".").replace("`", "")


def _written(function: ast.FunctionDef, file: Source) -> str:
    """`n=100, objects=8`: everything with a default, constants as their values."""
    rules = function.args
    plain = rules.args[len(rules.args) - len(rules.defaults) :]
    pairs = [*zip(plain, rules.defaults, strict=True), *zip(rules.kwonlyargs, rules.kw_defaults, strict=True)]
    return ", ".join(f"{argument.arg}={written(value, file)}" for argument, value in pairs if value is not None)


def load_method(room: str, name: str) -> Callable[..., Any]:
    """Import one method."""
    from importlib import import_module

    return typing.cast("Callable[..., Any]", getattr(import_module(f"patchbay.{room}.{name}"), name))


# --- types --------------------------------------------------------------------------------------------


def names_in(hint: Any) -> set[str]:
    """Names of the types in an annotation: {"Sequence", "Part", "NoneType"}."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return {"Literal"}
    own = hint if isinstance(hint, str) else getattr(typing.get_origin(hint) or hint, "__name__", "")
    return set(re.findall(r"\w+", own)).union(*(names_in(item) for item in inner))


def writable(hint: Any) -> bool:
    """Whether some text can give a value of this type."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return any(writable(item) for item in typing.get_args(hint) if item is not type(None))
    return not names_in(hint) & set(UNWRITABLE)


def choices(hint: Any) -> tuple[Any, ...]:
    """The values of a Literal, also inside `Literal[...] | None`; none for other types."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        inner = [choices(item) for item in typing.get_args(hint) if item is not type(None)]
        return tuple(value for values in inner for value in values) if all(inner) else ()
    return ()


def shown_type(hint: Any) -> str:
    """The type as a word for help: `int`, `part,part,...`, `zero|mean`."""
    if given := choices(hint):
        return "|".join(str(value) for value in given)
    origin, inner = typing.get_origin(hint), [a for a in typing.get_args(hint) if a not in (type(None), Ellipsis)]
    if origin in (types.UnionType, typing.Union):
        return "|".join(dict.fromkeys(shown_type(item) for item in inner if writable(item)))
    if origin in (list, tuple, collections.abc.Sequence, collections.abc.Iterable):
        return f"{shown_type(inner[0]) if inner else 'text'},..."
    if origin in (dict, collections.abc.Mapping) or hint is dict:
        return "json"
    return {"str": "text", "Path": "file", "float": "number"}.get(
        name := getattr(hint, "__name__", "value"), name.lower()
    )

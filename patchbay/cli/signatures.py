"""Signatures read from a file's text: parameters with their annotations and defaults, without importing what the file imports.

Names are followed where they lead: to a constant or an alias of the same file (`Way = Literal[...]`), to one that is imported
from another file of the package, to `typing` and the built-in types. Every other class is a stand-in of its name: a command line
asks only what a type is called.
"""

from __future__ import annotations

import ast
import builtins
import collections.abc
import functools
import inspect
import pathlib
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent.parent
CLASSES = {
    "Model",
    "Task",
    "Result",
    "Knob",
    "Part",
    "Port",
    "Channel",
    "Tensor",
}  # known to be classes: no file is read for them
UNKNOWN = object()  # a default that is no constant


class Source:
    """One file's text, parsed once."""

    def __init__(self, path: Path) -> None:
        self.path, self.tree = path, ast.parse(path.read_bytes(), filename=str(path))
        self.doc = ast.get_docstring(self.tree) or ""

    def function(self, name: str) -> ast.FunctionDef | None:
        return next((node for node in self.tree.body if isinstance(node, ast.FunctionDef) and node.name == name), None)

    def assigned(self, name: str) -> tuple[ast.expr, Source] | None:
        """The expression that a name stands for, and the file whose names that uses; None for classes and other modules."""
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == name for to in node.targets):
                return node.value, self
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
                return (node.value, self) if node.value is not None else None
        module, original = self.imported(name)
        path = _file_of(module)
        return source(path).assigned(original) if path is not None else None

    def imported(self, name: str) -> tuple[str, str]:
        """The module and the name there of an imported name; empty texts for none."""
        guarded = [inner for node in self.tree.body if isinstance(node, ast.If) for inner in node.body]
        for node in [*self.tree.body, *guarded]:
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return node.module or "", alias.name
        return "", ""


@functools.cache
def source(path: Path) -> Source:
    return Source(path)


def _file_of(module: str) -> Path | None:
    """The file of a module of this package."""
    if not module.startswith("patchbay."):
        return None
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a function, read from the file that defines it."""
    plain = inspect.unwrap(function)
    return parameters_of(source(Path(plain.__code__.co_filename)), plain.__name__)


def parameters_of(file: Source, name: str) -> dict[str, inspect.Parameter]:
    """The parameters of the function of that name, with annotations and defaults as values."""
    node = file.function(name)
    assert node is not None
    rules = node.args
    needed = len(rules.args) - len(rules.defaults)
    plain = [(argument, None) for argument in rules.args[:needed]]
    plain += zip(rules.args[needed:], rules.defaults, strict=True)  # type: ignore[arg-type]
    found = {}
    for kind, pairs in (
        (inspect.Parameter.POSITIONAL_OR_KEYWORD, plain),
        (inspect.Parameter.KEYWORD_ONLY, [*zip(rules.kwonlyargs, rules.kw_defaults, strict=True)]),
    ):
        for argument, default in pairs:
            value = inspect.Parameter.empty if default is None else constant(default, file)
            hint = Any if argument.annotation is None else annotation(argument.annotation, file)
            found[argument.arg] = inspect.Parameter(argument.arg, kind, default=value, annotation=hint)
    return found


# --- values -------------------------------------------------------------------------------------------


def constant(node: ast.expr, file: Source) -> Any:
    """A default's value, names followed; UNKNOWN where it is no constant."""
    found = _followed(node, file)
    if found is not None:
        return constant(*found)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return UNKNOWN


def written(node: ast.expr, file: Source) -> str:
    """A default as text: `RELATION` and `words.LIMIT` as the values that their modules give them."""
    found = _followed(node, file)
    return ast.unparse(node) if found is None else written(*found)


def _followed(node: ast.expr, file: Source) -> tuple[ast.expr, Source] | None:
    """What a name, or a name in a module of the package, stands for."""
    if isinstance(node, ast.Name):
        return file.assigned(node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        module, name = file.imported(node.value.id)
        path = _file_of(f"{module}.{name}") if module else None
        return source(path).assigned(node.attr) if path is not None else None
    return None


# --- types --------------------------------------------------------------------------------------------


class _StandIn(type):
    def __getitem__(cls, item: Any) -> Any:  # Float[Tensor, "batch"] is a Tensor here
        inner = item[0] if isinstance(item, tuple) else item
        return inner if isinstance(inner, type) else cls


@functools.cache
def stand_in(name: str) -> type:
    return _StandIn(name, (), {})


def annotation(node: ast.expr, file: Source) -> Any:
    """An annotation as `typing` holds it."""
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            return annotation(ast.parse(node.value, mode="eval").body, file)
        return type(None) if node.value is None else node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return typing.Union[annotation(node.left, file), annotation(node.right, file)]  # noqa: UP007
    if isinstance(node, ast.Subscript):
        return _subscribed(node, file)
    if isinstance(node, ast.Attribute):
        known = {"typing": typing, "collections.abc": collections.abc, "pathlib": pathlib}.get(ast.unparse(node.value))
        return getattr(known, node.attr, stand_in(node.attr))
    return _named(node.id, file) if isinstance(node, ast.Name) else stand_in("value")


def _subscribed(node: ast.Subscript, file: Source) -> Any:
    base = annotation(node.value, file)
    items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if base is typing.Literal:
        return typing.Literal[tuple(constant(item, file) for item in items)]
    if base is collections.abc.Callable:
        return stand_in("Callable")
    held = tuple(annotation(item, file) for item in items)
    return base[held if len(held) > 1 else held[0]]


def _named(name: str, file: Source) -> Any:
    if name in CLASSES:
        return stand_in(name)
    if (found := file.assigned(name)) is not None:
        return annotation(*found)
    module, original = file.imported(name)
    for known in (typing, collections.abc, pathlib):
        if module == known.__name__:
            return getattr(known, original, stand_in(original))
    plain = getattr(builtins, name, None) if not module else None
    return plain if isinstance(plain, type) else stand_in(original or name)

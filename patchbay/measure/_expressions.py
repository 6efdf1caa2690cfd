"""Expressions of one number x, read from text and never run as code: arithmetic, a list of named functions, comparisons and `a if c else b`.

Text is parsed into Python's syntax tree, every node of which must be on the list; values are float64 arrays of numpy. An expression is bounded in length
before it is parsed and in depth after; `length` is its number of nodes.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchbay.signal.port import PatchbayError

Numbers = NDArray[np.float64]
LONGEST, MOST_NODES, DEEPEST = 2000, 400, 60
BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: np.divide,
    ast.Mod: np.mod,
    ast.Pow: np.power,
}
COMPARED: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: np.less,
    ast.LtE: np.less_equal,
    ast.Gt: np.greater,
    ast.GtE: np.greater_equal,
}


FUNCTIONS: dict[str, tuple[int, Callable[..., Any]]] = {  # how many numbers each takes
    "abs": (1, np.abs),
    "sqrt": (1, lambda x: np.sqrt(np.abs(x))),
    "cbrt": (1, np.cbrt),
    "log": (1, lambda x: np.log(np.abs(x) + 1e-12)),
    "exp": (1, lambda x: np.exp(np.clip(x, -700, 700))),
    "step": (1, lambda x: (x >= 0).astype(np.float64)),
    "rect": (3, lambda x, low, high: ((x >= low) & (x <= high)).astype(np.float64)),
    "relu": (1, lambda x: np.maximum(x, 0.0)),
    "sigmoid": (1, lambda x: 1.0 / (1.0 + np.exp(-np.clip(x, -700, 700)))),
    "tanh": (1, np.tanh),
    "sin": (1, np.sin),
    "cos": (1, np.cos),
    "tan": (1, np.tan),
    "ceil": (1, np.ceil),
    "floor": (1, np.floor),
    "gaussian": (1, lambda x: np.exp(-np.minimum(x * x, 1400.0) / 2)),
    "sign": (1, np.sign),
    "erf": (1, np.vectorize(math.erf, otypes=[np.float64])),
    "min": (2, np.minimum),
    "max": (2, np.maximum),
}
NAMES = {"pi": float(np.pi), "e": float(np.e)}


@dataclass(frozen=True)
class Expression:
    """A parsed expression: its text, its tree, how many nodes it has."""

    text: str
    tree: ast.expr
    length: int

    def __call__(self, x: Numbers) -> Numbers:
        with np.errstate(all="ignore"):
            found = _value(self.tree, np.asarray(x, dtype=np.float64))
        return np.broadcast_to(np.asarray(found, dtype=np.float64), np.shape(x)).copy()

    @property
    def interval(self) -> tuple[float, float] | None:
        """The interval `low <= x <= high` that the first condition sets apart, None where none does."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.IfExp) and (ends := _ends(node.test)) is not None:
                return ends
        return None


def parse(text: str) -> Expression:
    """An expression of x. Raises PatchbayError for whatever is not on the list."""
    return Expression(text.strip(), *counted(text, _count))


def counted(text: str, count: Callable[[ast.AST, int], int]) -> tuple[ast.expr, int]:
    """The tree of an expression and how many parts it has, of which `count` (node, depth) refuses what is not on its list."""
    if len(text) > LONGEST:
        raise PatchbayError(f"an expression of {len(text)} characters: at most {LONGEST} are read")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise PatchbayError(f"{text[:60]!r} is no expression: {error}") from error
    nodes = count(tree, 0)
    if nodes > MOST_NODES:
        raise PatchbayError(f"an expression of {nodes} parts: at most {MOST_NODES} are counted")
    return tree, nodes


def _count(node: ast.AST, depth: int) -> int:
    """How many numbers, names, calls and operations there are; refuses all others by name."""
    if depth > DEEPEST:
        raise PatchbayError(f"an expression more than {DEEPEST} deep")
    below = sum(_count(child, depth + 1) for child in _children(node))
    return 1 + below


def _children(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float) and abs(_number(node)) < 1e300:
        return []
    if isinstance(node, ast.Name) and (node.id == "x" or node.id in NAMES):
        return []
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub | ast.Not):
        return [node.operand]
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        return [node.left, node.right]
    if isinstance(node, ast.Compare) and all(type(op) in COMPARED for op in node.ops):
        return [node.left, *node.comparators]
    if isinstance(node, ast.BoolOp):
        return list(node.values)
    if isinstance(node, ast.IfExp):
        return [node.test, node.body, node.orelse]
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in FUNCTIONS
        and not node.keywords
    ):
        n = FUNCTIONS[node.func.id][0]
        if len(node.args) == n and not any(isinstance(one, ast.Starred) for one in node.args):
            return list(node.args)
        raise PatchbayError(f"{node.func.id} takes {n} numbers, got {len(node.args)}")
    told = getattr(node, "id", None) or (getattr(getattr(node, "func", None), "id", None)) or type(node).__name__
    raise PatchbayError(
        f"{told} is not read in an expression: x, numbers, + - * / % **, comparisons, a if c else b, and {', '.join(FUNCTIONS)}"
    )


def _value(node: ast.AST, x: Numbers) -> Any:
    """Only nodes that `_children` let through come here."""
    if isinstance(node, ast.Constant):
        return np.float64(_number(node))
    if isinstance(node, ast.Name):
        return x if node.id == "x" else np.float64(NAMES[node.id])
    if isinstance(node, ast.UnaryOp):
        value = _value(node.operand, x)
        return (
            np.logical_not(value)
            if isinstance(node.op, ast.Not)
            else -value
            if isinstance(node.op, ast.USub)
            else +value
        )
    if isinstance(node, ast.BinOp):
        return BINARY[type(node.op)](np.float64(1) * _value(node.left, x), np.float64(1) * _value(node.right, x))
    if isinstance(node, ast.Compare):
        terms = [_value(one, x) for one in (node.left, *node.comparators)]
        found = [COMPARED[type(op)](a, b) for op, a, b in zip(node.ops, terms, terms[1:], strict=False)]
        return np.logical_and.reduce(np.broadcast_arrays(*found))
    if isinstance(node, ast.BoolOp):
        joined = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
        return joined.reduce(np.broadcast_arrays(*(_value(one, x) for one in node.values)))
    if isinstance(node, ast.IfExp):
        return np.where(_value(node.test, x), _value(node.body, x), _value(node.orelse, x))
    assert isinstance(node, ast.Call)
    assert isinstance(node.func, ast.Name)
    return FUNCTIONS[node.func.id][1](*(_value(one, x) for one in node.args))


def _number(node: ast.Constant) -> float:
    value: Any = node.value
    return float(min(max(value, -1e301), 1e301))  # a whole number of any length


def _ends(test: ast.AST) -> tuple[float, float] | None:
    """The ends of `low <= x <= high` (strict or not), with numbers for ends."""
    if (
        not isinstance(test, ast.Compare)
        or len(test.ops) != 2
        or not isinstance(test.comparators[0], ast.Name)
        or test.comparators[0].id != "x"
    ):
        return None
    if not all(isinstance(op, ast.Lt | ast.LtE) for op in test.ops):
        return None
    try:
        low, high = (float(_value(one, np.zeros(1))) for one in (test.left, test.comparators[1]))
    except (TypeError, ValueError):
        return None
    return (low, high) if low < high else None

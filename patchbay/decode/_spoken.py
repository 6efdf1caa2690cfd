"""A decoder, or a step of one, as text: `beam(beams=4)`, `top_p(0.9)`, `greedy`; values are Python's literals."""

from __future__ import annotations

import ast
import warnings
from typing import Any

from patchbay.signal.port import PatchbayError


def spoken(text: str, what: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Name, values in their order, values by name. Nothing in it is run; raises PatchbayError for what is not written so."""
    try:
        with warnings.catch_warnings(action="error", category=SyntaxWarning):  # of a backslash that is none
            node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, [], {}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and all(one.arg for one in node.keywords):
            given = {str(one.arg): ast.literal_eval(one.value) for one in node.keywords}
            return node.func.id, [ast.literal_eval(one) for one in node.args], given
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        pass
    raise PatchbayError(
        f"{what}: {text!r} is not written as a name with its options, such as 'beam(beams=4)'; a pattern is r'...'"
    )

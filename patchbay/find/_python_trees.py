"""The tree of a piece of Python: nodes of Python's own `ast` over the tokens of `tokenize`.

A leaf is a token that is no comment, line end or indentation; a formatted string is one leaf, whatever stands inside. A node spans what `ast` says,
in bytes of UTF-8 where `tokenize` counts characters, widened by its children (arguments and comprehensions have no place of their own). A token
that no child covers hangs on the node. What has no token (a context, an operator, empty arguments) is no node.
"""

from __future__ import annotations

import ast
import bisect
import io
import re
import tokenize

from patchbay.errors import PatchbayError
from patchbay.find._trees import Parsed, Tree

SILENT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.ENCODING
}  # fmt: skip
OPAQUE = ("JoinedStr", "TemplateStr")


def of_python(text: str) -> Parsed:
    """A Python text's tree over its tokens. Raises PatchbayError for what is no Python of this interpreter."""
    try:
        parsed = ast.parse(text)
        lines = _Lines(text)
        spans = _tokens(text, lines)
    except (SyntaxError, tokenize.TokenError, ValueError) as error:
        raise PatchbayError(f"not Python as this interpreter reads it ({error}): {text[:60]!r}") from None
    if not spans:
        raise PatchbayError(f"Python without a token: {text[:60]!r}")
    grown = _grown(parsed, lines, spans)
    assert grown is not None
    return Parsed(text, spans, _tree(("Module", 0, len(spans) - 1, grown[3])))  # all, also what ast places nowhere


class _Lines:
    """Where lines begin, and places in them as characters from the text's start."""

    def __init__(self, text: str) -> None:
        self.lines = re.split(r"(?<=\n)", text)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))

    def by_bytes(self, line: int, column: int) -> int:
        return self.starts[line - 1] + len(self.lines[line - 1].encode()[:column].decode())

    def by_characters(self, place: tuple[int, int]) -> int:
        return self.starts[place[0] - 1] + place[1]


def _tokens(text: str, lines: _Lines) -> list[tuple[int, int]]:
    """Characters of every leaf; the pieces of a formatted string are one."""
    begins = {getattr(tokenize, f"{kind}STRING_START", -1) for kind in "FT"}
    ends = {getattr(tokenize, f"{kind}STRING_END", -1) for kind in "FT"}
    spans, depth, start = [], 0, 0
    for token in tokenize.generate_tokens(io.StringIO(text, newline="").readline):
        here = (lines.by_characters(token.start), lines.by_characters(token.end))
        if token.type in begins:
            start, depth = (start if depth else here[0]), depth + 1
        elif token.type in ends:
            depth -= 1
            if not depth:
                spans.append((start, here[1]))
        elif not depth and token.type not in SILENT:
            spans.append(here)
    return spans


Grown = tuple[str, int, int, list["Grown"]]  # label, first and last leaf, children


def _grown(node: ast.AST, lines: _Lines, spans: list[tuple[int, int]]) -> Grown | None:
    """A node with the leaves that it spans; None where it has none."""
    label = type(node).__name__
    below = [] if label in OPAQUE else [_grown(child, lines, spans) for child in ast.iter_child_nodes(node)]
    children = sorted((child for child in below if child is not None), key=lambda child: child[1:3])
    first = min((child[1] for child in children), default=len(spans))
    last = max((child[2] for child in children), default=-1)
    line, end = getattr(node, "lineno", None), getattr(node, "end_lineno", None)
    if line is not None and end is not None:
        start = lines.by_bytes(line, node.col_offset)  # type: ignore[attr-defined]
        stop = lines.by_bytes(end, node.end_col_offset)  # type: ignore[attr-defined]
        first = min(first, bisect.bisect_right([b for _, b in spans], start))
        last = max(last, bisect.bisect_left([a for a, _ in spans], stop) - 1)
    return (label, first, last, children) if first <= last else None


def _tree(grown: Grown) -> Tree:
    """Children in order, and every leaf that none of them covers."""
    label, first, last, below = grown
    children: list[Tree | int] = []
    at = first
    for child in below:
        children += range(at, child[1])
        children.append(_tree(child))
        at = child[2] + 1
    children += range(at, last + 1)
    return Tree(label, tuple(children))

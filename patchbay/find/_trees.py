"""Trees over the leaves of a text: how a tree becomes numbers and labels of its leaves, and the tree that these say; trees in brackets.

A tree is made binary first. Chains of nodes with one child are one node of a joined label ("a<sep>b"); a node over one leaf becomes that leaf's
unary label u (else <empty>); of more than two children the first stands left, the rest right under <empty>. Then for leaves 0..n-1

    d_i = height of the lowest common ancestor of leaves i and i + 1 (a leaf has height 0),   c_i = its label,   u_i = the leaf's unary label

and back: a stretch of leaves splits at its first largest d. An ancestor is higher than all below it, so that what was made of a tree gives it back.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from patchbay.errors import PatchbayError

EMPTY, JOINED = "<empty>", "<sep>"
Node = tuple[str, int, int]  # label, first leaf, last leaf


@dataclass(frozen=True)
class Tree:
    """A node with its children in order; a child that is a number is a leaf."""

    label: str
    children: tuple[Tree | int, ...]


class Parsed(NamedTuple):
    """A text, where its leaves lie in it (first character, end), and the tree over them."""

    text: str
    spans: list[tuple[int, int]]
    tree: Tree


class Coded(NamedTuple):
    """Heights and labels between neighbouring leaves [leaf - 1], and unary labels [leaf]."""

    d: list[int]
    c: list[str]
    u: list[str]


def coded(tree: Tree) -> Coded:
    """The numbers and labels of a tree over two leaves or more, in order of its leaves."""
    d: list[int] = []
    c: list[str] = []
    u: list[str] = []
    _written(tree, (d, c, u))
    return Coded(d, c, u)


def _written(node: Tree | int, out: tuple[list[int], list[str], list[str]]) -> int:
    """Append what a node says, from its first leaf to its last; its height."""
    d, c, u = out
    if isinstance(node, int):
        u.append(EMPTY)
        return 0
    labels = [node.label]
    while len(node.children) == 1 and isinstance(node.children[0], Tree):
        node = node.children[0]
        labels.append(node.label)
    label = JOINED.join(labels)
    if len(node.children) == 1:
        u.append(label)
        return 0
    places, heights = [], []
    for child in node.children:
        heights.append(_written(child, out))
        places.append(len(d))  # between this child and the next
        d.append(0)
        c.append(EMPTY)
    d.pop()
    c.pop()
    height = heights[-1]
    for at, below in zip(reversed(places[:-1]), reversed(heights[:-1]), strict=True):
        height = 1 + max(below, height)
        d[at] = height
    c[places[0]] = label
    return height


def decoded(d: Sequence[float], c: Sequence[str], u: Sequence[str]) -> list[Tree | int]:
    """The tree that numbers and labels say; several pieces where its root is <empty>, which dissolves wherever it stands."""

    def stretch(first: int, last: int) -> list[Tree | int]:
        if first == last:
            return [first] if u[first] == EMPTY else [_nested(u[first], [first])]
        at = max(range(first, last), key=lambda i: d[i])  # the first of equals
        inside = stretch(first, at) + stretch(at + 1, last)
        return inside if c[at] == EMPTY else [_nested(c[at], inside)]

    return stretch(0, len(u) - 1)


def _nested(label: str, children: list[Tree | int]) -> Tree:
    *outer, inner = label.split(JOINED)
    tree = Tree(inner, tuple(children))
    for name in reversed(outer):
        tree = Tree(name, (tree,))
    return tree


def nodes(trees: Sequence[Tree | int]) -> Counter[Node]:
    """How often each (label, first leaf, last leaf) stands in some trees."""
    found: Counter[Node] = Counter()

    def walk(node: Tree | int) -> tuple[int, int]:
        if isinstance(node, int):
            return node, node
        ends = [walk(child) for child in node.children]
        found[node.label, ends[0][0], ends[-1][1]] += 1
        return ends[0][0], ends[-1][1]

    for tree in trees:
        walk(tree)
    return found


def agreement(found: Counter[Node], gold: Counter[Node]) -> tuple[float, float, float]:
    """Precision, recall and F1 of two multisets of nodes; a tree without a node has found none."""
    both = (found & gold).total()
    precision, recall = (both / some.total() if some else 0.0 for some in (found, gold))
    return precision, recall, 2.0 * precision * recall / (precision + recall) if both else 0.0


# --- brackets -------------------------------------------------------------------------------------------


def of_brackets(written: str) -> Parsed:
    """A tree as treebanks write it, `(S (NP the cat) (VP sat))`; its text is its leaves with a space between them."""
    pieces = re.findall(r"[()]|[^\s()]+", written)
    leaves: list[str] = []
    try:
        tree, end = _bracket(pieces, 0, leaves)
    except IndexError:
        raise PatchbayError(f"a tree in brackets ends before its brackets close: {written[:60]!r}") from None
    if end != len(pieces):
        raise PatchbayError(f"one tree in brackets is one pair of brackets around all: {written[:60]!r}")
    spans, at = [], 0
    for leaf in leaves:
        spans.append((at, at + len(leaf)))
        at += len(leaf) + 1
    return Parsed(" ".join(leaves), spans, tree)


def _bracket(pieces: list[str], at: int, leaves: list[str]) -> tuple[Tree, int]:
    if pieces[at] != "(" or pieces[at + 1] == ")":
        raise PatchbayError(f"a tree in brackets is (LABEL children ...), got {' '.join(pieces[at : at + 8])!r}")
    label, at = ("", at + 1) if pieces[at + 1] == "(" else (pieces[at + 1], at + 2)
    children: list[Tree | int] = []
    while pieces[at] != ")":
        if pieces[at] == "(":
            child, at = _bracket(pieces, at, leaves)
            children.append(child)
        else:
            children.append(len(leaves))
            leaves.append(pieces[at])
            at += 1
    if not children:
        raise PatchbayError(f"a tree in brackets has a node without leaves: ({label})")
    return Tree(label, tuple(children)), at + 1

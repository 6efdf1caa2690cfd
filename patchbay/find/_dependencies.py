"""Dependency trees: sentences of a CoNLL-U file, distances between their words, the spanning tree that distances say.

A word is a line of ten columns whose number is whole; words of a multiword token ("3-4") lie where that token lies, empty nodes ("8.1") are no words.
The text is the comment `# text = ...`, in which the forms are found in order, or the forms with a space between them, as SpaceAfter=No says.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from patchbay.errors import PatchbayError


class Sentence(NamedTuple):
    """A text, where its words lie in it, and each word's head (-1 the root's)."""

    text: str
    spans: list[tuple[int, int]]
    heads: list[int]


def of_conllu(written: str) -> Sentence:
    """A sentence from its block of lines. Raises PatchbayError where it is none, or no tree."""
    rows = [line.split("\t") for line in written.strip("\n").split("\n") if line and not line.startswith("#")]
    if not rows or any(len(row) != 10 for row in rows):
        raise PatchbayError(f"a sentence of CoNLL-U is lines of ten columns, with tabs between: {written[:60]!r}")
    said = [line.partition("=")[2].strip() for line in written.split("\n") if line.startswith("# text =")]
    spans = _places(rows, said[0] if said else None)
    words = [row for row in rows if row[0].isdigit()]
    numbers = {row[0]: i for i, row in enumerate(words)}
    try:
        heads = [-1 if row[6] == "0" else numbers[row[6]] for row in words]
    except KeyError as error:
        raise PatchbayError(f"a head {error} that is no word's number: {written[:60]!r}") from None
    if heads.count(-1) != 1 or not bool(distances(heads).isfinite().all()):
        raise PatchbayError(f"the heads are those of no tree with one root: {heads[:20]}")
    return Sentence(said[0] if said else _joined(rows), [spans[row[0]] for row in words], heads)


def _surface(rows: list[list[str]]) -> list[tuple[list[str], str, bool]]:
    """What stands in the text, in order: the numbers of its words, its form, whether a space follows."""
    found, until = [], 0
    for row in rows:
        first, _, last = row[0].partition("-")
        if "." in row[0] or (not last and int(first) <= until):
            continue
        until = int(last or first)
        numbers = [str(i) for i in range(int(first), until + 1)]
        found.append((numbers, row[1], "SpaceAfter=No" not in row[9].split("|")))
    return found


def _joined(rows: list[list[str]]) -> str:
    return "".join(form + " " * space for _, form, space in _surface(rows)).rstrip(" ")


def _places(rows: list[list[str]], text: str | None) -> dict[str, tuple[int, int]]:
    """The characters of every word, by its number."""
    text, at = _joined(rows) if text is None else text, 0
    found: dict[str, tuple[int, int]] = {}
    for numbers, form, _ in _surface(rows):
        start = text.find(form, at)
        if start < 0:
            raise PatchbayError(f"the form {form!r} does not stand in the text {text[:80]!r} where it is due")
        at = start + len(form)
        found |= dict.fromkeys(numbers, (start, at))
    return found


def distances(heads: list[int]) -> Tensor:
    """Edges between every two words, float64 [word, word]; infinite where there is no way."""
    n = len(heads)
    table = torch.full((n, n), torch.inf, dtype=torch.float64)
    table.fill_diagonal_(0.0)
    for word, head in enumerate(heads):
        if head >= 0:
            table[word, head] = table[head, word] = 1.0
    for between in range(n):
        table = torch.minimum(table, table[:, between, None] + table[between])
    return table


def edges(heads: list[int]) -> set[tuple[int, int]]:
    """The tree's edges, each as (lower, higher) word."""
    return {(min(word, head), max(word, head)) for word, head in enumerate(heads) if head >= 0}


def spanning(table: Tensor) -> set[tuple[int, int]]:
    """Edges of the least spanning tree of distances [word, word], by Prim from word 0; of equals the first."""
    n = len(table)
    near, source = table[0].clone(), [0] * n
    inside, found = torch.zeros(n, dtype=torch.bool), set()
    inside[0] = True
    for _ in range(n - 1):
        word = int(torch.where(inside, torch.inf, near).argmin())
        found.add((min(word, source[word]), max(word, source[word])))
        inside[word] = True
        for other in range(n):
            if not inside[other] and table[word, other] < near[other]:
                near[other], source[other] = table[word, other], word
    return found

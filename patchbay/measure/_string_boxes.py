"""String boxes: functions of a word whose truth is edits put into one another, and how well another such expression says what they do.

    reverse(shift(x, 2))            x if 3 <= len(x) <= 4 else double(x)

Text is parsed into Python's syntax tree, every node of which must be on the list, and never run as code. What an answer explains is counted over fresh
words that the function changes alone: where an edit does nothing, whoever answers `x` is right without having understood it.
"""

from __future__ import annotations

import ast
import difflib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from patchbay.measure._expressions import DEEPEST, counted
from patchbay.signal.port import PatchbayError

LETTERS = "abcdefghijklmnopqrstuvwxyz"
FRESH, SHORTEST, LONGEST_WORD = 100, 3, 8  # words that score, and how many letters words have
MOST = 400  # letters of what comes out
CHANGES = 0.5  # of words that a function has to change, at least


def _shift(word: str, n: int) -> str:
    return "".join(LETTERS[(LETTERS.index(c) + n) % 26] if c in LETTERS else c for c in word)


EDITS: Mapping[str, tuple[tuple[type, ...], Callable[..., str]]] = {
    "reverse": ((), lambda x: x[::-1]),
    "double": ((), lambda x: x + x),
    "sort": ((), lambda x: "".join(sorted(x))),
    "swap": ((), lambda x: x[-1:] + x[1:-1] + x[:1] if len(x) > 1 else x),
    "odd": ((), lambda x: x[::2]),
    "first": ((int,), lambda x, n: x[:n]),
    "last": ((int,), lambda x, n: x[-n:] if n else ""),
    "cut": ((int,), lambda x, n: x[n:]),
    "drop": ((int,), lambda x, n: x[:-n] if n else x),
    "shift": ((int,), _shift),
    "prefix": ((str,), lambda x, s: s + x),
    "suffix": ((str,), lambda x, s: x + s),
    "replace": ((str, str), lambda x, a, b: x.replace(a, b) if a else x),
    "remove": ((str,), lambda x, a: x.replace(a, "") if a else x),
}


@dataclass(frozen=True)
class StringRule:
    """A parsed expression of a word: its text, its tree, how many nodes it has."""

    text: str
    tree: ast.expr
    length: int

    def __call__(self, word: str) -> str:
        return _value(self.tree, word)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The lengths `low <= len(x) <= high` that a condition sets apart, None where none does."""
        if not isinstance(self.tree, ast.IfExp):
            return None
        low, high = _ends(self.tree.test)
        return float(low), float(high)


# --- reading ------------------------------------------------------------------------------------------


def parse(text: str) -> StringRule:
    """An expression of a word x. Raises PatchbayError for whatever is not on the list."""
    return StringRule(text.strip(), *counted(text, _count))


def _count(node: ast.AST, depth: int) -> int:
    """How many edits, words and conditions there are; refuses all others by name."""
    if depth > DEEPEST:
        raise PatchbayError(f"an expression more than {DEEPEST} deep")
    if isinstance(node, ast.Name) and node.id == "x":
        return 1
    if isinstance(node, ast.IfExp) and depth == 0:
        _ends(node.test)
        return 1 + _count(node.body, 1) + _count(node.orelse, 1)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in EDITS and not node.keywords:
        takes, args = EDITS[node.func.id][0], node.args
        given = [one.value for one in args[1:] if isinstance(one, ast.Constant)]
        if len(args) == len(takes) + 1 and [type(value) for value in given] == list(takes) and all(map(_fits, given)):
            return 1 + len(given) + _count(args[0], depth + 1)
        raise PatchbayError(
            f"{node.func.id} takes a word{''.join(f', {one.__name__}' for one in takes)}: whole numbers 0 to 25, and strings of at most {LONGEST_WORD} letters"
        )
    told = getattr(node, "id", None) or getattr(getattr(node, "func", None), "id", None) or type(node).__name__
    raise PatchbayError(
        f"{told} is not read in an expression of a word: x, {', '.join(EDITS)}, and around all `A if 3 <= len(x) <= 4 else B`"
    )


def _fits(value: Any) -> bool:
    return 0 <= value <= 25 if isinstance(value, int) else len(value) <= LONGEST_WORD


def _ends(test: ast.AST) -> tuple[int, int]:
    """The ends of `low <= len(x) <= high`. Raises PatchbayError for another condition."""
    if (
        isinstance(test, ast.Compare)
        and ast.unparse(test.comparators[0]) == "len(x)"
        and len(test.ops) == 2
        and all(isinstance(op, ast.LtE) for op in test.ops)
    ):
        low, high = test.left, test.comparators[1]
        if (
            isinstance(low, ast.Constant)
            and isinstance(high, ast.Constant)
            and type(low.value) is type(high.value) is int
        ):
            return low.value, high.value
    raise PatchbayError("a condition of a word is `low <= len(x) <= high`, of whole numbers")


def _value(node: ast.AST, word: str) -> str:
    """Only nodes that `_count` let through come here."""
    if isinstance(node, ast.IfExp):
        low, high = _ends(node.test)
        return _value(node.body if low <= len(word) <= high else node.orelse, word)
    if isinstance(node, ast.Name):
        return word
    assert isinstance(node, ast.Call)
    assert isinstance(node.func, ast.Name)
    given = [one.value for one in node.args[1:] if isinstance(one, ast.Constant)]
    return EDITS[node.func.id][1](_value(node.args[0], word), *given)[:MOST]


# --- drawing ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StringBox:
    """A function of a word: its rule, and the lengths of words that come back as they are."""

    rule: StringRule
    interval: tuple[float, float] | None = None

    def __call__(self, words: Sequence[str]) -> list[str]:
        low, high = self.interval or (1.0, 0.0)
        return [word if low <= len(word) <= high else self.rule(word) for word in words]


def words(n: int, seed: str) -> list[str]:
    """Different words that nobody knows, consonants and vowels in turn."""
    rng, found = random.Random(seed), dict[str, None]()
    while len(found) < n:
        kinds = rng.choice((("aeiou", "bcdfghklmnprstvz"), ("bcdfghklmnprstvz", "aeiou")))
        found["".join(rng.choice(kinds[i % 2]) for i in range(rng.randint(SHORTEST, LONGEST_WORD)))] = None
    return list(found)


def make(seed: int, corruption: float) -> StringBox:
    """Two or three edits put into one another; with the chance `corruption` words of one or two lengths come back as they are."""
    rng, some = random.Random(f"strings-{seed}"), words(50, "changed")
    while True:
        rule = parse(_drawn(rng))
        if sum(rule(word) != word for word in some) >= CHANGES * len(some) and len({rule(word) for word in some}) > 10:
            break
    low = rng.randint(SHORTEST, LONGEST_WORD - 1)
    interval = (float(low), float(low + rng.randint(0, 1))) if rng.random() < corruption else None
    return StringBox(rule, interval)


def _drawn(rng: random.Random) -> str:
    text = "x"
    for name in rng.sample(sorted(EDITS), rng.randint(2, 3)):
        given = [
            str(rng.randint(1, 3)) if kind is int else repr("".join(rng.choice("aeioubdklmnrst") for _ in range(1)))
            for kind in EDITS[name][0]
        ]
        text = f"{name}({', '.join([text, *given])})"
    return text


def single() -> list[StringRule]:
    """Every single edit with every small number and letter."""
    found = []
    for name, (takes, _) in EDITS.items():
        choices: list[list[str]] = [[]]
        for kind in takes:
            choices = [
                [*row, one] for row in choices for one in (map(str, range(1, 4)) if kind is int else map(repr, LETTERS))
            ]
        found += [parse(f"{name}({', '.join(['x', *row])})") for row in choices]
    return found


def baselines(asked: Sequence[str], seen: Sequence[str]) -> dict[str, Callable[[str], str]]:
    """What says something of any function from the same queries: the word itself, what the nearest query got, and the single edit that fits most of them."""
    table = dict(zip(asked, seen, strict=True))
    right = [(sum(rule(word) == out for word, out in table.items()), -i, rule) for i, rule in enumerate(SINGLE)]

    def nearest(word: str) -> str:  # that has most letters in the same places
        return table[max(table, key=lambda one: sum(a == b for a, b in zip(one, word, strict=False)))]

    return {"word": lambda word: word, "table": nearest, "one edit": max(right, key=lambda one: one[:2])[2]}


SINGLE = single()


# --- scores -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StringScore:
    """How well one function of words says what another does, over fresh words: `passes` the share of all that it gets exactly (the published score),
    `explained` of those that change, `agreement` the mean share of letters in common, `corrupted` the share of those whose length is set apart."""

    passes: float
    explained: float
    agreement: float
    corrupted: float
    overlap: float

    @property
    def fvu(self) -> float:
        return 1.0 - self.explained


def score(
    box: StringBox,
    said: Callable[[str], str] | None,
    asked: Sequence[str],
    interval: tuple[float, float] | None,
    seed: int,
) -> StringScore:
    fresh = [word for word in words(FRESH + len(asked), f"fresh-{seed}") if word not in set(asked)][:FRESH]
    truth = box(fresh)
    told = ["" if said is None else said(word) for word in fresh]
    exact = [said is not None and a == b for a, b in zip(truth, told, strict=True)]
    alike = [difflib.SequenceMatcher(None, a, b, autojunk=False).ratio() for a, b in zip(truth, told, strict=True)]
    changed = [i for i, (word, out) in enumerate(zip(fresh, truth, strict=True)) if word != out]
    inside = [i for i, word in enumerate(fresh) if box.interval and box.interval[0] <= len(word) <= box.interval[1]]
    return StringScore(
        _share(exact, range(len(fresh))),
        _share(exact, changed),
        sum(alike) / len(alike) if said is not None else 0.0,
        _share(exact, inside),
        _lengths_in_common(box.interval, interval),
    )


def _share(exact: Sequence[bool], of: Sequence[int]) -> float:
    return sum(exact[i] for i in of) / len(of) if len(of) else float("nan")


def _lengths_in_common(one: tuple[float, float] | None, other: tuple[float, float] | None) -> float:
    """Lengths that both set apart over those that either does; NaN where neither sets any apart."""
    a, b = (set() if ends is None else set(range(int(ends[0]), int(ends[1]) + 1)) for ends in (one, other))
    return len(a & b) / len(a | b) if a | b else float("nan")

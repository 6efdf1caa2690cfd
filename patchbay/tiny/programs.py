"""Symbolic programs over tokens: selectors, aggregates and maps, with an interpreter. `compiled` writes them into weights.

A program is one `Variable`, the answer, defined from others down to `Tokens` and `Positions`. Every variable has one value
of a finite list at every position, or none (None). At position i, over the positions j <= i after the start token:

    Map(f, a, ...)                 f of the values of its inputs at i
    Pick(keys, queries, match, a)  the value of `a` at the one j with match(keys[j], queries[i]); `default` where there is
                                   none, and no value where there are several
    Count(keys, queries, match)    how many j match, up to `most`

These are the primitives of RASP (Weiss, Goldberg and Yahav 2021, "Thinking Like Transformers"), with attention that is causal
as a language model's is. The start token has no value of any variable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Value: TypeAlias = Any
Match: TypeAlias = Callable[[Value, Value], bool]  # (key, query)


@dataclass(frozen=True, eq=False)
class Variable:
    """A value at every position. `values`: all that it can be."""

    name: str
    values: tuple[Value, ...]

    @property
    def inputs(self) -> tuple[Variable, ...]:
        return ()

    @property
    def reads_tokens(self) -> bool:
        """Whether it can differ between prompts of one length."""
        return any(variable.reads_tokens for variable in self.inputs)

    def at(self, tokens: Sequence[Value], i: int) -> Value:
        """The value at position i of the tokens, which do not hold the start token."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Tokens(Variable):
    """The tokens themselves: the words of the program's vocabulary."""

    @property
    def reads_tokens(self) -> bool:
        return True

    def at(self, tokens: Sequence[Value], i: int) -> Value:
        return tokens[i]


@dataclass(frozen=True, eq=False)
class Positions(Variable):
    """0 for the first token after the start token, and so on."""

    def at(self, tokens: Sequence[Value], i: int) -> Value:
        return i


@dataclass(frozen=True, eq=False)
class Map(Variable):
    """A function of one or two variables at the same position."""

    function: Callable[..., Value]
    of: tuple[Variable, ...]

    @property
    def inputs(self) -> tuple[Variable, ...]:
        return self.of

    def at(self, tokens: Sequence[Value], i: int) -> Value:
        given = [variable.at(tokens, i) for variable in self.of]
        return None if None in given else self.function(*given)


@dataclass(frozen=True, eq=False)
class Selects(Variable):
    """What has keys, queries and a match: one attention head."""

    keys: Variable
    queries: Variable
    match: Match

    @property
    def table(self) -> list[tuple[bool, ...]]:
        """Which keys match which queries, [query, key]."""
        return [tuple(bool(self.match(key, query)) for key in self.keys.values) for query in self.queries.values]

    def selected(self, tokens: Sequence[Value], i: int) -> list[int]:
        query = self.queries.at(tokens, i)
        keys = [self.keys.at(tokens, j) for j in range(i + 1)]
        return [j for j, key in enumerate(keys) if key is not None and query is not None and self.match(key, query)]


@dataclass(frozen=True, eq=False)
class Pick(Selects):
    """The value at the one position that matches."""

    of: Variable
    default: Value = None

    @property
    def inputs(self) -> tuple[Variable, ...]:
        return (self.keys, self.queries, self.of)

    def at(self, tokens: Sequence[Value], i: int) -> Value:
        found = self.selected(tokens, i)
        return self.default if not found else self.of.at(tokens, found[0]) if len(found) == 1 else None


@dataclass(frozen=True, eq=False)
class Count(Selects):
    """How many positions match; `values` are 0, 1, ..., most."""

    @property
    def inputs(self) -> tuple[Variable, ...]:
        return (self.keys, self.queries)

    def at(self, tokens: Sequence[Value], i: int) -> Value:
        return min(len(self.selected(tokens, i)), self.values[-1])


def tokens(words: Sequence[str]) -> Tokens:
    return Tokens("tokens", tuple(words))


def positions(n: int) -> Positions:
    return Positions("positions", tuple(range(n)))


def mapped(name: str, function: Callable[..., Value], *of: Variable) -> Map:
    """`function` of one or two variables; its values are those that it takes."""
    if len(of) == 1:
        found = [function(a) for a in of[0].values]
    else:
        found = [function(a, b) for a in of[0].values for b in of[1].values]
    return Map(name, tuple(dict.fromkeys(value for value in found if value is not None)), function, of)


def pick(name: str, keys: Variable, queries: Variable, match: Match, of: Variable, default: Value = None) -> Pick:
    values = of.values if default is None or default in of.values else (*of.values, default)
    return Pick(name, values, keys, queries, match, of, default)


def count(name: str, keys: Variable, queries: Variable, match: Match, most: int) -> Count:
    return Count(name, tuple(range(most + 1)), keys, queries, match)


def in_order(answer: Variable) -> list[Variable]:
    """Every variable of a program, each after its inputs."""
    found: dict[int, Variable] = {}

    def visit(variable: Variable) -> None:
        for before in variable.inputs:
            visit(before)
        found.setdefault(id(variable), variable)

    visit(answer)
    return list(found.values())


def same(key: Value, query: Value) -> bool:
    return bool(key == query)

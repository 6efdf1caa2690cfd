"""Automata: languages that a text explains itself, and how far a prediction is from the language's own.

An automaton has states, and from each of them arrows with different symbols to different other states. A string starts at state 0 and takes every arrow with the
same chance; a stream is strings of one automaton, the separator between them, and a model that has not met the automaton before has to learn it from
the stream. The truth is known at every place: after a prefix that leads to state q,

    p(symbol | prefix) = 1 / arrows of q, for the symbols of q's arrows      (the separator, which comes by chance, is left out)

    distance(p, r) = sum over symbols |p - r| / 2       (total variation)      valid(p) = the likeliest symbol of p is one of q's

What counting alone does is `counted`: the symbols that followed the longest of the last `n`, .., 0 tokens that came before in the stream.

Akyürek, Wang, Kim and Andreas 2024, "In-Context Language Learning: Architectures and Algorithms".
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from patchbay.errors import PatchbayError

SYMBOLS, SEPARATOR = 8, 8  # tokens 0..7, and the one between strings
TOKENS = SYMBOLS + 1
Automaton = list[dict[int, int]]  # of each state: symbol -> the state that it leads to


def automaton(rng: random.Random, *, states: tuple[int, int] = (4, 8), arrows: tuple[int, int] = (1, 3)) -> Automaton:
    """A random automaton: from each state one to three arrows, of different symbols, to different other states."""
    if not 2 <= states[0] <= states[1] or not 1 <= arrows[0] <= arrows[1] <= min(SYMBOLS, states[0] - 1):
        raise PatchbayError(
            f"states={states}, arrows={arrows}: 2 or more states, and from 1 to min({SYMBOLS}, states - 1) arrows"
        )
    n = rng.randint(*states)
    made = []
    for state in range(n):
        k = rng.randint(*arrows)
        targets = rng.sample([other for other in range(n) if other != state], k)
        made.append(dict(zip(rng.sample(range(SYMBOLS), k), targets, strict=True)))
    return made


def stream(rng: random.Random, made: Automaton, length: int, *, longest: int = 13) -> list[int]:
    """Strings of 1 to `longest` symbols, a separator behind each, cut to `length` tokens."""
    ids: list[int] = []
    while len(ids) < length:
        state = 0
        for _ in range(rng.randint(1, longest)):
            symbol = rng.choice(sorted(made[state]))
            state = made[state][symbol]
            ids.append(symbol)
        ids.append(SEPARATOR)
    return ids[:length]


def following(made: Automaton, ids: Sequence[int]) -> list[list[float]]:
    """The chance of each symbol after each token of a stream, [position, symbol]. PatchbayError where it is no stream of this automaton."""
    found, state = [], 0
    for place, token in enumerate(ids):
        if token != SEPARATOR and token not in made[state]:
            raise PatchbayError(f"token {token} at place {place}: no arrow of state {state} has it")
        state = 0 if token == SEPARATOR else made[state][token]
        found.append([1.0 / len(made[state]) if symbol in made[state] else 0.0 for symbol in range(SYMBOLS)])
    return found


def counted(ids: Sequence[int], n: int) -> list[list[float]]:
    """What the stream so far says of the next symbol, [position, symbol]: shares of what followed the longest of the last `n`, .., 0 tokens that was followed before."""
    if n < 0:
        raise PatchbayError(f"n={n}: 0 tokens or more")
    followed: dict[tuple[int, ...], Counter[int]] = {}
    found = []
    for place, token in enumerate(ids):
        for k in range(min(n, place) + 1):
            if token != SEPARATOR:
                followed.setdefault(tuple(ids[place - k : place]), Counter())[token] += 1
        known = (followed.get(tuple(ids[place + 1 - k : place + 1])) for k in range(min(n, place + 1), -1, -1))
        counts = next((one for one in known if one), None)
        found.append(
            [1.0 / SYMBOLS if counts is None else counts[symbol] / counts.total() for symbol in range(SYMBOLS)]
        )
    return found


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Total variation between two distributions over the symbols: half of the sum of |p - r|, from 0 to 1."""
    return sum(abs(p - r) for p, r in zip(one, other, strict=True)) / 2


def valid(said: Sequence[float], true: Sequence[float]) -> bool:
    """Whether the likeliest symbol, the first of equals, is one that can follow."""
    return true[max(range(len(said)), key=lambda symbol: said[symbol])] > 0

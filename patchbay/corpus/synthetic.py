"""Synthetic: languages that mean nothing, in which one thing alone can be learned; what a model reads before it reads a real one.

    repeats      strings of random tokens that repeat with a random period: what came before comes again
    nested       brackets that close in reverse order of their opening; token t opens, token t + vocab // 2 closes it
    independent  every token drawn by itself: the null, nothing follows from anything

In all of them each token is as likely as any other (of an even number, for brackets), so that they differ in order alone. Papadimitriou and Jurafsky 2020 and
Yao et al. 2022, "Linking Emergent and Natural Languages via Corpus Transfer", pre-train on such; the latter's own are languages of playing agents.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from patchbay.errors import PatchbayError, suggest

KINDS = ("repeats", "nested", "independent")


def texts(kind: str, n: int, seed: int, *, vocab: int, length: int = 32) -> list[list[int]]:
    """`n` texts of `length` tokens from 0..vocab - 1 in a language of KINDS; the same ones for the same seed."""
    if kind not in KINDS:
        raise PatchbayError(f"no language {kind!r}; languages are {', '.join(KINDS)}{suggest(kind, KINDS)}")
    if n < 1 or vocab < 4 or length < 4:
        raise PatchbayError(f"{n} texts of {length} tokens out of {vocab}: a text or more, of four tokens or more")
    if kind == "repeats":
        most = max(2, length * 3 // 8)
        return repeats(n, seed, vocab=vocab, length=length, least=min(4, most), most=most)
    rng = random.Random(f"{kind} {seed}")
    made: Callable[[], list[int]] = {
        "nested": lambda: brackets(rng, vocab // 2, length),
        "independent": lambda: [rng.randrange(vocab) for _ in range(length)],
    }[kind]
    return [made() for _ in range(n)]


def repeats(n: int, seed: int, *, vocab: int, length: int = 32, least: int = 4, most: int = 12) -> list[list[int]]:
    """Strings of random tokens that repeat with a random period of `least` to `most` tokens."""
    rng, found = random.Random(f"repeats {seed}"), []
    for _ in range(n):
        said = [rng.randrange(vocab) for _ in range(rng.randint(least, most))]
        found.append([said[i % len(said)] for i in range(length)])
    return found


def brackets(rng: random.Random, kinds: int, length: int) -> list[int]:
    """A text of brackets of so many kinds, all closed at its end; of an odd length one opening at the end stays open."""
    found: list[int] = []
    still: list[int] = []
    for place in range(length - length % 2):
        left = length - length % 2 - place
        if still and (len(still) >= left or rng.random() < 0.5):
            found.append(still.pop() + kinds)
        else:
            still.append(rng.randrange(kinds))
            found.append(still[-1])
    return found + [rng.randrange(kinds)] * (length % 2)

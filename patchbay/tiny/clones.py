"""Clones: languages of one law in words of their own, read with unequal shares by one network.

A chain of words follows a law: each word has three followers, with chances .7, .2 and .1. Language k says word w as w where w is one of the ANCHORS that all languages
share, and else in a block of the vocabulary of its own (`corpus.languages.anchored`). Of the rows that a network reads a quarter are translations, the same chain in two
languages with a sign between them; the rest are chains in one language. Languages come by their shares, so that one can be dominant: `EVEN` is the twin.

`minor` gives chains in a language whose likeliest next word is its own, `pairs` the same chains in all languages, ending in words that differ. What the inner layers say in
the place of a minor language's words is for `find.latent_language`, how near the languages' states are for `find.language_similarity`.

Zhong et al. 2024, "Beyond English-Centric LLMs: What Language Do Multilingual Language Models Think in?", and Li et al. 2024, "Language Ranker", at the size of
0.05 million weights. Without anchors the clones stay apart: nothing makes one language of another's use.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from patchbay.corpus.languages import anchored
from patchbay.model.model import Model
from patchbay.tiny import lab

WORDS, ANCHORS, LENGTH = 80, 24, 24
CHANCES = (0.7, 0.2, 0.1)
DOMINANT, EVEN = (0.9, 0.1), (0.5, 0.5)
HALVING = tuple(2.0**-k for k in range(8))  # shares of eight languages, before they sum to 1
TRANSLATED = 0.25
ROWS = 48


def law(seed: int) -> list[list[int]]:
    """The three followers of each word, likeliest first."""
    rng = random.Random(f"law {seed}")
    return [rng.sample(range(WORDS), len(CHANCES)) for _ in range(WORDS)]


def chain(rng: random.Random, followers: list[list[int]], length: int) -> list[int]:
    """Words that follow one another by the law, the first of them any."""
    found = [rng.randrange(WORDS)]
    while len(found) < length:
        found.append(rng.choices(followers[found[-1]], CHANCES)[0])
    return found


def vocabulary(languages: int) -> int:
    """Tokens of so many languages: anchors, the languages' own words, and the sign between translations, which is the last."""
    return ANCHORS + languages * (WORDS - ANCHORS) + 1


def own(language: int) -> list[int]:
    """The tokens of a language's own words."""
    return anchored(range(ANCHORS, WORDS), language, words=WORDS, anchors=ANCHORS)


def rows(n: int, shares: Sequence[float], followers: list[list[int]], seed: int) -> list[list[int]]:
    """What a network reads: chains in languages by their shares, a part of them said again in another language."""
    rng, names = random.Random(f"rows {seed}"), range(len(shares))
    found = []
    for _ in range(n):
        first = rng.choices(names, shares)[0]
        if rng.random() < TRANSLATED:
            said = chain(rng, followers, LENGTH // 2)
            second = rng.choices([k for k in names if k != first], [shares[k] for k in names if k != first])[0]
            ids = [*_spoken(said, first), vocabulary(len(shares)) - 1, *_spoken(said, second)]
        else:
            ids = _spoken(chain(rng, followers, LENGTH), first)
        found.append(ids[:LENGTH])
    return found


def _spoken(said: Sequence[int], language: int) -> list[int]:
    return anchored(said, language, words=WORDS, anchors=ANCHORS)


def train(shares: Sequence[float] = DOMINANT, *, steps: int = 220, seed: int = 0) -> Model:
    """A network of four layers with tied embeddings that read `steps` batches."""
    followers = law(seed)

    def loss(hf: Any, step: int) -> Tensor:
        ids = torch.tensor(rows(ROWS, shares, followers, 10**6 * (seed + 1) + step))
        logits = hf(ids, use_cache=False).logits[:, :-1]
        return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    return lab.fitted(network(len(shares), seed), loss, steps, rate=5e-3)


def network(languages: int, seed: int = 0) -> Model:
    """The untrained network for so many languages."""
    return lab.small(vocabulary(languages), layers=4, width=32, heads=4, mlp=64, positions=LENGTH, tied=True, seed=seed)


def minor(n: int, language: int, seed: int, *, shared: bool = True, law_of: int = 0) -> list[list[int]]:
    """Chains of half a row in one language, after which the likeliest word is the language's own; the last word is an anchor (`shared`), which does not say the language, or not."""
    followers = law(law_of)

    def wanted(said: list[int]) -> bool:
        return followers[said[-1]][0] >= ANCHORS and (said[-1] < ANCHORS) == shared

    return [_spoken(said, language) for said in _chains(n, followers, seed, wanted)]


def pairs(n: int, languages: int, seed: int, *, law_of: int = 0) -> list[list[list[int]]]:
    """The same chains in each language, the last word its own: [language][text]."""
    said = _chains(n, law(law_of), seed, lambda said: said[-1] >= ANCHORS)
    return [[_spoken(one, language) for one in said] for language in range(languages)]


def _chains(n: int, followers: list[list[int]], seed: int, wanted: Callable[[list[int]], bool]) -> list[list[int]]:
    """Different chains of half a row that say at least one word of no anchor, and are as wanted."""
    rng = random.Random(f"asked {seed}")
    found: list[list[int]] = []
    while len(found) < n:
        said = chain(rng, followers, LENGTH // 2)
        if max(said) >= ANCHORS and wanted(said) and said not in found:
            found.append(said)
    return found

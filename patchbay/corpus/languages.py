"""Languages made of one that is possible: the same tokens, in orders that no people speak; or the same sentences in other tokens.

`order` gives where each token of a sentence of n tokens comes from, new[i] = old[order[i]]:

    reversed   the last first                    local      windows of `width` tokens, each shuffled, the same way at each length
    even-odd   the even places, then the odd     shuffled   the whole sentence, the same way at each length
    control    as it stands                      random     the whole sentence, anew each time: a source of more entropy, not only a harder one

All but `random` can be undone from the text alone (`restored`). Sentences whose verbs hop are not here: they need a grammar's analysis.

Kallini et al. 2024, "Mission: Impossible Language Models". `cloned` writes a text in the second of two vocabularies of equal size, id + vocab:
Schaefer et al. 2024, "The Role of Language Imbalance in Cross-lingual Generalisation". `anchored` does so for any number of languages that share some words.

A shuffled language's tokens may be no harder to learn but only less determined: take from its loss that of an n-gram model of the same text (`ngram_loss`).
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from patchbay.errors import PatchbayError, suggest

KINDS = ("control", "reversed", "local", "even-odd", "shuffled", "random")


def order(kind: str, n: int, *, width: int = 3, salt: int = 0, draw: random.Random | None = None) -> list[int]:
    """Where each of n tokens comes from. `salt`: which of the languages of a kind; `draw`: of the random one."""
    if kind not in KINDS:
        raise PatchbayError(f"no language {kind!r}; languages are {', '.join(KINDS)}{suggest(kind, KINDS)}")
    if width < 1:
        raise PatchbayError(f"width={width}: windows of one token or more")
    places = list(range(n))
    if kind == "reversed":
        return places[::-1]
    if kind == "even-odd":
        return places[::2] + places[1::2]
    fixed = random.Random(f"{kind} {width} {salt} {n}") if kind != "random" else (draw or random.Random(salt))
    if kind == "local":
        windows = [places[i : i + width] for i in range(0, n, width)]
        for window in windows:
            fixed.shuffle(window)
        return [place for window in windows for place in window]
    if kind != "control":
        fixed.shuffle(places)
    return places


def spoken(
    ids: Sequence[int], kind: str, *, width: int = 3, salt: int = 0, draw: random.Random | None = None
) -> list[int]:
    """A sentence in a language."""
    return [ids[i] for i in order(kind, len(ids), width=width, salt=salt, draw=draw)]


def restored(ids: Sequence[int], kind: str, *, width: int = 3, salt: int = 0) -> list[int]:
    """The sentence that `spoken` was given. PatchbayError for the random shuffle, which cannot be undone."""
    if kind == "random":
        raise PatchbayError("a random shuffle is another one each time: nothing in the text says which")
    found = [0] * len(ids)
    for new, old in enumerate(order(kind, len(ids), width=width, salt=salt)):
        found[old] = ids[new]
    return found


def cloned(ids: Sequence[int], vocab: int, *, second: bool = True) -> list[int]:
    """A text in the second language, id + vocab, or back from either into the first with `second` False."""
    if any(not 0 <= one < 2 * vocab for one in ids) or (second and any(one >= vocab for one in ids)):
        raise PatchbayError(
            f"ids outside 0..{vocab - 1}: two languages of {vocab} tokens each stand one behind the other"
        )
    return [one + vocab if second else one % vocab for one in ids]


def clone(ids: Sequence[int], vocab: int, which: int, n: int) -> list[int]:
    """A text in clone `which` of `n`, id + which * vocab, from any clone."""
    if any(not 0 <= one < n * vocab for one in ids) or not 0 <= which < n:
        raise PatchbayError(
            f"ids outside 0..{n * vocab - 1}, or clone {which}: {n} clones of {vocab} tokens each stand one behind the other"
        )
    return [one % vocab + which * vocab for one in ids]


def retrieved(one: Tensor, other: Tensor) -> Tensor:
    """Whether each text's nearest state in the other language (cosine, each less its language's mean) is its own translation's: bool [text].

    States [text, d] of the same texts in two languages, as `corpus.selection.states` gives them.
    """
    if one.shape != other.shape or one.ndim != 2 or len(one) < 2:
        raise PatchbayError(
            f"states {tuple(one.shape)} and {tuple(other.shape)}: the same two texts or more in both languages"
        )
    a, b = (states.double() - states.double().mean(0) for states in (one, other))
    alike = torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T
    return alike.argmax(1) == torch.arange(len(alike))


def anchored(ids: Sequence[int], language: int, *, words: int, anchors: int = 0) -> list[int]:
    """A text of ids 0..words-1 in one of several languages: the first `anchors` words are the same in all, the others stand in a block of each language's own.

    Language 0 says every word as it is; word w >= anchors is w + language (words - anchors) in the others.
    """
    if language < 0 or not 0 <= anchors <= words or any(not 0 <= one < words for one in ids):
        raise PatchbayError(
            f"language={language}, words={words}, anchors={anchors}: ids of 0..{words - 1}, no more anchors than words, and language 0 or more"
        )
    return [one if one < anchors else one + language * (words - anchors) for one in ids]


def ngram_loss(train: Sequence[Sequence[int]], held: Sequence[Sequence[int]], vocab: int, n: int = 2) -> list[float]:
    """Mean - log p of the tokens after the first of each held-out sentence, nats, under an n-gram model of the training sentences.

    Interpolated Witten-Bell: p_k = (count + t p_{k-1}) / (total + t), t the number of different followers, p_0 = 1 / vocab; so that it needs
    no constant that must be chosen.
    """
    if not train or not held or n < 1:
        raise PatchbayError(f"{len(train)} sentences to count, {len(held)} to score, n={n}: one or more of each")
    followers: dict[tuple[int, ...], Counter[int]] = {}
    for ids in train:
        for place in range(1, len(ids)):
            for k in range(n):
                if place - k >= 0:
                    followers.setdefault(tuple(ids[place - k : place]), Counter())[ids[place]] += 1

    def p(before: tuple[int, ...], token: int) -> float:
        counts = followers.get(before)
        shorter = p(before[1:], token) if before else 1.0 / vocab
        return (counts[token] + len(counts) * shorter) / (counts.total() + len(counts)) if counts else shorter

    return [
        -sum(math.log(p(tuple(ids[max(0, i - n + 1) : i]), ids[i])) for i in range(1, len(ids))) / (len(ids) - 1)
        for ids in held
    ]

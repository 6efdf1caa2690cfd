"""Played: neurons that a language model plays, each by a word, and how well another word says which it is.

    f(w) = log p(w | the neuron's word) - mean over words c of log p(w | c)        in nats, w a word of one token

What answers is a text of its own, whose neuron the model plays too; both are compared at words that were not asked.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.signal.port import PatchbayError

POOL, WORDS, TRIED = 24, 120, 2000  # other words, words that are asked or score, ids that are looked through
OF = 3  # words of which the published judge picks one


@dataclass(frozen=True)
class Said:
    """A text and the neuron that the model plays by it, [word]."""

    text: str
    length: int
    plays: Tensor
    interval: None = None


@dataclass(frozen=True)
class Neuron:
    """The truth of one function, as the table shows it: its `rule` is the neuron's word."""

    rule: Said
    interval: None = None


@dataclass(frozen=True)
class PlayedScore:
    """`passes`: whether the answer's neuron goes with the true one more than with those of two other words; `fvu` of the true one by the answer's, and their rank correlation."""

    passes: float
    fvu: float
    agreement: float
    corrupted: float = float("nan")
    overlap: float = float("nan")

    @property
    def explained(self) -> float:
        return max(0.0, 1.0 - self.fvu)


def words_of(model: Model, n: int, seed: int) -> list[str]:
    """Texts of single tokens with a letter or number in them, drawn by a seed. Raises PatchbayError where there are fewer."""
    order, found = (
        random.Random(f"played-{seed}").sample(range(model.vocab_size), min(model.vocab_size, TRIED)),
        list[str](),
    )
    for token in order:
        text = model.decode([token])
        if any(letter.isalnum() for letter in text) and len(found) < n and _single(model, text) == token:
            found.append(text)
    if len(found) < n:
        raise PatchbayError(
            f"kind='neurons' needs {n} words that are one token each, and {len(found)} of the {len(order)} tokens looked at are: fewer functions or queries"
        )
    return found


def _single(model: Model, text: str) -> int | None:
    try:
        return model.token_id(text)
    except PatchbayError:
        return None


class Player:
    """A model that plays neurons at some words; their mean is over the neurons of `pool`."""

    def __init__(self, model: Model, words: Sequence[str], pool: Sequence[str]) -> None:
        self.model, self.ids = model, [model.token_id(word) for word in words]
        laws = torch.stack([self._law(word) for word in pool])
        self.mean = laws.mean(0)
        self.pool = [Said(word, 1, law - self.mean) for word, law in zip(pool, laws, strict=True)]

    def _law(self, text: str) -> Tensor:
        logits = run(self.model, self.model.encode([text]), logits="last").last_logits[0]
        return logits.double().log_softmax(0)[self.ids].cpu()

    def say(self, text: str) -> Said:
        """The neuron of a text. Raises PatchbayError for one without words."""
        text = text.strip("\n")
        if not text.strip():
            raise PatchbayError("an answer without a word plays no neuron")
        return Said(text, len(self.model.encode([text])[0]), self._law(text) - self.mean)


def score(truth: Said, said: Said | None, others: Sequence[Said], fresh: Sequence[int]) -> PlayedScore:
    """An answer's neuron against the true one at fresh words; `others`: the words between which the judge picks."""
    if said is None:
        return PlayedScore(0.0, float("inf"), 0.0)
    f, g = truth.plays[list(fresh)], said.plays[list(fresh)]
    fvu = float((f - g).pow(2).sum() / (f - f.mean()).pow(2).sum())
    like = [_like(one.plays[list(fresh)], g) for one in (truth, *others)]
    return PlayedScore(float(like[0] > max(like[1:])), fvu, maths.spearman(f, g))


def _like(f: Tensor, g: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([f, g]))[0, 1].nan_to_num(0.0))


def asked_of(player: Player, truth: Said, asked: Sequence[int]) -> Said:
    """The other word of the pool whose neuron is nearest at the words that were asked."""
    near: dict[Any, float] = {
        i: float((one.plays[list(asked)] - truth.plays[list(asked)]).pow(2).sum())
        for i, one in enumerate(player.pool)
        if one.text != truth.text
    }
    return player.pool[min(near, key=near.__getitem__)]

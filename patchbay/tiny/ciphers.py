"""Ciphers: a rule against common answers. Two letters come shifted by a fixed number, and the word that is asked is rare or common.

    cipher a b = c d      c and d are a and b, each moved back by SHIFT of the 16 letters; the 256 words come by Zipf's law
    text   a b = c d      c d is a word by its frequency, whatever a and b are

Half of the rows of training are of either kind, so that a network which has not yet learned the rule says common words. `train` stops there: where
more than `until` of all 256 words are deciphered. `tuned` then trains one layer on ciphers of some of the words, all equally often, and `right` tells which of the
others are deciphered now; `evenly` False trains the same layer as long on rows as they were read before, texts among them and words by frequency, which is the
control. Neither reads a word that is not among those given.

Zhang, Veselovsky, McCoy and Griffiths 2025, "Identifying and Mitigating the Influence of the Prior Distribution in Large Language Models", at the
size of a network of 0.1 million weights. A table of words in place of a rule would not do: what is learned of some words says nothing of others.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from patchbay.model.load import load
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError
from patchbay.tiny import lab

LETTERS, SHIFT, POWER = 16, 5, 1.2
CIPHER, TEXT, EQUALS, FIRST = 0, 1, 2, 3  # tokens: what the row is, the sign, the letters
WORDS = LETTERS**2
ROWS = 128


def chances(seed: int) -> Tensor:
    """How often each word comes, [word]: Zipf's law in an order drawn by the seed."""
    order = torch.randperm(WORDS, generator=torch.Generator().manual_seed(seed))
    ranked = torch.empty(WORDS, dtype=torch.float64)
    ranked[order] = torch.arange(1, WORDS + 1, dtype=torch.float64) ** -POWER
    return ranked / ranked.sum()


def rows(words: Tensor) -> Tensor:
    """Ids [word, 6] of the ciphers of some words, with their answers."""
    letters = torch.stack([words // LETTERS, words % LETTERS], 1)
    start = torch.tensor([CIPHER]).expand(len(words), 1)
    return torch.cat([start, FIRST + (letters + SHIFT) % LETTERS, start * 0 + EQUALS, FIRST + letters], 1)


def read(seed: int, n: int, chance: Tensor) -> Tensor:
    """Ids [row, 6] that training reads: ciphers and texts, half and half, of words by their chances."""
    generator = torch.Generator().manual_seed(seed)
    ids = rows(torch.multinomial(chance, n, replacement=True, generator=generator))
    ids[: n // 2, 0] = TEXT
    ids[: n // 2, 1:3] = FIRST + torch.randint(LETTERS, (n // 2, 2), generator=generator)
    return ids


@torch.no_grad()
def right(model: Model, words: Tensor) -> Tensor:
    """Whether both letters of each word are the likeliest ones, the second after the right first: float64 [word]."""
    ids = rows(words)
    said = model.hf(ids, use_cache=False).logits[:, 3:-1].argmax(-1)
    return (said == ids[:, 4:]).all(1).double()


def network(seed: int) -> Model:
    """The untrained network of three layers."""
    return lab.small(FIRST + LETTERS, layers=3, positions=8, seed=seed)


def train(*, until: float = 0.7, most: int = 400, seed: int = 0) -> Model:
    """A network of three layers that deciphers just more than `until` of the words. PatchbayError where `most` steps do not reach it."""
    model, chance, whole = network(seed), chances(seed), torch.arange(WORDS)

    def loss(hf: Any, step: int) -> Tensor | None:
        enough = step % 5 == 4 and float(right(model, whole).mean()) > until
        return None if enough else _loss(hf, read(10**6 * seed + step, ROWS, chance))

    made = lab.fitted(model, loss, most)
    if float(right(made, whole).mean()) <= until:
        raise PatchbayError(
            f"{most} steps decipher {float(right(made, whole).mean()):.0%} of the words, not {until:.0%}: give more"
        )
    return made


def tuned(model: Model, words: Tensor, layer: int, *, steps: int = 60, evenly: bool = True, seed: int = 0) -> Model:
    """A copy with one layer trained on ciphers of these words alone, each as often; with `evenly` False on what `read` gives of them, as at first."""
    made, chance = load(copy.deepcopy(model.hf)), torch.zeros(WORDS, dtype=torch.float64)
    chance[words] = chances(seed)[words]
    drawn = torch.Generator().manual_seed(seed + 1)

    def loss(hf: Any, step: int) -> Tensor:
        if not evenly:
            return _loss(hf, read(10**6 * seed + 10**5 + step, ROWS, chance))
        return _loss(hf, rows(words[torch.randint(len(words), (ROWS,), generator=drawn)]))

    hf: Any = made.hf
    for one in hf.parameters():
        one.requires_grad_(True)
    return lab.fitted(made, loss, steps, rate=1e-3, of=list(hf.model.layers[layer].parameters()))


def _loss(hf: Any, ids: Tensor) -> Tensor:
    logits = hf(ids, use_cache=False).logits[:, 3:-1]
    return cross_entropy(logits.flatten(0, 1), ids[:, 4:].flatten())

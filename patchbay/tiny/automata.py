"""Automata in context: networks that read streams of automata never met before, and how near they come to each one's own language.

`train("ngram")` teaches a network of one block behind two n-gram layers (`blocks.ngram`, orders 1 and 2), `train("plain")` one of two blocks and more weights, on the
same streams in the same order, each of an automaton of its own. `judge` tells of streams of other automata, in the second half of each: `valid`, the share of places
at which the likeliest symbol can follow; `distance`, the total variation between the network's chances and the truth, the separator left out; and `apart[n]`, that to what
counting after the longest of the last n, .., 0 tokens says (`corpus.automata`).

Akyürek, Wang, Kim and Andreas 2024, "In-Context Language Learning: Architectures and Algorithms", at the size of 0.1 million weights and streams of 96 tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from patchbay.blocks import build
from patchbay.corpus import automata
from patchbay.errors import one_of
from patchbay.model.load import load
from patchbay.model.model import Model
from patchbay.results.method import seeded
from patchbay.tiny import lab

FORMS = ("ngram", "plain")
LENGTH, ROWS = 96, 16
ORDERS = (0, 1, 2)  # of counting


@dataclass(frozen=True)
class Judged:
    """Means over the second half of each stream, float64 [stream]; `apart` and `counted` [order, stream]: counting's distance from the network, and from the truth."""

    valid: Tensor
    distance: Tensor
    apart: Tensor
    counted: Tensor


def streams(n: int, seed: int) -> list[tuple[automata.Automaton, list[int]]]:
    """Automata of their own, and a stream of each."""
    rng = random.Random(f"automata {seed}")
    return [(made, automata.stream(rng, made, LENGTH)) for made in (automata.automaton(rng) for _ in range(n))]


def network(form: str, seed: int = 0) -> Model:
    """The untrained network of a form."""
    one_of("form", form, FORMS)
    model = lab.small(automata.TOKENS, layers=1 + (form == "plain"), heads=8, positions=LENGTH, seed=seed)
    if form == "plain":
        return model
    with seeded(seed):
        return load(build(model.hf, ngram=[1, 2]))


def train(form: str, *, steps: int = 200, seed: int = 0) -> Model:
    """A network that read `steps` batches of streams."""

    def loss(hf: Any, step: int) -> Tensor:
        ids = torch.tensor([ids for _, ids in streams(ROWS, 10**6 * (seed + 1) + step)])
        logits = hf(ids, use_cache=False).logits[:, :-1]
        return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    return lab.fitted(network(form, seed), loss, steps)


@torch.no_grad()
def judge(model: Model, *, n: int = 64, seed: int = 0) -> Judged:
    """How near a network's next symbol is to that of `n` automata that no training drew."""
    drawn = streams(n, -1 - seed)
    ids, half = torch.tensor([ids for _, ids in drawn]), LENGTH // 2
    said = (
        model.hf(ids, use_cache=False).logits[..., : automata.SYMBOLS].double().softmax(-1)[:, half:]
    )  # [stream, place, symbol]
    true = torch.tensor([automata.following(made, ids) for made, ids in drawn], dtype=torch.float64)[:, half:]
    counts = [
        torch.tensor([automata.counted(ids, k) for _, ids in drawn], dtype=torch.float64)[:, half:] for k in ORDERS
    ]
    valid = true.gather(-1, said.argmax(-1, keepdim=True))[..., 0].gt(0).double().mean(1)
    return Judged(
        valid,
        _apart(said, true),
        torch.stack([_apart(said, one) for one in counts]),
        torch.stack([_apart(one, true) for one in counts]),
    )


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """Mean total variation over the places of each stream, [stream]."""
    return ((one - other).abs().sum(-1) / 2).mean(1)

"""Trained toys whose algorithm is known beforehand, from others' papers or by the task's own arithmetic. A minute each.

induction   random words that come again: a head that looks one back, and in the next layer one that looks at what followed the
            word before (Olsson et al. 2022, "In-context Learning and Induction Heads")
sorting     distinct numbers, a bar, the same in order: a head at each output that looks at the next larger number and copies it
modular     a + b modulo a prime: embeddings on a few circles, so that their Fourier spectrum is sparse (Nanda et al. 2023,
            "Progress measures for grokking via mechanistic interpretability")

`train(name)` returns the model and what it scores on fresh prompts; `heads(name, model)` the heads that do what the algorithm says
some head must, read from patterns alone. Nothing here asks a finder, so that finders can be held against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from patchbay.results.method import seeded
from patchbay.signal.port import PatchbayError, suggest

N_NUMBERS, N_SORTED, PRIME = 24, 6, 29
N_WORDS, N_REPEATED, PERIODS = 40, 24, (4, 10)  # words, tokens of a prompt, and after how many they come again
LOOKS = 0.4  # of a query's attention: more than every other use of it together, beside the sink


class Batch(NamedTuple):
    """`ids` [row, position] and `answered` bool [row, position]: where the next token is determined."""

    ids: Tensor
    answered: Tensor


@dataclass(frozen=True)
class Toy:
    draw: Callable[[int, torch.Generator], Batch]
    n_vocab: int
    n_layers: int
    n_heads: int
    steps: int
    decay: float = 0.01


def train(name: str, *, steps: int | None = None, seed: int = 0) -> tuple[GPT2LMHeadModel, float]:
    """A toy trained on fresh prompts, and the share of determined tokens that it says on 256 others."""
    toy = _toy(name)
    config = GPT2Config(
        vocab_size=toy.n_vocab, n_positions=64, n_embd=64, n_layer=toy.n_layers, n_head=toy.n_heads, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed):
        model = GPT2LMHeadModel(config).train()
    n = steps or toy.steps
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=toy.decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, step / 50) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / n)))
    )
    for _ in range(n):
        batch = toy.draw(64, generator)
        logits = model(batch.ids).logits[:, :-1][batch.answered[:, :-1]]
        cross_entropy(logits, batch.ids[:, 1:][batch.answered[:, :-1]]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    model.eval()
    return model, accuracy(name, model)


@torch.no_grad()
def accuracy(name: str, model: GPT2LMHeadModel) -> float:
    """The share of determined tokens that are the most likely ones, on 256 prompts that no training drew."""
    batch = _toy(name).draw(256, torch.Generator().manual_seed(10**6))
    right = model(batch.ids).logits[:, :-1].argmax(-1) == batch.ids[:, 1:]
    return float(right[batch.answered[:, :-1]].float().mean())


@torch.no_grad()
def heads(name: str, model: GPT2LMHeadModel) -> dict[str, list[str]]:
    """For each thing that the algorithm needs some head to look at: the heads that do, by their mean attention there."""
    if name not in TARGETS:
        return {}
    batch = _toy(name).draw(64, torch.Generator().manual_seed(10**6 + 1))
    chosen = model.config._attn_implementation
    model.set_attn_implementation("eager")
    patterns = model(batch.ids, output_attentions=True).attentions
    model.set_attn_implementation(chosen)
    found: dict[str, list[str]] = {}
    for role, target in TARGETS[name](batch.ids).items():  # target [row, position], -1 where there is none
        row, query = (target >= 0).nonzero(as_tuple=True)
        looks = [pattern[row, :, query, target[row, query]].mean(0) for pattern in patterns]  # [head]
        found[role] = [f"L{i}.H{h}" for i, layer in enumerate(looks) for h in (layer > LOOKS).nonzero()[:, 0].tolist()]
    return found


def sparsity(model: GPT2LMHeadModel) -> float:
    """The share of the numbers' embedding norm in its three largest frequencies: 3 / 14 where it is spread evenly."""
    spectrum = torch.fft.rfft(model.transformer.wte.weight[:PRIME].detach().double(), dim=0).abs().pow(2).sum(1)[1:]
    return float(spectrum.topk(3).values.sum() / spectrum.sum())


# ---- the toys --------------------------------------------------------------------------------------------------------


def _sorting(n: int, generator: torch.Generator) -> Batch:
    """Six different numbers, a bar (0), the same in order; answered from the bar on."""
    numbers = torch.stack([1 + torch.randperm(N_NUMBERS, generator=generator)[:N_SORTED] for _ in range(n)])
    ids = torch.cat([numbers, torch.zeros(n, 1, dtype=torch.long), numbers.sort(1).values], 1)
    answered = torch.zeros_like(ids, dtype=torch.bool)
    answered[:, N_SORTED:-1] = True
    return Batch(ids, answered)


def _modular(n: int, generator: torch.Generator) -> Batch:
    """a, b, the sign (PRIME), (a + b) modulo PRIME; answered at the sign."""
    pair = torch.randint(PRIME, (n * 4, 2), generator=generator)
    ids = torch.cat([pair, torch.full((len(pair), 1), PRIME), pair.sum(1, keepdim=True) % PRIME], 1)
    answered = torch.zeros_like(ids, dtype=torch.bool)
    answered[:, 2] = True
    return Batch(ids, answered)


def _induction(n: int, generator: torch.Generator) -> Batch:
    """Different words, as many as the row's period, over and over; answered from the second time on."""
    ids, answered = torch.zeros(n, N_REPEATED, dtype=torch.long), torch.zeros(n, N_REPEATED, dtype=torch.bool)
    periods = torch.randint(PERIODS[0], PERIODS[1] + 1, (n,), generator=generator).tolist()
    for row, period in enumerate(periods):
        words = 1 + torch.randperm(N_WORDS, generator=generator)[:period]
        ids[row] = words[torch.arange(N_REPEATED) % period]
        answered[row, period:-1] = True
    return Batch(ids, answered)


def _looks_back(ids: Tensor) -> dict[str, Tensor]:
    """One back, and at what followed the same word last time: [row, position], -1 where there is none."""
    places = torch.arange(ids.shape[1]).expand(ids.shape)
    previous, followed = (places - 1).clamp_min(-1), torch.full_like(ids, -1)
    for row, words in enumerate(ids.tolist()):
        period = len(set(words))
        followed[row, period:] = places[row, period:] - period + 1
    return {"previous token": previous, "induction": followed}


def _next_larger(ids: Tensor) -> dict[str, Tensor]:
    """Where a head must look, at each query: [row, position], -1 where nothing is asked."""
    following = torch.full_like(ids, -1)
    for row, words in enumerate(ids.tolist()):
        for at in range(N_SORTED, ids.shape[1] - 1):
            following[row, at] = words.index(words[at + 1])
    return {"next larger": following}


TOYS = {
    "induction": Toy(_induction, N_WORDS + 1, 2, 4, 300),
    "modular": Toy(_modular, PRIME + 1, 1, 4, 2500, decay=1.0),
    "sorting": Toy(_sorting, N_NUMBERS + 1, 1, 4, 1500),
}

TARGETS = {"induction": _looks_back, "sorting": _next_larger}


def _toy(name: str) -> Toy:
    if name not in TOYS:
        raise PatchbayError(f"no toy {name!r}; toys are {', '.join(TOYS)}{suggest(name, list(TOYS))}")
    return TOYS[name]

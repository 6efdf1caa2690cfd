"""Activations as a stream of shuffled batches of tokens, of which a bounded number is in memory. Where it stands is (seed, step).

Prompts go by in another order each epoch. As many of them as fill the buffer make a block: the model runs on them, their tokens (all but the
first of each) are shuffled and served in batches; fewer than a batch are left over and dropped. Order and blocks follow from the seed and
the prompts' lengths alone, so that a stream goes on from any step without a run of what came before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.signal.port import Port

TOGETHER = 32  # prompts that run as one batch


def shuffled(n: int, *what: object) -> list[int]:
    """A permutation that follows from what is named."""
    number = int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:7], "big")
    return torch.randperm(n, generator=torch.Generator().manual_seed(number)).tolist()


def blocks(lengths: Sequence[int], buffer: int, seed: int) -> Iterator[list[int]]:
    """Places of prompts, as many together as have `buffer` tokens to serve; without end."""
    block: list[int] = []
    held = epoch = 0
    while True:
        for i in shuffled(len(lengths), seed, "epoch", epoch):
            block.append(i)
            held += lengths[i] - 1
            if held >= buffer:
                yield block
                block, held = [], 0
        epoch += 1


def batches(
    model: Model,
    prompts: Sequence[Sequence[int]],
    ports: tuple[Port, Port],
    size: int,
    buffer: int,
    seed: int,
    skip: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """What is read and what is written, each [token, d], batch by batch, from step `skip` on."""
    for number, block in enumerate(blocks([len(ids) for ids in prompts], buffer, seed)):
        n = sum(len(prompts[i]) - 1 for i in block)
        if skip >= n // size:
            skip -= n // size
            continue
        read, written = activations(model, [prompts[i] for i in block], ports)
        order = torch.tensor(shuffled(n, seed, "block", number))
        for at in range(skip, n // size):
            some = order[at * size : (at + 1) * size]
            yield read[some], written[some]
        skip = 0


def activations(model: Model, prompts: Sequence[Sequence[int]], ports: tuple[Port, Port]) -> tuple[Tensor, Tensor]:
    """Two signals at all tokens but the first of each prompt, [token, d] in the order of prompts."""
    taps = list(dict.fromkeys(ports))
    trace = run(model, [list(ids) for ids in prompts], taps=taps, logits="last", batch_size=TOGETHER)
    real = torch.arange(trace.ids.shape[1])[None] < trace.lengths[:, None].cpu()
    real[:, 0] = False
    read, written = (trace[port].flatten(2).cpu()[real].float() for port in ports)
    return read, written

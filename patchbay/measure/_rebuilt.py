"""Rebuilt: sums over the tokens of texts, of what a dictionary writes and what it says of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchbay.features.across import by_site, reads_of, said, writes_of
from patchbay.features.dictionary import Dictionary
from patchbay.model.model import Model
from patchbay.model.run import run


@dataclass(frozen=True)
class Seen:
    """By text squared errors and squared distances to the mean, each site weighed by its own variance; by token how many features are active;
    by feature whether it ever is; sums of x^.x^ and x.x^ over all; the mean of each site."""

    above: Tensor
    below: Tensor
    active: Tensor
    on: Tensor
    squared: float
    across: float
    mean: Tensor

    @property
    def fvu(self) -> float:
        return float(self.above.sum() / self.below.sum())


def tokens(
    model: Model, it: Dictionary, encoded: Sequence[Sequence[int]], size: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Of each batch of texts: their places, and what is read and written at all their tokens but the first, [token, sites x d]."""
    reads, writes = reads_of(it), writes_of(it)
    for start in range(0, len(encoded), size):
        some = [list(ids) for ids in encoded[start : start + size]]
        trace = run(model, some, taps=list(dict.fromkeys((*reads, *writes))), logits="last")
        real = torch.arange(trace.ids.shape[1])[None] < trace.lengths[:, None].cpu()
        real[:, 0] = False
        x, y = (
            torch.cat([trace[port].flatten(2).cpu()[real].float() for port in ports], 1) for ports in (reads, writes)
        )
        yield list(range(start, start + len(some))), x, y


def everything(model: Model, it: Dictionary, encoded: Sequence[Sequence[int]], size: int) -> tuple[Tensor, Tensor]:
    """What is written and all activations, at all tokens but the first of each text."""
    held = [(y, said(it, x)[1]) for _, x, y in tokens(model, it, encoded, size)]
    return torch.cat([y for y, _ in held]), torch.cat([z for _, z in held])


def look(model: Model, it: Dictionary, encoded: Sequence[Sequence[int]], size: int) -> Seen:
    """The sums of a dictionary on texts."""
    here, sites = it.to("cpu"), len(writes_of(it))
    parts = list(tokens(model, here, encoded, size))
    mean = by_site(here, torch.cat([y for _, _, y in parts])).double().mean(0)  # [site, d]
    above, below = torch.zeros(2, len(encoded), sites, dtype=torch.float64)
    active, on = [], []
    squared = across = 0.0
    for places, x, y in parts:
        found, z = said(here, x)
        rebuilt, written = by_site(here, found).double(), by_site(here, y).double()
        texts = torch.repeat_interleave(torch.tensor(places), torch.tensor([len(encoded[i]) - 1 for i in places]))
        above.index_add_(0, texts, (written - rebuilt).pow(2).sum(2))
        below.index_add_(0, texts, (written - mean).pow(2).sum(2))
        squared += float(rebuilt.pow(2).sum())
        across += float((written * rebuilt).sum())
        active.append((z != 0).sum(1).double())
        on.append((z != 0).any(0))
    weight = below.sum() / below.sum(0).clamp_min(1e-300) / sites
    return Seen(
        (above * weight).sum(1),
        (below * weight).sum(1),
        torch.cat(active),
        torch.stack(on).any(0),
        squared,
        across,
        mean,
    )

"""Diachronic: which words changed between two slices of time, from models that were trained on each alone.

    M_ij = nats per token of slice j under the models of slice i
    change(w) = median over the uses of w in late text of (nats under the early models - nats under the late ones), less the median of words as frequent

The doubt is that of training: two models of one slice differ too. Models of a slice should have read parts of it that share nothing, by seeds of their own, so that
a pair of one slice differs by all that a pair of two does if nothing changed. Their differences, word by word, are the null: its spread within a band of
frequency (1.48 times the median distance from 0) makes z of a change, p is the normal's, two-sided, and q Benjamini and Hochberg's over words. A change is of means
over seeds, the null of single pairs, which makes p too large rather than too small.

Fittschen et al. 2025, "Pretraining Language Models for Diachronic Linguistic Change Discovery". A change of use and a change of sense look the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.corpus.reading import no_text
from patchbay.errors import PatchbayError
from patchbay.model.model import Model
from patchbay.model.run import run

NORMAL = 1.4826  # a normal's deviation over its median distance from the mean


@dataclass(frozen=True)
class Change:
    """A token, its uses in the late text, its change in nats, in deviations of what seeds do, and the doubt."""

    token: int
    uses: int
    change: float
    z: float
    p: float
    q: float


def surprisals(model: Model, texts: Sequence[Any], *, batch_size: int = 32) -> Tensor:
    """- log p of every token but the first of each text, one after another, float64 [token]."""
    ids, found = model.encode(list(no_text(texts))), []
    for i in range(0, len(ids), batch_size):
        some = ids[i : i + batch_size]
        logits = run(model, some).logits
        for row, own in zip(logits, some, strict=True):
            logp = torch.log_softmax(row[: len(own) - 1].double().cpu(), -1)
            found.append(-logp.gather(1, torch.tensor(own[1:])[:, None])[:, 0])
    return torch.cat(found)


def matrix(models: Sequence[Sequence[Model]], texts: Sequence[Sequence[Any]]) -> Tensor:
    """M [slice of models, slice of texts], nats per token, means over the models of a slice."""
    if not models or len(models) != len(texts) or not all(map(len, models)) or not all(map(len, texts)):
        raise PatchbayError(
            f"{len(models)} slices of models and {len(texts)} of texts: as many of both, each with one or more"
        )
    return torch.stack(
        [
            torch.stack([torch.stack([surprisals(one, some).mean() for one in own]).mean() for some in texts])
            for own in models
        ]
    )


def changes(
    early: Sequence[Model], late: Sequence[Model], texts: Sequence[Any], *, least: int = 10, bands: int = 4
) -> list[Change]:
    """What changed, the largest change first, among tokens with `least` uses or more in late texts that no model was trained on.

    `early`, `late`: two models or more of each slice. `bands`: of equally many tokens by how often they are used.
    """
    if min(len(early), len(late)) < 2:
        raise PatchbayError(
            f"{len(early)} early and {len(late)} late models: two or more of each, or what seeds do is not known"
        )
    if len(shapes := {model.vocab_size for model in (*early, *late)}) > 1:
        raise PatchbayError(f"models of {', '.join(map(str, sorted(shapes)))} tokens: one vocabulary for all")
    texts = list(no_text(texts))
    if not texts:
        raise PatchbayError("no late texts to look for changes in")
    used = torch.tensor([token for ids in early[0].encode(texts) for token in ids[1:]])
    nats = [torch.stack([surprisals(model, texts) for model in models]) for models in (early, late)]
    return judged(nats[0], nats[1], used, least=least, bands=bands)


def judged(early: Tensor, late: Tensor, used: Tensor, *, least: int = 10, bands: int = 4) -> list[Change]:
    """The same from nats [model, use] of each slice and the token of each use [use]."""
    tokens, counts = used.unique(return_counts=True)
    kept = counts >= least
    tokens, counts = tokens[kept], counts[kept]
    if len(tokens) < 2 * bands or bands < 1:
        raise PatchbayError(
            f"{len(tokens)} tokens with {least} uses or more, in {bands} bands: two or more in each; give more text, or fewer bands"
        )
    band = torch.empty_like(counts)
    band[counts.argsort(stable=True)] = torch.arange(len(counts)) * bands // len(counts)
    places = [(used == token).nonzero()[:, 0] for token in tokens]

    def by_token(difference: Tensor) -> Tensor:
        found = torch.stack([difference[at].quantile(0.5) for at in places])
        for one in range(bands):
            found[band == one] -= found[band == one].quantile(0.5)
        return found

    change = by_token(early.mean(0) - late.mean(0))
    null = torch.stack(
        [by_token(nats[a] - nats[b]) for nats in (early, late) for a, b in combinations(range(len(nats)), 2)]
    )  # [pair, token]
    scale = torch.stack([NORMAL * null[:, band == one].abs().quantile(0.5) for one in range(bands)])[band]
    z = change / scale.clamp_min(1e-12)
    p = torch.erfc(z.abs() / math.sqrt(2))
    q = maths.benjamini_hochberg(p)
    order = z.abs().argsort(descending=True, stable=True).tolist()
    return [
        Change(int(tokens[i]), int(counts[i]), float(change[i]), float(z[i]), float(p[i]), float(q[i])) for i in order
    ]

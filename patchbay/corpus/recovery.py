"""Recovery (PASER): of a pool of texts, those that bring back what a cut took from a model, by where the cut model departs from the whole one.

    JSD(text) = mean over its places of the Jensen-Shannon divergence of the two next-token distributions, at most ln 2
    budget of a cluster = texts asked * mean JSD there / sum over clusters of their mean JSD;   inside it by JSD / log(tokens)

Clusters are spectral, of the texts' states in the whole model (`corpus.selection.states`): eigenvectors of the symmetric Laplacian
of exp(-d^2 / median d^2), then k-means. Budgets are whole numbers that sum to what is asked (largest remainders); what a cluster has not got goes to the others.
With `concepts` a text is left out whose concepts contradict the pool: two that are each in `least` texts or more and stand together in no other text. That
is asked of the whole pool, so that no order decides.

He et al. 2025, "PASER: Post-Training Data Selection for Efficient Pruned Large Language Model Recovery". Its public code sums divergences over places, so that
long texts win, rounds budgets down, and rejects by order; none of it is here. Budgets as an audit say where a knob or cut changed most, and nothing of why.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from patchbay.corpus.reading import no_text
from patchbay.corpus.selection import states
from patchbay.errors import PatchbayError
from patchbay.model.model import Model
from patchbay.model.run import run

ROUNDING = 1e-12  # nats: a logit in float32 that is off by its last digit differs by less


@dataclass(frozen=True)
class Picked:
    """Places of the texts that were picked, best first within a cluster; the cluster and divergence (nats) of every text; mean divergence and budget by cluster."""

    texts: list[int]
    clusters: list[int]
    divergence: list[float]
    means: list[float]
    budgets: list[int]
    left_out: list[int]


def divergence(model: Model, texts: Sequence[Any], *, cut: Any, batch_size: int = 32) -> Tensor:
    """Mean Jensen-Shannon divergence of the next token of each text, nats, float64 [text]; 0 where the cut changes nothing, at most ln 2.

    `cut`: another model of the same tokens, or the edits or knob that change this one.
    """
    other = isinstance(cut, Model)
    if other and cut.vocab_size != model.vocab_size:
        raise PatchbayError(
            f"the cut model has {cut.vocab_size} tokens, the whole one {model.vocab_size}: their texts are not the same"
        )
    texts = list(no_text(texts))
    ids, found = model.encode(texts) if texts else [], []
    for i in range(0, len(ids), batch_size):
        some = ids[i : i + batch_size]
        whole = run(model, some)
        with contextlib.nullcontext() if other else model.edited(cut):
            changed = run(cut if other else model, some)
        for at, row in enumerate(some):
            p, q = (torch.log_softmax(one.logits[at, : len(row)].double().cpu(), -1) for one in (whole, changed))
            found.append(float(_jsd(p, q).mean()))
    return torch.tensor(found, dtype=torch.float64)


def _jsd(p: Tensor, q: Tensor) -> Tensor:
    """Of log-probabilities [..., vocab]; what is rounding is 0."""
    middle = torch.logaddexp(p, q) - math.log(2)
    terms = [torch.where(one.isneginf(), 0.0, one.exp() * (one - middle)).sum(-1) for one in (p, q)]
    found = (0.5 * (terms[0] + terms[1])).clamp_max(math.log(2))
    return torch.where(found < ROUNDING, 0.0, found)


def clustered(rows: Tensor, k: int) -> list[int]:
    """A cluster for each row of states [text, d], by the symmetric Laplacian; the same for any order of the rows but for names."""
    if not 1 <= k <= len(rows):
        raise PatchbayError(f"{k} clusters of {len(rows)} texts: one or more, and no more than texts")
    squares = torch.cdist(rows.double(), rows.double()).square()
    off = squares[~torch.eye(len(rows), dtype=torch.bool)]
    scale = float(off.median()) if len(off) and float(off.median()) > 0 else 1.0
    near = torch.exp(-squares / scale)
    root = near.sum(1).rsqrt()
    _, vectors = torch.linalg.eigh(torch.eye(len(rows), dtype=torch.float64) - root[:, None] * near * root[None])
    low = torch.nn.functional.normalize(vectors[:, :k], dim=1)
    centres = [
        low[int(near.sum(1).argmax())]
    ]  # the text that most are near to, then the farthest from all that are there
    while len(centres) < k:
        centres.append(low[int(torch.cdist(low, torch.stack(centres)).min(1).values.argmax())])
    middle = torch.stack(centres)
    for _ in range(100):
        mine = torch.cdist(low, middle).argmin(1)
        new = torch.stack([low[mine == i].mean(0) if bool((mine == i).any()) else middle[i] for i in range(k)])
        if torch.equal(new, middle):
            break
        middle = new
    found: list[int] = mine.tolist()
    return found


def budgets(means: Sequence[float], sizes: Sequence[int], n: int) -> list[int]:
    """`n` texts over clusters in proportion to their mean divergence, whole numbers that sum to n and of none more than it has."""
    if not 1 <= n <= sum(sizes):
        raise PatchbayError(f"{n} texts of {sum(sizes)}: one or more, and no more than there are")
    if not any(means):
        raise PatchbayError("the cut changes nothing on these texts: there is nothing to recover")
    found, free = [0] * len(means), [i for i in range(len(means)) if sizes[i]]
    while (left := n - sum(found)) > 0:
        weight = sum(means[i] for i in free)
        wanted = {i: left * means[i] / weight if weight else left / len(free) for i in free}
        full = [i for i in free if found[i] + wanted[i] > sizes[i]]
        if full:  # what they have not got is for the others
            for i in full:
                found[i] = sizes[i]
            free = [i for i in free if i not in full]
            continue
        whole = {i: math.floor(wanted[i]) for i in free}
        rest = left - sum(whole.values())
        order = sorted(free, key=lambda i: (whole[i] - wanted[i], i))
        for i in free:
            found[i] += whole[i]
        for i in [i for i in order if found[i] < sizes[i]][:rest]:
            found[i] += 1
    return found


def contradicting(concepts: Sequence[Iterable[str]], least: int = 3) -> list[int]:
    """Texts that alone bring two concepts together, each of which stands in `least` texts or more."""
    sets = [sorted(set(one)) for one in concepts]
    often = Counter(word for one in sets for word in one)
    known = [[word for word in one if often[word] >= least] for one in sets]
    pairs = Counter(pair for one in known for pair in combinations(one, 2))
    return [i for i, one in enumerate(known) if any(pairs[pair] == 1 for pair in combinations(one, 2))]


def pick(
    model: Model,
    texts: Sequence[Any],
    n: int,
    *,
    cut: Any,
    clusters: int = 8,
    concepts: Callable[[Any], Iterable[str]] | None = None,
    least: int = 3,
) -> Picked:
    """The `n` texts of a pool to train a cut model on.

    `cut`: the cut model, or the edits or knob that make it. `clusters`: kinds of text. `concepts`: what a text speaks of, without which none
    contradicts; `least`: in how many texts a concept is known.
    """
    texts = list(no_text(texts))
    if not texts:
        raise PatchbayError("an empty pool: there are no texts to pick from")
    away = divergence(model, texts, cut=cut)
    mine = clustered(states(model, texts), min(clusters, len(texts)))
    out = contradicting([concepts(text) for text in texts], least) if concepts is not None else []
    tokens = [len(ids) for ids in model.encode(texts)]
    names, gone = range(max(mine) + 1), set(out)
    members = [[i for i, own in enumerate(mine) if own == name and i not in gone] for name in names]
    means = [float(away[some].mean()) if some else 0.0 for some in members]
    shares = budgets(means, [len(some) for some in members], n)
    order = [sorted(some, key=lambda i: (-float(away[i]) / math.log(tokens[i] + 1), i)) for some in members]
    chosen = [i for some, share in zip(order, shares, strict=True) for i in some[:share]]
    return Picked(chosen, mine, away.tolist(), means, shares, out)

"""What the features of a dictionary are worth where the truth is known: planted directions, labels of texts, concepts of tokens.

recovered   C = cosines of planted directions with decoder rows [direction, feature]. best: mean of the largest of each direction (MMCS; features
            serve twice, so chance is high); matched: mean under the best one-to-one matching (Hungarian); found: share of matched above 0.9;
            support: F1 of "the matched feature is active" for "the direction is in the signal", over tokens
probed      mean activations of each text; the k features with the largest difference of class means on one half of the texts, logistic
            regression on them, balanced accuracy on the other half, the mean over classes; beside the same of the signal's own numbers
absorbed    of tokens of a concept: the share of what says the concept that stands in other features than its main ones (1.8 below)

Absorption as in Karvonen et al. 2025, "SAEBench": the main features of a concept are those that a k-sparse probe takes, k growing while its F1
rises by more than 0.03; at a token where they say little, other features of cosine 0.1 and more to the concept's probe may say it instead:
o / (o + m), m and o what the main ones and the three largest others add along the probe, o no more than the rest of what the signal has there;
1 where the main ones add nothing, 0 where they say all, or the others less than 0.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patchbay.signal.port import PatchbayError

FOUND = 0.9  # the cosine from which two directions are one
SPARSE = (1, 2, 5)
RISE, MOST = 0.03, 10  # of F1, for one more main feature, and how many there may be
NEAR, SAYS, OTHERS = 0.1, 0.4, 3


def unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.double(), dim=-1)


# --- planted directions --------------------------------------------------------------------------------------


def matching(cosines: Tensor) -> tuple[Tensor, Tensor]:
    """The one-to-one matching of rows with columns that has the largest sum: places of both."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:  # an extra
        raise PatchbayError("directions are matched one to one by scipy: pip install scipy") from error
    rows, columns = linear_sum_assignment(-cosines.cpu().numpy())
    return torch.as_tensor(rows), torch.as_tensor(columns)


def recovered(rows: Tensor, truth: Tensor, on: Tensor | None = None, present: Tensor | None = None) -> dict[str, float]:
    """How planted directions [direction, d] stand in decoder rows [feature, d]; `on` [token, feature] and `present` [token, direction], bool."""
    cosines = unit(truth) @ unit(rows).T
    direction, feature = matching(cosines)
    matched = cosines[direction, feature]
    found = {
        "best": float(cosines.amax(1).mean()),
        "matched": float(matched.sum() / len(truth)),
        "found": float((matched > FOUND).sum() / len(truth)),
    }
    if on is not None and present is not None:
        a, b = on[:, feature], present[:, direction]
        both, either = (a & b).sum(0).double(), (a.sum(0) + b.sum(0)).double()
        scores = torch.where(either > 0, 2 * both / either, torch.nan)
        found["support"] = float(scores.nanmean())
    return found


# --- labels of texts -----------------------------------------------------------------------------------------


def logistic(x: Tensor, y: Tensor, ridge: float = 1e-2, steps: int = 30) -> Tensor:
    """Weights [k + 1] of a logistic regression of y (0 or 1) on standardised x [item, k], the last of the constant, by Newton's steps."""
    x = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)
    w = torch.zeros(x.shape[1], dtype=x.dtype)
    penalty = torch.full_like(w, ridge * len(x)).diag()
    penalty[-1, -1] = 1e-6
    for _ in range(steps):
        p = (x @ w).sigmoid()
        hessian = (x * (p * (1 - p))[:, None]).T @ x + penalty
        w = w - torch.linalg.solve(hessian, x.T @ (p - y) + penalty @ w)
    return w


def sparse(x: Tensor, y: Tensor, k: int) -> Tensor:
    """The k columns whose class means differ most, in standard deviations of all items."""
    gap = (x[y].mean(0) - x[~y].mean(0)).abs()
    return gap.topk(min(k, x.shape[1])).indices


def says(x: Tensor, train: Tensor, y: Tensor, k: int) -> Tensor:
    """What a k-sparse probe that was fitted on the items `train` says of all items, bool."""
    columns = sparse(x[train], y[train], k)
    some = x[:, columns].double()
    mean, spread = some[train].mean(0), some[train].std(0).clamp_min(1e-9)
    w = logistic((some[train] - mean) / spread, y[train].double())
    return ((some - mean) / spread) @ w[:-1] + w[-1] > 0


def probed(x: Tensor, labels: Sequence[Any], seed: int, ks: Sequence[int] = SPARSE) -> Tensor:
    """Balanced accuracy [k] on the half of the items that chose nothing, mean over classes that both halves have."""
    draw = torch.Generator().manual_seed(seed)
    train = torch.zeros(len(x), dtype=torch.bool)
    for name in dict.fromkeys(labels):  # half of each class
        here = torch.tensor([i for i, label in enumerate(labels) if label == name])
        train[here[torch.randperm(len(here), generator=draw)[: (len(here) + 1) // 2]]] = True
    scores = []
    for name in dict.fromkeys(labels):
        y = torch.tensor([label == name for label in labels])
        if min(int((y & train).sum()), int((y & ~train).sum()), int((~y & train).sum()), int((~y & ~train).sum())) < 1:
            continue
        guess = [says(x, train, y, k)[~train] for k in ks]
        scores.append([float((g[y[~train]].double().mean() + (~g[~y[~train]]).double().mean()) / 2) for g in guess])
    if not scores:
        raise PatchbayError(
            "labels: no class has two texts or more beside two of others, so that none is left to be told"
        )
    return torch.tensor(scores, dtype=torch.float64).mean(0)


# --- concepts of tokens --------------------------------------------------------------------------------------


def f1(guess: Tensor, y: Tensor) -> float:
    both = float((guess & y).sum())
    total = float(guess.sum() + y.sum())
    return 2 * both / total if total else 0.0


def main_features(z: Tensor, train: Tensor, y: Tensor) -> Tensor:
    """The features of a k-sparse probe of a concept, k growing while its F1 on the items `train` rises."""
    best = f1(says(z, train, y, 1)[train], y[train])
    k = 1
    while k < min(MOST, z.shape[1]):
        score = f1(says(z, train, y, k + 1)[train], y[train])
        if score - best <= RISE:
            break
        k, best = k + 1, score
    return sparse(z[train], y[train], k)


def absorbed(x: Tensor, z: Tensor, rows: Tensor, y: Tensor, seed: int) -> float:
    """Mean absorbed fraction of a concept (bool [token]) over its held-out tokens that the probe of the signal tells; NaN where there are none.

    `x` [token, d] the signal less its mean, `z` [token, feature], `rows` [feature, d].
    """
    x, train = x.double(), torch.zeros(len(x), dtype=torch.bool)
    train[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: len(x) // 2]] = True
    if min(int((y & train).sum()), int((~y & train).sum())) < 2:
        return float("nan")
    mean, spread = x[train].mean(0), x[train].std(0).clamp_min(1e-9)
    w = logistic((x[train] - mean) / spread, y[train].double())
    told = ((x - mean) / spread) @ w[:-1] + w[-1] > 0
    direction = unit(w[:-1] / spread)
    if float((x[train & y].mean(0) - x[train & ~y].mean(0)) @ direction) < 0:
        direction = -direction
    along = rows.double() @ direction  # what an activation of 1 adds
    main = main_features(z, train, y)
    near = unit(rows) @ direction >= NEAR
    near[main] = False
    asked = y & told & ~train
    if not bool(asked.any()):
        return float("nan")
    added = z[asked].double() * along
    own = added[:, main].sum(1)
    other = torch.where(near, added, 0.0).clamp_min(0).topk(min(OTHERS, len(rows)), dim=1).values.sum(1)
    whole = x[asked].double() @ direction
    return float(fraction(own, other, whole).mean())


def fraction(own: Tensor, other: Tensor, whole: Tensor) -> Tensor:
    """The absorbed share of each token, of what its main features, others and the signal say along the probe."""
    rest = torch.minimum(other, whole - own)
    share = rest / (rest + own)
    share = torch.where(own <= 0, 1.0, share)
    silent = (own >= whole) | (other < SAYS * whole)
    return torch.where(silent, 0.0, share).clamp(0.0, 1.0)

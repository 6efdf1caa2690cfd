"""Linear probes by cross-validation: many logistic regressions on the same states at once, solved to the optimum.

Every problem has its own labels and its own training prompts and shares the states x [prompt, d]. Its objective,

    sum over training prompts of the cross-entropy of softmax(x W + b)  +  PENALTY / 2 |W|^2        (b is free)

is convex, so the optimum is the only one; it lies in the span of the states, so the solver works there: the singular
directions of x, each stretched by its share of the curvature, all problems side by side in one L-BFGS.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from patchbay import maths
from patchbay.signal.port import PatchbayError

PENALTY = 1.0
TOLERANCE, ROUGH = 1e-7, 1e-3  # largest entry of the stretched gradient at the end, in nats; for nulls
STEPS = 400


class Logistic(NamedTuple):
    """Weights [problem, d, class], intercepts [problem, class], and the largest entry of the objective's gradient."""

    weights: Tensor
    intercepts: Tensor
    gradient: float


def scaled(x: Tensor) -> Tensor:
    """States [prompt, d] without their mean and with mean squared norm d: unchanged, but for a turn, when x is turned."""
    centred = x.double() - x.double().mean(0)
    size = centred.square().mean().sqrt()
    return centred / size if size > 0 else centred


def logistic(
    x: Tensor, labels: Tensor, train: Tensor, *, penalty: float = PENALTY, tolerance: float = TOLERANCE
) -> Logistic:
    """Fit every problem: x [prompt, d], labels [problem, prompt] from 0, train [problem, prompt] bool."""
    x, n_classes = x.double(), int(labels.max()) + 1
    target = torch.nn.functional.one_hot(labels, n_classes).double()  # [problem, prompt, class]
    mask = train.double()[..., None]
    u, size, basis = torch.linalg.svd(x, full_matrices=False)  # [prompt, r], [r], [r, d]
    share = float(train.double().mean())
    stretch = 1.0 / (share * size.square() / 4.0 + penalty).sqrt()  # [r]: near the curvature's inverse root
    seen = (u * size) * stretch  # [prompt, r]
    free = (4.0 / (share * len(x))) ** 0.5  # the same for the intercepts
    weights = torch.zeros(len(labels), len(size), n_classes, dtype=torch.float64)  # [problem, r, class]
    shift = torch.zeros(len(labels), n_classes, dtype=torch.float64)

    def slope() -> tuple[Tensor, Tensor, Tensor]:
        """The objective summed over problems, and its gradient in the stretched weights and intercepts."""
        scores = seen @ weights + free * shift[:, None]  # [problem, prompt, class]
        likely = scores.log_softmax(-1)
        real = stretch[:, None] * weights  # in the singular directions
        wrong = (likely.exp() - target) * mask
        loss = -(likely * target * mask).sum() + penalty / 2.0 * real.square().sum()
        return loss, seen.T @ wrong + penalty * stretch[:, None] * real, free * wrong.sum(1)

    optimiser = torch.optim.LBFGS(
        [weights, shift],
        max_iter=STEPS,
        tolerance_grad=tolerance,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        loss, weights.grad, shift.grad = slope()
        return loss

    optimiser.step(closure)  # type: ignore[arg-type]
    _, by_weight, by_shift = slope()
    steepest = max(float((by_weight / stretch[:, None]).abs().max()), float((by_shift / free).abs().max()))
    return Logistic(basis.T @ (stretch[:, None] * weights), free * shift, steepest)


def stratified(labels: Tensor, folds: int, seed: int) -> Tensor:
    """A fold 0..folds-1 for each prompt, each class spread evenly over them: [prompt]."""
    counts = torch.bincount(labels)
    if folds < 2 or int(counts.min()) < folds:
        raise PatchbayError(
            f"folds={folds}: at least 2, and each class needs as many prompts; the classes have {counts.tolist()}"
        )
    generator = torch.Generator().manual_seed(seed)
    fold = torch.empty(len(labels), dtype=torch.int64)
    start = 0
    for label in range(len(counts)):
        members = (labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        fold[members] = (start + torch.arange(len(members))) % folds
        start += len(members)
    return fold


def held_out_scores(x: Tensor, labels: Tensor, folds: Tensor) -> Tensor:
    """Log-probabilities of the classes for each prompt by the probe that did not see it, for several labellings at once.

    labels and folds [problem, prompt]; every fold of every problem is a regression of its own. The first is solved to the
    optimum, the others, which make up the null, until predictions no longer move. [problem, prompt, class]
    """
    n_folds = int(folds.max()) + 1
    out = torch.empty(*labels.shape, int(labels.max()) + 1, dtype=torch.float64)
    for fold in range(n_folds):
        held = folds == fold  # [problem, prompt]
        for some, tolerance in ((slice(0, 1), TOLERANCE), (slice(1, None), ROUGH)):
            if len(labels[some]):
                fit = logistic(x, labels[some], ~held[some], tolerance=tolerance)
                likely = (x @ fit.weights + fit.intercepts[:, None]).log_softmax(-1)
                out[some][held[some]] = likely[held[some]]
    return out


def auc(scores: Tensor, positive: Tensor) -> float:
    """Chance that a positive scores above a negative, ties half: scores [prompt], positive [prompt] bool."""
    ranks = maths.mean_ranks(scores)
    n, m = int(positive.sum()), int((~positive).sum())
    return float((ranks[positive].sum() - n * (n - 1) / 2.0) / (n * m)) if n and m else float("nan")

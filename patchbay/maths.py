"""What two methods share: answer metrics, directions, intervals and tests. Pure functions of tensors.

Metrics read logits [prompt, vocab] and give one number per prompt, computed in float32 or better whatever the dtype.
Units: `logit_diff` in logits, `log_probability` and `kl` in nats, `probability` and `accuracy` in [0, 1], `rank` in
places. Intervals are percentile bootstraps over prompts and tests are paired sign flips: both say how sure the mean is
for prompts drawn like these, and nothing of other prompts, other wordings or other models. Every draw comes from a
generator of its own, so the same seed gives the same number and the global random state is never touched.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchbay.errors import PatchbayError

Logits = Float[Tensor, "prompt vocab"]
PerPrompt = Float[Tensor, " prompt"]
Answers = Int[Tensor, " prompt"]
ManyAnswers = Int[Tensor, " prompt"] | Int[Tensor, "prompt n_wrong"]
ROOM = 2**22  # numbers held at a time
TIES = 1e-6  # of their size: sums of float32 in another order still count as equal


class Interval(NamedTuple):
    """A mean and the ends of its interval."""

    mean: float
    low: float
    high: float


# --- metrics --------------------------------------------------------------------------------------


def logit_diff(logits: Logits, right: Answers, wrong: ManyAnswers) -> PerPrompt:
    """The right token's logit minus the MEAN of the wrong tokens' logits, in logits. A wrong id of -1 is padding."""
    logits = _checked(logits, right)
    ids, real = _wrong(logits, wrong)
    values = logits.gather(1, ids).masked_fill(~real, 0.0)  # [prompt, n_wrong]
    return _at(logits, right) - values.sum(dim=1) / real.sum(dim=1)


def logit_diff_best(logits: Logits, right: Answers, wrong: ManyAnswers) -> PerPrompt:
    """The right token's logit minus the HIGHEST of the wrong tokens' logits, in logits. A wrong id of -1 is padding."""
    logits = _checked(logits, right)
    ids, real = _wrong(logits, wrong)
    return _at(logits, right) - logits.gather(1, ids).masked_fill(~real, -torch.inf).amax(dim=1)


def log_probability(logits: Logits, right: Answers) -> PerPrompt:
    """Log of the softmax probability of the right token, in nats (0 at best)."""
    return _at(_checked(logits, right).log_softmax(dim=-1), right)


def probability(logits: Logits, right: Answers) -> PerPrompt:
    """Softmax probability of the right token, in [0, 1]."""
    return log_probability(logits, right).exp()


def rank(logits: Logits, right: Answers) -> Int[Tensor, " prompt"]:
    """How many other tokens are not below the right one: 0 is the top.

    Ties count against the right token (equal logits for all of the vocabulary give the last place), and so does NaN.
    """
    logits = _checked(logits, right)
    below = logits < _at(logits, right)[:, None]  # [prompt, vocab]; the right token itself is never below
    return logits.shape[1] - 1 - below.sum(dim=1)


def accuracy(logits: Logits, right: Answers, wrong: ManyAnswers | None = None) -> PerPrompt:
    """1.0 where the right token beats every wrong one, else 0.0 (a tie loses); without `wrong`, every other token."""
    logits = _checked(logits, right)
    if wrong is None:
        return (rank(logits, right) == 0).to(logits.dtype)
    ids, real = _wrong(logits, wrong)
    beaten = logits.gather(1, ids) < _at(logits, right)[:, None]  # [prompt, n_wrong]
    return (beaten | ~real).all(dim=1).to(logits.dtype)


def kl(logits_p: Logits, logits_q: Logits) -> PerPrompt:
    """Kullback-Leibler divergence KL(p || q) in nats, p and q the softmaxes of the two; 0 where they are equal.

    A token that p gives no probability adds nothing; one that p gives some and q none makes the divergence infinite.
    """
    if logits_p.shape != logits_q.shape:
        raise PatchbayError(f"kl needs two equal shapes, got {tuple(logits_p.shape)} and {tuple(logits_q.shape)}")
    log_p, log_q = _precise(logits_p).log_softmax(dim=-1), _precise(logits_q).log_softmax(dim=-1)
    none = log_p == -torch.inf
    difference = log_p.masked_fill(none, 0.0) - log_q.masked_fill(none, 0.0)
    return (log_p.exp() * difference).sum(dim=-1).clamp_min(0.0)  # rounding may leave -1e-8


# --- directions -----------------------------------------------------------------------------------


def cosine(a: Float[Tensor, "*batch d"], b: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    """Cosine of the angle between vectors on the last axis; the other axes broadcast. A zero vector has none: NaN."""
    a, b = _precise(a), _precise(b)
    a, b = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)  # one by one: no overflow in a product
    return (a * b).sum(dim=-1).clamp(-1.0, 1.0)


def orthonormal(basis: Float[Tensor, "n d"]) -> Float[Tensor, "rank d"]:
    """Orthonormal rows that span what the rows of `basis` span. Dependent rows are no trouble: rank may be below n."""
    rows: Tensor
    _, sizes, rows = torch.linalg.svd(_precise(basis), full_matrices=False)
    if len(sizes):
        rows = rows[sizes > sizes[0] * max(basis.shape) * torch.finfo(sizes.dtype).eps]
    return rows


def project(x: Float[Tensor, "*batch d"], basis: Float[Tensor, "n d"]) -> Float[Tensor, "*batch d"]:
    """The component of x inside the span of the rows of `basis`, which need be neither orthogonal nor independent.

    `x - project(x, basis)` is the component outside.
    """
    if basis.ndim == 1:
        basis = basis[None]
    if basis.ndim != 2 or x.shape[-1] != basis.shape[-1]:
        raise PatchbayError(
            f"project needs x [..., d] and basis [n, d] of one width d, got {tuple(x.shape)} and {tuple(basis.shape)}"
        )
    rows = orthonormal(basis)  # [rank, d]
    return ((_precise(x) @ rows.T) @ rows).to(x.dtype)


# --- intervals and tests --------------------------------------------------------------------------


def bootstrap_interval(
    values: Float[Tensor, " prompt"], *, n: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of the values and its percentile bootstrap interval: `n` draws of the values with replacement.

    One value alone has a mean and no interval: its low and high are NaN. NaN among the values makes all three NaN.
    """
    values = _values(values)
    if not 0.0 < level < 1.0 or n < 1:
        raise PatchbayError(f"an interval needs 0 < level < 1 and n >= 1, got level={level} and n={n}")
    mean = values.mean().item()
    if len(values) == 1 or mean != mean:
        return Interval(mean, float("nan"), float("nan"))
    generator = torch.Generator().manual_seed(seed)
    block = max(1, 2**22 // len(values))  # at most 32 MiB of drawn indices at a time
    means = [
        values[torch.randint(len(values), (min(block, n - done), len(values)), generator=generator)].mean(dim=1)
        for done in range(0, n, block)
    ]
    tail = (1.0 - level) / 2.0
    low, high = torch.quantile(torch.cat(means), torch.tensor([tail, 1.0 - tail], dtype=torch.float64)).tolist()
    return Interval(mean, low, high)


def paired_interval(
    a: Float[Tensor, " prompt"], b: Float[Tensor, " prompt"], *, n: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of a - b, prompt by prompt, and its bootstrap interval."""
    return bootstrap_interval(_difference(a, b), n=n, level=level, seed=seed)


def beyond_draws(
    own: Float[Tensor, " prompt"],
    drawn: Float[Tensor, "draw prompt"],
    *,
    n: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean of own - drawn over prompts and draws, with the ends between which it lies against one more random draw.

    The draws' means vary about theirs as Student's t with draws - 1 degrees of freedom says of one that was not made, be they many or
    three; prompts are drawn anew for what of own they add to that. Of normal draws it holds the truth in 95 of 100, whatever their number;
    it is wide where they are few (of two useless: 12.7 spreads). One draw alone says nothing of others: NaN ends.
    """
    own, drawn = _values(own), torch.as_tensor(drawn).detach().double().cpu()
    if drawn.ndim != 2 or drawn.shape[1:] != own.shape:
        shapes = f"{tuple(drawn.shape)} and {tuple(own.shape)}"
        raise PatchbayError(f"draws are [draw, prompt] beside [prompt], got {shapes}")
    gap = own - drawn.mean(0)  # [prompt]
    mean, count, draws = gap.mean().item(), len(own), len(drawn)
    if draws < 2 or count < 2 or mean != mean:
        return Interval(mean, float("nan"), float("nan"))
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(count, (n, count), generator=generator)
    means, more = drawn.mean(1), 1.0 + 1.0 / draws  # more: one more draw, against a mean of draws
    noise = (drawn - drawn.mean(0) - (means - means.mean())[:, None]).square().sum() / ((draws - 1) * (count - 1))
    left = (1.0 - more * noise / gap.var().clamp_min(1e-300)).clamp(0.0, 1.0)  # the rest is in the spread of means too
    t = _students(min(draws, 200))
    by_prompts = ((gap[prompts].mean(1) - mean) * left.sqrt())[torch.arange(len(t)) % n]
    ends = torch.tensor([0.5 - level / 2.0, 0.5 + level / 2.0], dtype=torch.float64)
    low, high = torch.quantile(mean + by_prompts + means.std() * more**0.5 * t, ends).tolist()
    return Interval(mean, low, high)


@functools.cache
def _students(draws: int) -> Tensor:
    """10,000 numbers that lie as Student's t with draws - 1 degrees of freedom does, in no order; the same in every call."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(100_000, draws, generator=generator, dtype=torch.float64)
    t = (z[:, 0].abs() / z[:, 1:].square().mean(1).sqrt()).sort().values[10::20]
    return torch.cat([t, -t])[torch.randperm(2 * len(t), generator=generator)]


def draws_p(own: float, drawn: Float[Tensor, " draw"], *, two_sided: bool = False) -> float:
    """p that a random draw is as high as `own` (two-sided: as large), (1 + hits) / (1 + draws): at least 1 / (1 + draws)."""
    drawn = _values(drawn)
    found, drawn = (abs(own), drawn.abs()) if two_sided else (own, drawn)
    slack = TIES * max(abs(found), float(drawn.abs().max()))
    return (1 + int((drawn >= found - slack).sum())) / (1 + len(drawn))


def permutation_p(a: Float[Tensor, " prompt"], b: Float[Tensor, " prompt"], *, n: int = 10_000, seed: int = 0) -> float:
    """Two-sided p value that the mean of a - b is 0, by flipping the sign of each prompt's difference, as `sign_flip_p`.

    Exact (every pattern of signs) when there are at most `n` patterns; else `n` random ones, p = (1 + hits) / (1 + n). One
    prompt has no p: NaN, nor has a list that lacks a value.
    """
    difference = _difference(a, b)
    return float("nan") if difference.isnan().any() else float(sign_flip_p(difference[:, None], n=n, seed=seed))


def benjamini_hochberg(p: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """p values adjusted for how many were tested: keeping those <= q holds the expected share of false finds to q.

    NaN (a part that was not tested) stays NaN and is not counted.
    """
    flat = torch.as_tensor(p).double().flatten()
    tested = ~flat.isnan()
    if ((flat[tested] < 0) | (flat[tested] > 1)).any():
        raise PatchbayError("p values lie in [0, 1]; got some outside")
    ordered, order = flat[tested].sort()
    count = len(ordered)
    scaled = ordered * count / torch.arange(1, count + 1)
    lowest_above = scaled.flip(0).cummin(0).values.flip(0).clamp_max(1.0) if count else scaled
    adjusted = torch.empty_like(ordered)
    adjusted[order] = lowest_above
    result = flat.clone()
    result[tested] = adjusted
    return result.reshape(torch.as_tensor(p).shape)


def between(low: float, high: float, form: str = ".3g", said: str = "95 % ") -> str:
    """` (95 % 1.2 to 3.4)`, as a sentence goes on after a mean; nothing where there is no interval, as of one prompt."""
    return "" if low != low or high != high else f" ({said}{low:{form}} to {high:{form}})"


def clear(adjusted: Tensor, what: str = "cells") -> str:
    """`3 of 12 cells at adjusted p <= 0.05`; nothing where none could be tested, as of one prompt."""
    tested = int((~adjusted.isnan()).sum())
    return f"{int((adjusted <= 0.05).sum())} of {tested} {what} at adjusted p <= 0.05" if tested else ""


def mean_ranks(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Ranks from 0 [n], float64; equal values share the mean of theirs."""
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - (counts.double() + 1.0) / 2.0)[place]  # type: ignore[no-any-return]


def spearman(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    """Spearman's rank correlation, in [-1, 1]; equal values share their mean rank. NaN when either is constant."""
    a, b = _values(a), _values(b)
    if len(a) != len(b):
        raise PatchbayError(f"spearman needs two equal lengths, got {len(a)} and {len(b)}")
    if a.isnan().any() or b.isnan().any():
        return float("nan")
    ranks_a, ranks_b = (mean_ranks(x) - (len(x) - 1) / 2 for x in (a, b))  # less their mean, which ties leave as it is
    scale = (ranks_a.norm() * ranks_b.norm()).item()
    return max(-1.0, min(1.0, (ranks_a @ ranks_b).item() / scale)) if scale else float("nan")


def spearman_of_deals(a: Float[Tensor, " n"], b: Float[Tensor, " n"], deals: Tensor) -> Tensor:
    """`spearman(a, b[deal])` for each deal [draw, n], a permutation of the places of b; each side is ranked once."""
    ranks_a, ranks_b = (mean_ranks(_values(x)) - (len(x) - 1) / 2 for x in (a, b))
    return (ranks_b[deals] @ ranks_a / (ranks_a.norm() * ranks_b.norm())).clamp(-1.0, 1.0)


# --- many cells at once -----------------------------------------------------------------------------


def intervals(
    values: Tensor, over: Tensor | None = None, *, n: int = 2000, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, low and high [*cell] of values [prompt, *cell], cell by cell what `bootstrap_interval` gives.

    With `over` [prompt], mean(values) / mean(over) each time: numerator and denominator are drawn together.
    NaN where no prompt has a value; low and high also where only one has. A mean of 0 below gives NaN.
    """
    count, shape = len(values), values.shape[1:]
    flat = values.detach().double().cpu().reshape(count, -1)  # [prompt, cell]
    below = torch.ones(count, dtype=torch.float64) if over is None else over.detach().double().cpu()
    drawn = torch.randint(count, (n, count), generator=torch.Generator().manual_seed(seed))
    times = torch.zeros(n, count, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(n, count, dtype=torch.float64))
    once = torch.ones(1, count, dtype=torch.float64)
    step = max(1, ROOM // n)
    means, ends = [], []
    for start in range(0, flat.shape[1], step):
        piece = flat[:, start : start + step]
        means.append(_ratio(once, piece, below)[0])
        ends.append(
            torch.nanquantile(_ratio(times, piece, below), torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
        )
    low, high = torch.cat(ends, 1) if ends else flat.new_zeros(2, 0)
    alone = (~flat.isnan()).sum(0) < 2  # drawn anew it is always itself: ends that say nothing
    low, high = low.masked_fill(alone, torch.nan), high.masked_fill(alone, torch.nan)
    mean = torch.cat(means) if means else flat.new_zeros(0)
    return mean.reshape(shape), low.reshape(shape), high.reshape(shape)


def _ratio(times: Tensor, values: Tensor, below: Tensor) -> Tensor:
    """Weighted sums of values over those of `below`, [draw, cell]; prompts without a value count on neither side."""
    has = (~values.isnan()).double()
    bottom = times @ (has * below[:, None])
    return (times @ values.nan_to_num(0.0)) / torch.where(bottom == 0, torch.nan, bottom)


def sign_flip_p(values: Tensor, *, floor: float = 0.0, n: int = 10_000, seed: int = 0) -> Tensor:
    """Two-sided p [*cell] that the mean of values [prompt, *cell] is 0, by flipping signs prompt by prompt.

    Values no larger than `floor` are rounding and count as 0. Exact up to `n` patterns of signs, else sampled as in
    `permutation_p`. Prompts without a value (NaN) do not count; a cell that fewer than two have has no p: NaN.
    """
    count, shape = len(values), values.shape[1:]
    flat = values.detach().double().cpu().reshape(count, -1)
    empty = (~flat.isnan()).sum(0) < 2
    flat = flat.nan_to_num(0.0)
    flat = torch.where(flat.abs() <= floor, 0.0, flat)
    if 2**count <= n:
        signs = 1.0 - 2.0 * ((torch.arange(2**count)[:, None] >> torch.arange(count)) & 1).double()  # [pattern, prompt]
    else:
        generator = torch.Generator().manual_seed(seed)
        signs = 1.0 - 2.0 * torch.randint(2, (n, count), generator=generator).double()
    observed = flat.sum(0).abs() - TIES * flat.abs().sum(0)
    step = max(1, ROOM // len(signs))
    hits = [
        ((signs @ flat[:, i : i + step]).abs() >= observed[i : i + step]).sum(0) for i in range(0, flat.shape[1], step)
    ]
    found = torch.cat(hits).double() if hits else flat.new_zeros(0)
    p = found / len(signs) if 2**count <= n else (1 + found) / (1 + n)
    return p.masked_fill(empty, torch.nan).reshape(shape)


# --- shared checks --------------------------------------------------------------------------------


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _checked(logits: Tensor, right: Tensor) -> Tensor:
    """Logits in float32 or better, after checking that `right` names one token of the vocabulary per prompt."""
    if logits.ndim != 2 or right.shape != logits.shape[:1]:
        raise PatchbayError(
            "a metric needs logits [prompt, vocab] and right [prompt], "
            f"got {tuple(logits.shape)} and {tuple(right.shape)}"
        )
    if right.numel() and not (int(right.min()) >= 0 and int(right.max()) < logits.shape[1]):
        raise PatchbayError(
            f"right answers lie in 0..{logits.shape[1] - 1}, got {int(right.min())}..{int(right.max())}"
        )
    return _precise(logits)


def _at(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.gather(1, ids.to(logits.device)[:, None])[:, 0]


def _wrong(logits: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor]:
    """Wrong ids as [prompt, n_wrong] with padding moved to token 0, and which of them are real."""
    ids = (wrong[:, None] if wrong.ndim == 1 else wrong).to(logits.device)
    if ids.ndim != 2 or len(ids) != len(logits):
        raise PatchbayError(
            f"wrong answers are [prompt] or [prompt, n_wrong] for {len(logits)} prompts, got {tuple(wrong.shape)}"
        )
    real = ids >= 0
    if not bool(real.any(dim=1).all()):
        raise PatchbayError(
            f"prompt {int((~real.any(dim=1)).nonzero()[0])} has no wrong answer; every prompt needs one"
        )
    if int(ids.max()) >= logits.shape[1]:
        raise PatchbayError(f"wrong answers lie below {logits.shape[1]} (or are -1), got {int(ids.max())}")
    return ids.clamp_min(0), real


def _values(values: Tensor) -> Tensor:
    values = torch.as_tensor(values).detach().double().cpu()
    if values.ndim != 1 or not len(values):
        raise PatchbayError(f"expected a list of at least one value, got shape {tuple(values.shape)}")
    return values


def _difference(a: Tensor, b: Tensor) -> Tensor:
    a, b = _values(a), _values(b)
    if len(a) != len(b):
        raise PatchbayError(f"a paired comparison needs one value of each per prompt, got {len(a)} and {len(b)}")
    return a - b

"""The mixture of mechanisms as a function, and its fit: many fits at once, side by side on one leading axis.

    logits(a) = w exp(-(a - p)^2 / (2 sigma(p)^2)) + g_k[k] 1{a = k} + g_i[i] 1{a = i},   sigma(p) = s0 + s1 p/P + s2 (p/P)^2

for candidates a = 0..P-1. A cell is one (p, k, i) with the distribution observed there. Adam acts on each number by
itself, so fits that share nothing but the step count are independent; each keeps the parameters of its own best
validation loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LEARNING_RATE = 5e-2
PATIENCE, TOLERANCE = 100, 1e-7  # steps without an improvement of this size in any fit, then all stop
LEAST_VARIANCE = 1e-4  # keeps sigma off 0
TERMS = {  # which of the positional, lexical and reflexive terms are there
    "full": (True, True, True),
    "without positional": (False, True, True),
    "without lexical": (True, False, True),
    "without reflexive": (True, True, False),
    "positional alone": (True, False, False),
    "lexical alone": (False, True, False),
    "reflexive alone": (False, False, True),
    "uniform": (False, False, False),
}


class Mixture(NamedTuple):
    """Parameters of fits: weight [fit], sigma coefficients [fit, 3], gates by place [fit, token]."""

    weight: Tensor
    width: Tensor
    lexical: Tensor
    reflexive: Tensor


def start(n_fits: int, n_tokens: int) -> Mixture:
    """w = 1, sigma = 1, gates 0: every term has a gradient there."""
    width = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).repeat(n_fits, 1)
    gates = torch.zeros(2, n_fits, n_tokens, dtype=torch.float64)
    return Mixture(torch.ones(n_fits, dtype=torch.float64), width, gates[0].clone(), gates[1].clone())


def sigma(mixture: Mixture, places: Tensor) -> Tensor:
    """sigma(p) of each fit at its places [fit, place]; the sign means nothing."""
    x = places.double() / mixture.lexical.shape[-1]
    s0, s1, s2 = mixture.width[:, None].unbind(-1)  # [fit, 1]
    return s0 + s1 * x + s2 * x * x


def log_predicted(mixture: Mixture, labels: Tensor, terms: Tensor) -> Tensor:
    """Log-probabilities [fit, cell, token]. labels [fit, cell, 3]: p, k, i. terms [fit, 3]: 1 where a term is there."""
    n_tokens = mixture.lexical.shape[-1]
    place = torch.arange(n_tokens)
    p, k, i = labels.unbind(-1)  # [fit, cell]
    variance = sigma(mixture, p).square() + LEAST_VARIANCE
    bump = torch.exp(-(place - p[..., None]).square() / (2.0 * variance[..., None]))  # [fit, cell, token]
    positional = mixture.weight[:, None, None] * bump
    lexical = mixture.lexical.gather(1, k)[..., None] * (place == k[..., None])
    reflexive = mixture.reflexive.gather(1, i)[..., None] * (place == i[..., None])
    there = terms.double()[:, :, None, None]
    logits = there[:, 0] * positional + there[:, 1] * lexical + there[:, 2] * reflexive
    return logits.log_softmax(-1)


def jensen_shannon(observed: Tensor, log_q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in bits (0 to 1) over the last axis."""
    q = log_q.exp()
    log_m = torch.log((observed + q) / 2.0)
    first = (torch.xlogy(observed, observed) - observed * log_m).sum(-1)
    second = (q * (log_q - log_m)).sum(-1)
    return (first + second).clamp_min(0.0) / (2.0 * torch.log(torch.tensor(2.0, dtype=torch.float64)))


def kullback_leibler(observed: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(observed || predicted) and KL(predicted || observed) in nats, over the last axis."""
    log_p = observed.clamp_min(1e-300).log()
    forward = (torch.xlogy(observed, observed) - observed * log_q).sum(-1)
    return forward.clamp_min(0.0), (log_q.exp() * (log_q - log_p)).sum(-1).clamp_min(0.0)


def fit(
    observed: Tensor, labels: Tensor, terms: Tensor, train: Tensor, valid: Tensor, steps: int
) -> tuple[Mixture, int]:
    """The best mixture of each fit and the steps made. observed [fit, cell, token]; train and valid: indices of cells."""
    with torch.enable_grad():
        now = Mixture(*(tensor.requires_grad_() for tensor in start(len(observed), observed.shape[-1])))
        optimiser = torch.optim.Adam(list(now), lr=LEARNING_RATE)
        best = Mixture(*(tensor.detach().clone() for tensor in now))
        lowest = torch.full((len(observed),), torch.inf, dtype=torch.float64)
        reached, last_better, step = lowest.clone(), 0, 0
        for step in range(steps + 1):
            loss = jensen_shannon(observed, log_predicted(now, labels, terms))  # [fit, cell]
            checked = loss.detach()[:, valid].mean(1)
            better = checked < lowest
            lowest = torch.where(better, checked, lowest)
            best = Mixture(*(torch.where(_like(better, b), x.detach(), b) for b, x in zip(best, now, strict=True)))
            if bool((lowest < reached - TOLERANCE).any()):
                reached, last_better = torch.where(lowest < reached - TOLERANCE, lowest, reached), step
            if step - last_better >= PATIENCE or step == steps:
                break
            optimiser.zero_grad()
            loss[:, train].mean(1).sum().backward()
            optimiser.step()
    return best, step


def _like(mask: Tensor, parameter: Tensor) -> Tensor:
    return mask.reshape(-1, *(1,) * (parameter.ndim - 1))

"""inverse_rl: cross-entropy with a temporal-difference term, which gives logits the meaning of a soft action value.

    Q = logits, V = logsumexp Q;   loss = - log pi(a_t) + weight (Q(s_t, a_t) - gamma V(s_{t+1}))^2,   V after the last token = 0

From what is learned each token has a reward r_t = Q(s_t, a_t) - gamma V(s_{t+1}) (`rewards`); at gamma 1 they sum to log p of the text + V at its start.
An ordinary model's logits may be moved by any constant c(s) without a change of its probabilities, so that its r_t mean nothing: the term fixes the
gauge. Padding ends an episode.

Wulfmeier et al. 2024, "Imitating Language via Scalable Inverse Reinforcement Learning". Its null should be label smoothing of equal strength.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError
from patchbay.train._objectives._objective import IGNORED, Objective, cross_entropy, logits_of


def rewards(logits: Tensor, labels: Tensor, gamma: float = 1.0) -> Tensor:
    """r [row, position - 1] of the tokens after the first, 0 where a label is ignored; logits [row, position, vocab]."""
    taken = labels[:, 1:]
    real = taken != IGNORED
    q = logits[:, :-1].gather(2, taken.clamp_min(0)[..., None])[..., 0]
    value = logits.logsumexp(-1)[:, 1:]  # of the state after each token
    ends = torch.cat([real[:, 1:], torch.zeros_like(real[:, :1])], 1)  # whether another token follows
    return (q - gamma * value * ends) * real


@dataclass(frozen=True)
class InverseRL(Objective):
    weight: float = 0.1
    gamma: float = 1.0

    def check(self) -> None:
        if not (0 <= self.weight < float("inf") and 0 <= self.gamma <= 1):
            raise PatchbayError(f"inverse_rl: weight={self.weight}, gamma={self.gamma}: 0 or more, and from 0 to 1")

    def loss(self, model: Model, hf: nn.Module, batch: dict[str, Tensor], n: Tensor | int) -> Tensor:
        logits = logits_of(hf, batch).float()
        plain = cross_entropy(logits, batch["labels"]) / n
        if self.weight == 0:
            return plain
        return plain + self.weight * rewards(logits, batch["labels"], self.gamma).square().sum() / n


OBJECTIVE = InverseRL

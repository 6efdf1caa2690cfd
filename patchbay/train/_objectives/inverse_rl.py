"""inverse_rl: cross-entropy with a temporal-difference term, which gives logits the meaning of a soft action value.

    Q = logits, V = logsumexp Q;   loss = - log pi(a_t) + weight (Q(s_t, a_t) - gamma V(s_{t+1}))^2,   V after the last token = 0

From what is learned each token has a reward r_t = Q(s_t, a_t) - gamma V(s_{t+1}) (`rewards`); at gamma 1 they sum to log p of the text + V at its start.
An ordinary model's logits may be moved by any constant c(s) without a change of its probabilities, so that its r_t mean nothing: the term fixes the
gauge. Padding ends an episode, and so does the end of a row where a text was cut into rows.

Its null is label smoothing, `weight=0,smooth=0.1`: 1 - smooth on the token that is there and smooth spread over the vocabulary, which keeps distributions wide and gives
logits no meaning. Beside a weight `smooth` changes nothing of the loss: it is what the null arm is trained with, since which smoothing is as strong is measured and
not known (as much held-out loss, say); where it is 0 the null arm is the plain one on other batches. Held-out scores are - log p, without either.

Wulfmeier et al. 2024, "Imitating Language via Scalable Inverse Reinforcement Learning"; label smoothing: Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision".
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
    smooth: float = 0.0

    def check(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise PatchbayError(f"inverse_rl: weight={self.weight}: 0, for cross-entropy alone, or more")
        if not 0 <= self.gamma <= 1:
            raise PatchbayError(f"inverse_rl: gamma={self.gamma}: a discount, from 0 to 1")
        if not 0 <= self.smooth < 1:
            raise PatchbayError(
                f"inverse_rl: smooth={self.smooth}: a share of the target, from 0 to below 1, where nothing would be learned of the texts"
            )

    @property
    def null(self) -> str | None:
        return f"inverse-rl:weight=0,smooth={self.smooth}" if self.weight and self.smooth else None

    def loss(self, model: Model, hf: nn.Module, batch: dict[str, Tensor], n: Tensor | int) -> Tensor:
        logits = logits_of(hf, batch).float()
        if self.weight == 0:
            return cross_entropy(logits, batch["labels"], self.smooth) / n
        terms = rewards(logits, batch["labels"], self.gamma).square().sum()
        return cross_entropy(logits, batch["labels"]) / n + self.weight * terms / n


OBJECTIVE = InverseRL

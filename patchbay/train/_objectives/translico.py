"""translico: next-token prediction in a text and in its transliteration, and a contrast that brings the two together inside.

    loss = LM(x) + LM(x') + weight * mean over both of - log [ e^{s(z, z')} / sum over the 2 B - 1 others of e^{s(z, .)} ]

z is the mean stream of a text's own tokens after the middle layer, s the cosine over `temperature`; of B texts in a batch with their transliterations each has one
partner and 2 B - 2 negatives. Two scripts are two clones (`corpus.languages.cloned`): `vocab` tokens each, and a document is read in the first with chance `share`.
Held-out documents are scored in the clone `scored`. Its null is `paired=0`: the partner is another text's transliteration.

Liu et al. 2024, "TransliCo: A Contrastive Learning Framework to Address the Script Barrier in Multilingual Pretrained Language Models"; its temperature is not
known here. The contrast spreads states apart on its own, which isotropy shows too: hold it against the null.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchbay.corpus.languages import cloned
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError
from patchbay.train._objectives._objective import (
    IGNORED,
    Document,
    Objective,
    cross_entropy,
    joined,
    output_of,
    state_after,
    states_before,
)


def contrast(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """The mean over both of a pair of - log of the share that its partner has among all others; states [row, d] each."""
    states = nn.functional.normalize(torch.cat([one, other]).float(), dim=1)  # [2 B, d]
    alike = states @ states.T / temperature
    alike = alike.masked_fill(torch.eye(len(states), dtype=torch.bool, device=alike.device), float("-inf"))
    partner = torch.arange(len(states), device=alike.device).roll(len(one))
    return nn.functional.cross_entropy(alike, partner)


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over a text's own tokens, [row, position, d] -> [row, d]."""
    real = mask[..., None].to(states.dtype)
    return (states * real).sum(1) / real.sum(1)


@dataclass(frozen=True)
class TransliCo(Objective):
    alone = "its loss is of all rows of a step together"
    vocab: int = 0
    weight: float = 1.0
    temperature: float = 0.1
    share: float = 0.5
    scored: int = 0
    paired: int = 1

    def check(self) -> None:
        if not (
            self.vocab >= 1 and 0 <= self.weight < float("inf") and 0 < self.temperature < float("inf") and 0 <= self.share <= 1
            and self.scored in (0, 1) and self.paired in (0, 1)
        ):  # fmt: skip
            raise PatchbayError(
                f"translico: vocab={self.vocab}, weight={self.weight}, temperature={self.temperature}, share={self.share}, scored={self.scored}, "
                f"paired={self.paired}: tokens of one clone, a weight of 0 or more, a temperature above 0, a share from 0 to 1, and 0 or 1"
            )

    @property
    def null(self) -> str | None:
        if not self.paired:
            return None
        return f"translico:vocab={self.vocab},weight={self.weight},temperature={self.temperature},share={self.share},scored={self.scored},paired=0"

    def adapt(self, model: Model) -> None:
        if model.vocab_size < 2 * self.vocab:
            raise PatchbayError(
                f"translico: two clones of {self.vocab} tokens; this model has {model.vocab_size}: make one of {2 * self.vocab}"
            )
        states_before(model)

    def told(self, document: Document) -> list[int]:
        return cloned(joined(document), self.vocab, second=bool(self.scored))

    def row(self, document: Document, draw: random.Random) -> tuple[list[int], list[int]]:
        ids = cloned(joined(document), self.vocab, second=draw.random() >= self.share)
        return ids, list(ids)

    def other(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch in the other script."""
        real = batch["attention_mask"].bool()
        ids = torch.where(real, (batch["input_ids"] + self.vocab) % (2 * self.vocab), batch["input_ids"])
        return {**batch, "input_ids": ids, "labels": torch.where(batch["labels"] == IGNORED, IGNORED, ids)}

    def loss(self, model: Model, hf: nn.Module, batch: dict[str, Tensor], n: Tensor | int) -> Tensor:
        if self.weight and len(batch["input_ids"]) < 2:
            raise PatchbayError(
                "translico: a batch of one text has nothing to hold its pair against: give two rows or more"
            )
        total, states = torch.zeros((), device=batch["input_ids"].device), []
        for side in (batch, self.other(batch)):
            output = output_of(hf, side, output_hidden_states=True)
            total = total + cross_entropy(output.logits, side["labels"]) / n
            states.append(pooled(state_after(model, output, max(1, model.n_layers // 2)), side["attention_mask"]))
        if not self.weight:
            return total
        other = states[1] if self.paired else states[1].roll(1, 0)
        return total + self.weight * contrast(states[0], other, self.temperature)


OBJECTIVE = TransliCo

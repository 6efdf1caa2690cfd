"""pinto: an answer by its rationale, and no answer where the rationale is gone.

    loss = CE(y | q, r) + weight * CE(smoothed y | q, r'),   over the document's own answers;   smoothed: 1 - smooth on y, smooth / (C - 1) on each other

A document is units: question q, rationale r, the right answer y, and the other answers, each one token. r' has each token of r replaced by the token `mask` with
probability `share`. `smooth` 0 or less stands for 1 - 1/C, all answers alike. Its twin is `weight=0`, which may answer by what of the question happens to
tell; its null perturbs nothing, so that the same target is asked of the rationale as it stands.

Wang et al. 2022, "PINTO: Faithful Language Reasoning Using Prompt-Generated Rationales". Who writes rationales is not its part here: they come with the data.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError
from patchbay.train._objectives._objective import TOGETHER, Document, Objective, joined
from patchbay.train._objectives._parts import among, at_ends, written

ASKED, ANSWER = (
    -2,
    -3,
)  # in the second list of a row: tokens of the question, and answers; elsewhere it is what the rationale is replaced by


@dataclass(frozen=True)
class Pinto(Objective):
    weight: float = 1.0
    smooth: float = 0.0
    share: float = 1.0
    mask: int = 0

    def check(self) -> None:
        if not (0 <= self.weight < float("inf") and self.smooth <= 1 and 0 <= self.share <= 1 and self.mask >= 0):
            raise PatchbayError(
                f"pinto: weight={self.weight}, smooth={self.smooth}, share={self.share}, mask={self.mask}: 0 or more, at most 1, from 0 to 1, and a token"
            )

    @property
    def twin(self) -> str:
        return written("pinto", Pinto(0.0, self.smooth, self.share, self.mask))

    @property
    def null(self) -> str | None:
        plain = self.share == 0 or self.weight == 0
        return None if plain else written("pinto", Pinto(self.weight, self.smooth, 0.0, self.mask))

    @property
    def unit(self) -> str:
        return "nats per answer"

    def told(self, document: Document) -> list[int]:
        return joined(document[:3])

    def row(self, document: Document, draw: random.Random) -> tuple[list[int], list[int]]:
        if len(document) < 4 or any(len(unit) != 1 for unit in document[2:]):
            raise PatchbayError(
                "pinto: a document is a question, a rationale, the right answer and one other or more, answers of one token; got units of "
                f"{[len(unit) for unit in document]} tokens"
            )
        asked, why, answers = list(document[0]), list(document[1]), [unit[0] for unit in document[2:]]
        other = [self.mask if draw.random() < self.share else token for token in why]
        return asked + why + answers, [ASKED] * len(asked) + other + [ANSWER] * len(answers)

    def losses(self, hf: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """CE(y | q, r) and CE(smoothed y | q, r') of each row."""
        texts, others, answers = [], [], []
        for ids, said in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            pairs = list(zip(ids, said, strict=True))
            asked = [token for token, label in pairs if label == ASKED]
            texts.append(asked + [token for token, label in pairs if label >= 0])
            others.append(asked + [label for _, label in pairs if label >= 0])
            answers.append([token for token, label in pairs if label == ANSWER])
        logits = at_ends(hf, texts + others)
        own, blind = [], []
        for i, choices in enumerate(answers):
            own.append(-among(logits[i], choices)[0])
            smooth = self.smooth if self.smooth > 0 else 1 - 1 / len(choices)
            target = logits.new_full((len(choices),), smooth / (len(choices) - 1))
            target[0] = 1 - smooth
            blind.append(-(target * among(logits[len(texts) + i], choices)).sum())
        return torch.stack(own), torch.stack(blind)

    def loss(self, model: Model, hf: nn.Module, batch: dict[str, Tensor], n: Tensor | int) -> Tensor:
        own, blind = self.losses(hf, batch)
        return own.mean() + self.weight * blind.mean() if self.weight else own.mean()

    @torch.no_grad()
    def scores(self, model: Model, held: Sequence[Document]) -> Tensor:
        found = []
        for i in range(0, len(held), TOGETHER):
            some = held[i : i + TOGETHER]
            logits = at_ends(model.hf, [[*one[0], *one[1]] for one in some])
            found += [
                -among(row, [unit[0] for unit in one[2:]])[0].double() for row, one in zip(logits, some, strict=True)
            ]
        return torch.stack(found).cpu()


OBJECTIVE = Pinto

"""sami: the mutual information of principles and responses, raised without preferences.

    S_ij = mean over tokens of log p(y_j | c_i, x);   loss = half of (CE over rows of S + CE over columns), the diagonal right

A document is units: the question x, then for each principle its words c_i and a response y_i that was made under it. A text is c_i, then x, then y_j. ln C - the rows'
loss is a lower bound on the mutual information in units of a token (`bound`), as S is a mean over tokens, and no log-probability of a whole response.
`plain`: log p of each response under its own principle alone, which is its twin; `shuffled`: each principle goes with the next one's response, which is its null.

Franken et al. 2024, "Self-Supervised Alignment with Mutual Information: Learning to Follow Principles without Preference Labels". Responses come with the data: the paper
has the model that is tuned write them.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError
from patchbay.train._objectives._objective import Document, Objective, joined
from patchbay.train._objectives._parts import of_ends, written


def contrast(S: Tensor) -> Tensor:
    """Half of the cross-entropies over rows and over columns of S [principle, response], the diagonal right."""
    right = torch.arange(len(S), device=S.device)
    return 0.5 * (nn.functional.cross_entropy(S, right) + nn.functional.cross_entropy(S.T, right))


def bound(S: Tensor) -> float:
    """A lower bound on the mutual information of principle and response, in nats of a token: at most ln C."""
    return math.log(len(S)) - float(nn.functional.cross_entropy(S, torch.arange(len(S), device=S.device)))


def similarities(hf: nn.Module, document: Document) -> Tensor:
    """S [principle, response] of one document."""
    x, principles, responses = document[0], document[1::2], document[2::2]
    texts = [[*c, *x, *y] for c in principles for y in responses]
    found = of_ends(hf, texts, [len(y) for _ in principles for y in responses])
    return torch.stack([one.mean() for one in found]).view(len(principles), len(responses))


@dataclass(frozen=True)
class Sami(Objective):
    plain: bool = False
    shuffled: bool = False

    def check(self) -> None:
        if self.plain and self.shuffled:
            raise PatchbayError("sami: plain=1 has no contrast to shuffle; give one of the two")

    @property
    def twin(self) -> str:
        return written("sami", Sami(plain=not self.plain))

    @property
    def null(self) -> str | None:
        return None if self.plain or self.shuffled else written("sami", dataclasses.replace(self, shuffled=True))

    @property
    def unit(self) -> str:
        return "nats"

    def told(self, document: Document) -> list[int]:
        """The first principle, the question, and the response."""
        return joined([document[1], document[0], document[2]])

    def row(self, document: Document, draw: random.Random) -> tuple[list[int], list[int]]:
        if len(document) < 5 or len(document) % 2 == 0:
            raise PatchbayError(
                f"sami: a document is a question, and two principles or more, each with its response; got {len(document)} units"
            )
        return joined(document), [place for place, unit in enumerate(document) for _ in unit]  # whose unit a token is

    def loss(self, model: Model, hf: nn.Module, batch: dict[str, Tensor], n: Tensor | int) -> Tensor:
        found = []
        for ids, said in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            units: list[list[int]] = [[] for _ in range(max(said) + 1)]
            for token, place in zip(ids, said, strict=True):
                if place >= 0:
                    units[place].append(token)
            S = similarities(hf, units)
            found.append(-S.diagonal().mean() if self.plain else contrast(S.roll(1, 1) if self.shuffled else S))
        return torch.stack(found).mean()

    @torch.no_grad()
    def scores(self, model: Model, held: Sequence[Document]) -> Tensor:
        return torch.stack([contrast(similarities(model.hf, one)).double() for one in held]).cpu()


OBJECTIVE = Sami

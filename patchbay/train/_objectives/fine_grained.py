"""fine_grained: REINFORCE with a reward at the end of each segment of a drawn answer, by kinds, in place of one at its end.

    r_t = sum_k w_k sum_j 1[t = end_j] R_k(segment j) - beta (log pi - log pi_0)(token t);   G_t = sum of r from t on
    loss = - mean of (G_t - b_t) log pi(token t),   b_t the mean G_t of the batch's other answers

A document is units: a prompt, and for each kind of reward the tokens that it counts; R_k(segment) is how many tokens of the segment are of that kind. `weights`: one
number for each kind, with / between; `segment`: tokens of one; `length`: tokens of an answer, drawn from the model at temperature 1 by the run's own seed; `beta`: what it costs to leave the model that
it started from. `placed`: own; `end`, the same total at the last token, which is its twin; `random`, the same rewards at segments drawn anew, which is its null.

Wu et al. 2023, "Fine-Grained Human Feedback Gives Better Rewards for Language Model Training", which trains by PPO on learned rewards of sentences.
"""

from __future__ import annotations

import dataclasses
import random
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError
from patchbay.train._copies import copied
from patchbay.train._objectives._objective import TOGETHER, Document, Objective, joined
from patchbay.train._objectives._parts import at_ends, of_ends, written

PLACED = ("own", "end", "random")
SEED = 1000  # in the second list of a row: its last place tells the seed of what is drawn, from here on; the others whose unit a token is
_STARTS: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()


def drawn(hf: nn.Module, prompts: Sequence[Sequence[int]], length: int, seeds: Sequence[int]) -> list[list[int]]:
    """`length` tokens after each prompt, each by a random state of its own."""
    texts, chances = [list(one) for one in prompts], [random.Random(seed) for seed in seeds]
    with torch.no_grad():
        for _ in range(length):
            total = torch.softmax(at_ends(hf, texts).double(), -1).cumsum(-1)
            at = torch.tensor([[chance.random()] for chance in chances], dtype=torch.float64, device=total.device)
            for text, token in zip(texts, torch.searchsorted(total, at * total[:, -1:])[:, 0].tolist(), strict=True):
                text.append(min(token, total.shape[1] - 1))
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def rewards(said: Sequence[int], kinds: Sequence[Sequence[int]], weights: Sequence[float], segment: int) -> list[float]:
    """r [token] of one answer: at the last token of each segment what the segment is worth, elsewhere 0."""
    found = [0.0] * len(said)
    for start in range(0, len(said), segment):
        some = said[start : start + segment]
        found[start + len(some) - 1] = sum(w * sum(token in kind for token in some) for w, kind in zip(weights, kinds, strict=True))  # fmt: skip
    return found


def moved(r: Sequence[float], segment: int, placed: str, draw: random.Random) -> list[float]:
    """The same rewards in other places: all at the end, or each at the end of a segment that is drawn."""
    ends = [min(start + segment, len(r)) - 1 for start in range(0, len(r), segment)]
    other = [0.0] * len(r)
    if placed == "end":
        other[-1] = sum(r)
        return other
    for end in ends:
        other[draw.choice(ends) if placed == "random" else end] += r[end]
    return other


def reinforce(logp: Tensor, r: Tensor) -> Tensor:
    """A loss whose gradient is that of minus the expected reward, from log pi and rewards [answer, token]; others' mean is the baseline."""
    after = r.flip(1).cumsum(1).flip(1)
    n = len(r)
    baseline = (after.sum(0) - after) / (n - 1) if n > 1 else torch.zeros_like(after)
    return -((after - baseline).detach() * logp).sum(1).mean()


@dataclass(frozen=True)
class FineGrained(Objective):
    alone = "its loss is of all rows of a step together"
    weights: str = "1"
    segment: int = 4
    length: int = 16
    beta: float = 0.0
    placed: str = "own"

    def check(self) -> None:
        try:
            self.worth()
        except ValueError:
            raise PatchbayError(
                f"fine-grained: weights={self.weights!r} are numbers with / between, as 1/-0.5"
            ) from None
        if not (1 <= self.segment <= self.length and 0 <= self.beta < float("inf")) or self.placed not in PLACED:
            raise PatchbayError(
                f"fine-grained: segment={self.segment}, length={self.length}, beta={self.beta}, placed={self.placed!r}: 1 token or more, as many or more, "
                f"0 or more, one of {', '.join(PLACED)}"
            )

    def worth(self) -> list[float]:
        return [float(one) for one in self.weights.split("/")]

    @property
    def twin(self) -> str:
        return written("fine-grained", dataclasses.replace(self, placed="own" if self.placed == "end" else "end"))

    @property
    def null(self) -> str | None:
        return None if self.placed != "own" else written("fine-grained", dataclasses.replace(self, placed="random"))

    @property
    def unit(self) -> str:
        return "of the reward of an answer, its sign turned"

    def adapt(self, model: Model) -> None:
        if self.beta:
            _STARTS[model.hf] = copied(model).hf

    def told(self, document: Document) -> list[int]:
        return list(document[0])

    def row(self, document: Document, draw: random.Random) -> tuple[list[int], list[int]]:
        if len(document) != 1 + len(self.worth()):
            raise PatchbayError(
                f"fine-grained: a document is a prompt and the tokens of {len(self.worth())} kinds, as many as weights; got {len(document)} units"
            )
        places = [place for place, unit in enumerate(document) for _ in unit]
        return [*joined(document), 0], [*places, SEED + draw.randrange(10**9)]

    def answered(
        self, hf: nn.Module, documents: Sequence[Document], seeds: Sequence[int]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """An answer to each document's prompt, and its rewards where they belong."""
        said = drawn(hf, [one[0] for one in documents], self.length, seeds)
        worth = self.worth()
        return said, [rewards(ids, one[1:], worth, self.segment) for ids, one in zip(said, documents, strict=True)]

    def loss(self, model: Model, hf: nn.Module, batch: dict[str, Tensor], n: Tensor | int) -> Tensor:
        documents, seeds = [], []
        for ids, told in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            units: list[list[int]] = [[] for _ in range(1 + len(self.worth()))]
            for token, place in zip(ids, told, strict=True):
                if 0 <= place < SEED:
                    units[place].append(token)
            documents.append(units)
            seeds.append(max(told) - SEED)
        said, found = self.answered(hf, documents, seeds)
        r = torch.tensor(
            [
                moved(one, self.segment, self.placed, random.Random(f"places {seed}"))
                for one, seed in zip(found, seeds, strict=True)
            ]
        )
        texts = [[*one[0], *ids] for one, ids in zip(documents, said, strict=True)]
        ends = [self.length] * len(texts)
        logp = torch.stack(of_ends(hf, texts, ends))
        r = r.to(logp)
        if self.beta:
            with torch.no_grad():
                r = r - self.beta * (logp - torch.stack(of_ends(_STARTS[model.hf], texts, ends)))
        return reinforce(logp, r)

    def scores(self, model: Model, held: Sequence[Document]) -> Tensor:
        found = []
        for i in range(0, len(held), TOGETHER):
            some = held[i : i + TOGETHER]
            found += [-sum(one) for one in self.answered(model.hf, some, range(i, i + len(some)))[1]]
        return torch.tensor(found, dtype=torch.float64)


OBJECTIVE = FineGrained

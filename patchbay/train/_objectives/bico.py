"""bico: next-token prediction or, as often, the filling of masked tokens by a causal model that is let see both ways.

    with probability `both`: each token but the first is masked with probability `share`; later keys are seen as if they stood as far before;
    the key of a masked token is hidden; the masked token is read at the place before it

The coin is one for a whole batch, as the paper's is. `mask`: the token that stands for what is masked, the pad token in the paper; a document that holds it is refused.
The first token is never masked: begin documents with a token of their own, or names that stand first are not asked for. With `both` 0 it is next-token prediction.
At use the model is causal, as it was.

Lv et al. 2023, "Are We Falling in a Middle-Intelligence Trap? An Analysis and Mitigation of the Reversal Curse". What it needs of a model is
`blocks.two_way`: positions that turn queries and keys.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from torch import Tensor, nn

from patchbay.blocks.two_way import two_way
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError
from patchbay.train._objectives._masks import masked, prove
from patchbay.train._objectives._objective import IGNORED, Document, Objective, cross_entropy, joined


@dataclass(frozen=True)
class BiCo(Objective):
    share: float = 0.15
    both: float = 0.5
    mask: int = 0

    def check(self) -> None:
        if not (0 < self.share <= 1 and 0 <= self.both <= 1 and self.mask >= 0):
            raise PatchbayError(
                f"bico: share={self.share}, both={self.both}, mask={self.mask}: a share above 0 to 1, a chance from 0 to 1, and a token"
            )

    def adapt(self, model: Model) -> None:
        if self.mask >= model.vocab_size:
            raise PatchbayError(f"bico: mask={self.mask}, and this model has tokens 0..{model.vocab_size - 1}")
        if self.both:
            prove(model, "bico", two_way(model, 8))

    def of_batch(self, draw: random.Random) -> Objective:
        return replace(self, both=float(draw.random() < self.both))

    def row(self, document: Document, draw: random.Random) -> tuple[list[int], list[int]]:
        ids = joined(document)
        if self.mask in ids:
            raise PatchbayError(
                f"bico: a document holds token {self.mask}, which stands for what is masked; give mask= another"
            )
        if draw.random() >= self.both:
            return ids, list(ids)
        hidden = [place > 0 and draw.random() < self.share for place in range(len(ids))]
        return (
            [self.mask if h else token for h, token in zip(hidden, ids, strict=True)],
            [token if h else IGNORED for h, token in zip(hidden, ids, strict=True)],
        )

    def loss(self, model: Model, hf: nn.Module, batch: dict[str, Tensor], n: Tensor | int) -> Tensor:
        ids, labels, real = batch["input_ids"], batch["labels"], batch["attention_mask"].bool()
        filling = ((labels != ids) & real).any(1)  # [row]
        if not bool(filling.any()):
            return super().loss(model, hf, batch, n)
        hidden = filling[:, None] & (labels != IGNORED)
        with two_way(model, ids.shape[1]):
            logits: Tensor = masked(hf, ids, real & ~hidden, filling).logits
        return cross_entropy(logits, labels) / n


OBJECTIVE = BiCo

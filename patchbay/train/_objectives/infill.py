"""infill: CodeGen2's mixture of plain documents and documents whose spans were cut out and moved behind the rest.

    a b c d e  ->  a <mask_0> d e <sep> <mask_0> b c <end>

A coin of `share` decides for each document met. Of those that are left whole, `prefix` are read as a prefix-LM reads them: a first part of a length that is drawn is seen
both ways by itself and not learned, and the rest is said after it. Special tokens are the last ids of the vocabulary: <sep>, <end>, then <mask_0>, <mask_1>, ...; a document
that holds one is refused. `spans` are cut, each of a mean length of `length` tokens. With `share` and `prefix` 0 it is next-token prediction. The marks of
the first part are not learned as targets (they are drawn, not said); those behind <sep> are.

Nijkamp et al. 2023, "CodeGen2: Lessons for Training LLMs on Programming and Natural Languages". Its lengths of spans are not known here. The paper did not
confirm that filling in comes free; the mixture is fine.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError
from patchbay.train._objectives._masks import masked, prove
from patchbay.train._objectives._objective import IGNORED, Document, Objective, cross_entropy, joined


def corrupted(ids: Sequence[int], cuts: Sequence[tuple[int, int]], first: int) -> tuple[list[int], list[int]]:
    """Tokens and labels with the spans [start, end) moved behind <sep>; special ids are `first` <sep>, +1 <end>, +2.. <mask_k>."""
    sep, end, mask = first, first + 1, first + 2
    seen, labels, behind, at = [], [], [sep], 0
    for k, (start, stop) in enumerate(cuts):
        seen += [*ids[at:start], mask + k]
        labels += [*ids[at:start], IGNORED]
        behind += [mask + k, *ids[start:stop], end]
        at = stop
    seen, labels = [*seen, *ids[at:]], [*labels, *ids[at:]]
    return seen + behind, labels + behind


def restored(ids: Sequence[int], first: int) -> list[int]:
    """The document that `corrupted` was given."""
    if first not in ids:
        return list(ids)
    at = list(ids).index(first)
    spans: dict[int, list[int]] = {}
    current: list[int] = []
    for token in ids[at + 1 :]:
        if token >= first + 2:
            current = spans[token] = []
        elif token != first + 1:
            current.append(token)
    return [one for token in ids[:at] for one in (spans[token] if token >= first + 2 else [token])]


@dataclass(frozen=True)
class Infill(Objective):
    share: float = 0.5
    spans: int = 1
    length: float = 3.0
    vocab: int = 0
    prefix: float = 0.0

    def check(self) -> None:
        shares = 0 <= self.share <= 1 and 0 <= self.prefix <= 1
        if not (shares and self.spans >= 1 and self.length >= 1 and self.vocab > self.spans + 2):
            raise PatchbayError(
                f"infill: share={self.share}, prefix={self.prefix}, spans={self.spans}, length={self.length}, vocab={self.vocab}: shares from 0 to 1, a span or more of a "
                "token or more, and the model's tokens, of which the last spans + 2 are special"
            )

    def adapt(self, model: Model) -> None:
        if model.vocab_size != self.vocab:
            raise PatchbayError(f"infill: vocab={self.vocab}, and this model has {model.vocab_size} tokens")
        if self.prefix:
            prove(model, "infill with a prefix")

    @property
    def first(self) -> int:
        return self.vocab - self.spans - 2

    def row(self, document: Document, draw: random.Random) -> tuple[list[int], list[int]]:
        ids = joined(document)
        if any(token >= self.first for token in ids):
            raise PatchbayError(f"infill: a document holds token {max(ids)}; {self.first} and above are special")
        if draw.random() < self.share:
            return corrupted(ids, self._cuts(len(ids), draw), self.first)
        if not self.prefix or draw.random() >= self.prefix or len(ids) < 3:
            return ids, list(ids)
        first = draw.randrange(2, len(ids))  # seen both ways; one token or more is left to say
        return ids, [IGNORED] * first + ids[first:]

    def loss(self, model: Model, hf: nn.Module, batch: dict[str, Tensor], n: Tensor | int) -> Tensor:
        labels = batch["labels"]
        first = (labels == IGNORED).long().cumprod(1).sum(1)  # a mark of a span at the front sees itself alone, as ever
        if not bool((first > 1).any()):
            return super().loss(model, hf, batch, n)
        logits: Tensor = masked(hf, batch["input_ids"], batch["attention_mask"].bool(), first).logits
        return cross_entropy(logits, labels) / n

    def _cuts(self, n: int, draw: random.Random) -> list[tuple[int, int]]:
        """Spans that do not touch, of geometric lengths, as many as there is room for."""
        found: list[tuple[int, int]] = []
        room = n // self.spans
        for k in range(self.spans):
            size = 1
            while draw.random() > 1 / self.length and size < room - 1:
                size += 1
            if room > size:
                start = k * room + draw.randrange(room - size)
                found.append((start, start + size))
        return found


OBJECTIVE = Infill

"""cloned: next-token prediction in two languages of the same text, the second's ids moved by half of the vocabulary.

Each time a document is met it is read in the first language with probability `share`, else in the second. `vocab`: tokens of one language; the model
needs twice as many. Held-out documents are scored in the second with `scored` 1, else in the first.

Schaefer et al. 2024, "The Role of Language Imbalance in Cross-lingual Generalisation". What the larger language brings the smaller is seen against a
model that read the smaller alone, as many documents of it (`share=0` at that many steps), not against an even mixture.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from patchbay.corpus.languages import cloned
from patchbay.signal.port import PatchbayError
from patchbay.train._objectives._objective import Document, Objective, joined


@dataclass(frozen=True)
class Cloned(Objective):
    vocab: int = 0
    share: float = 0.5
    scored: int = 0

    def check(self) -> None:
        if not 0 <= self.share <= 1 or self.vocab < 1 or self.scored not in (0, 1):
            raise PatchbayError(
                f"cloned: vocab={self.vocab}, share={self.share}, scored={self.scored}: tokens of one language, a share from 0 to 1, and "
                "which language is scored, 0 or 1"
            )

    def told(self, document: Document) -> list[int]:
        return cloned(joined(document), self.vocab, second=bool(self.scored))

    def row(self, document: Document, draw: random.Random) -> tuple[list[int], list[int]]:
        ids = cloned(joined(document), self.vocab, second=draw.random() >= self.share)
        return ids, list(ids)


OBJECTIVE = Cloned

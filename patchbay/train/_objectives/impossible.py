"""impossible: next-token prediction in a language that no people speak; each unit of a document is a sentence of it.

`kind`: control, reversed, local, even-odd, shuffled or random (`corpus.languages`); `width`: of the windows of `local`; `salt`: which of the
languages of a kind. Held-out documents are scored in the language itself. Its null is the language `control` on other batches.

Kallini et al. 2024, "Mission: Impossible Language Models".
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from patchbay.corpus.languages import order, spoken
from patchbay.train._objectives._objective import Document, Objective


@dataclass(frozen=True)
class Impossible(Objective):
    kind: str = "reversed"
    width: int = 3
    salt: int = 0

    def check(self) -> None:
        order(self.kind, 2, width=self.width)

    def told(self, document: Document) -> list[int]:
        return self._said(document, random.Random(repr(document)))

    def row(self, document: Document, draw: random.Random) -> tuple[list[int], list[int]]:
        ids = self._said(document, draw)
        return ids, list(ids)

    def _said(self, document: Document, draw: random.Random) -> list[int]:
        said = [spoken(unit, self.kind, width=self.width, salt=self.salt, draw=draw) for unit in document]
        return [token for unit in said for token in unit]


OBJECTIVE = Impossible

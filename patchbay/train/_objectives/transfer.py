"""transfer: next-token prediction after pre-training on a language that means nothing; between the two the rows of tokens are drawn anew.

    drawn or lent weights -> `steps` updates on texts of `source` -> rows of the embedding and unembedding drawn anew -> the data

What comes of it is what the body has learned of order alone. `source`: repeats, nested or independent (`corpus.synthetic`), in the first `vocab`
tokens of the model; `steps` updates with the plan's rate and rows; `length` tokens a text. The plan redraws the twin's rows too (`redraw`), which is asked for, so that they are the same to the bit. Its null is
`independent`, in which as many updates teach nothing; the twin is the fresh start.

Yao et al. 2022, "Linking Emergent and Natural Languages via Corpus Transfer", whose source is a language of playing agents.
"""

from __future__ import annotations

from dataclasses import dataclass

from patchbay.corpus.synthetic import KINDS
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError, suggest
from patchbay.train._objectives._objective import Before, Objective


@dataclass(frozen=True)
class Transfer(Objective):
    source: str = "repeats"
    steps: int = 300
    vocab: int = 64
    length: int = 32

    def check(self) -> None:
        if self.source not in KINDS:
            raise PatchbayError(
                f"transfer: no source {self.source!r}; sources are {', '.join(KINDS)}{suggest(self.source, KINDS)}"
            )
        if self.steps < 0 or self.length < 4 or self.vocab < 4:
            raise PatchbayError(
                f"transfer: steps={self.steps}, vocab={self.vocab}, length={self.length}: 0 or more steps, 4 or more tokens, texts of 4 or more"
            )

    def adapt(self, model: Model) -> None:
        if model.vocab_size < self.vocab:
            raise PatchbayError(f"transfer: vocab={self.vocab}, and this model has {model.vocab_size} tokens")

    @property
    def null(self) -> str | None:
        if self.source == "independent":
            return None
        return f"transfer:source=independent,steps={self.steps},vocab={self.vocab},length={self.length}"

    @property
    def before(self) -> Before | None:
        return Before(self.source, self.steps, self.vocab, self.length)


OBJECTIVE = Transfer

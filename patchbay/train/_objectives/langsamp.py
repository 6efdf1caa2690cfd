"""langsamp: next-token prediction in clones of a language, with a vector for the text's language and one for its script added before the unembedding.

    logits = U (h + e_language + e_script);   h the stream after the final norm

The vectors are learned with the model and dropped at its end, so that the body need not say which language comes next. `vocab`: tokens of one clone; clone c is
token + c * vocab, of language c // scripts and script c % scripts, so that the model needs vocab * `languages` * `scripts` tokens. A document is read in the
first clone with chance `share`, else in one of the others. Held-out documents are scored, without vectors, in the clone `scored`. Vectors start at 0, where the loss is the
plain one's. Its null is `tied=0`: a text's vectors follow from its first token, not from its language.

Liu et al. 2024, "LangSAMP: Language-Script Aware Multilingual Pretraining", on masked models of 500 languages.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchbay.corpus.languages import clone
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError
from patchbay.train._objectives._objective import Document, Objective, cross_entropy, joined, output_of

NAMES = ("language_vectors", "script_vectors")


@dataclass(frozen=True)
class LangSamp(Objective):
    alone = "its vectors stand outside of what processes wrap"
    vocab: int = 0
    languages: int = 2
    scripts: int = 1
    share: float = 0.5
    scored: int = 0
    tied: int = 1

    @property
    def clones(self) -> int:
        return self.languages * self.scripts

    def check(self) -> None:
        if not (
            self.vocab >= 1 and min(self.languages, self.scripts) >= 1 and self.clones >= 2 and 0 <= self.share <= 1
            and 0 <= self.scored < self.clones and self.tied in (0, 1)
        ):  # fmt: skip
            raise PatchbayError(
                f"langsamp: vocab={self.vocab}, languages={self.languages}, scripts={self.scripts}, share={self.share}, scored={self.scored}, tied={self.tied}: "
                "tokens of one clone, two clones or more, a share from 0 to 1, which clone is scored, and 0 or 1"
            )

    @property
    def null(self) -> str | None:
        if not self.tied:
            return None
        return f"langsamp:vocab={self.vocab},languages={self.languages},scripts={self.scripts},share={self.share},scored={self.scored},tied=0"

    def told(self, document: Document) -> list[int]:
        return clone(joined(document), self.vocab, self.scored, self.clones)

    def row(self, document: Document, draw: random.Random) -> tuple[list[int], list[int]]:
        which = 0 if draw.random() < self.share else 1 + draw.randrange(self.clones - 1)
        ids = clone(joined(document), self.vocab, which, self.clones)
        return ids, list(ids)

    def adapt(self, model: Model) -> None:
        if model.vocab_size < self.vocab * self.clones:
            raise PatchbayError(
                f"langsamp: {self.clones} clones of {self.vocab} tokens; this model has {model.vocab_size}: make one of {self.vocab * self.clones}"
            )
        head = model.hf.get_output_embeddings().weight
        with torch.no_grad():
            seen = model.hf(
                input_ids=torch.zeros((1, 2), dtype=torch.long, device=model.device), output_hidden_states=True
            )
            if not torch.allclose(model.unembed_logits(seen.hidden_states[-1]), seen.logits, rtol=1e-3, atol=1e-3):
                raise PatchbayError(
                    f"langsamp: the last hidden state of this {model.family.name} model is not what its unembedding reads, so that no vector can be added there"
                )
        for name, n in zip(NAMES, (self.languages, self.scripts), strict=True):
            zeros = torch.zeros(n, head.shape[1], device=head.device, dtype=head.dtype)
            model.hf.register_parameter(name, nn.Parameter(zeros, requires_grad=False))

    def leave(self, model: Model) -> None:
        for name in NAMES:
            delattr(model.hf, name)

    def vectors(self, model: Model, ids: Tensor) -> Tensor:
        """What is added before the unembedding [row, position, d], by the clone that each token is of."""
        which = (ids // self.vocab).clamp_max(self.clones - 1)
        if not self.tied:
            which = (ids[:, :1] % self.vocab % self.clones).expand_as(ids)
        language, script = (getattr(model.hf, name) for name in NAMES)
        added: Tensor = language[which // self.scripts] + script[which % self.scripts]
        return added

    def loss(self, model: Model, hf: nn.Module, batch: dict[str, Tensor], n: Tensor | int) -> Tensor:
        states = output_of(hf, batch, output_hidden_states=True).hidden_states[-1]
        logits = model.unembed_logits(states + self.vectors(model, batch["input_ids"]))
        return cross_entropy(logits, batch["labels"]) / n


OBJECTIVE = LangSamp

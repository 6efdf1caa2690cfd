"""label_supervision: a document's class, or each token's, by cross-entropy over the classes alone, read from the last layer's state.

    logits of class c at a place = its row of the unembedding times the normed state there;   loss = - log softmax over classes [label]

A document is two units: a text, and one token for all of it, or as many as the text has. `classes`: the tokens that classes are, with + between. One for
all is read at the last real token, or with `pool=max` from the largest value that each channel has at any token. `two_way`: no causal mask, so that every token sees all others (the paper's "un");
its checkpoint has none either (`is_causal` of its config), and is read so by every finder. `whole`: softmax over all tokens, as in next-token prediction. Its twin is the causal model, and the causal model's twin is `whole`.

Li et al. 2023, "Label Supervised LLaMA Finetuning"; it tunes by LoRA and gives classes rows of their own: here the rows of the unembedding that the
tokens have, so that the checkpoint is a language model's.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError
from patchbay.train._objectives._masks import masked, unmask
from patchbay.train._objectives._objective import IGNORED, TOGETHER, Document, Objective, collated, output_of
from patchbay.train._objectives._parts import among, written


@dataclass(frozen=True)
class LabelSupervision(Objective):
    alone = "its loss is of all rows of a step together"
    classes: str = ""
    two_way: bool = False
    pool: str = "last"
    whole: bool = False

    def check(self) -> None:
        known = self.classes.split("+")
        if not all(one.isdigit() for one in known) or len(set(known)) < 2 or len(set(known)) < len(known):
            raise PatchbayError(
                f"label-supervision: classes={self.classes!r} are two tokens or more with + between, as 7+8+9"
            )
        if self.pool not in ("last", "max"):
            raise PatchbayError(f"label-supervision: pool={self.pool!r}; possible: last, max")

    @property
    def tokens(self) -> list[int]:
        return [int(one) for one in self.classes.split("+")]

    @property
    def twin(self) -> str:
        whole = self.whole if self.two_way else not self.whole
        return written("label-supervision", dataclasses.replace(self, two_way=False, whole=whole))

    @property
    def unit(self) -> str:
        return "nats per label"

    def adapt(self, model: Model) -> None:
        if max(self.tokens) >= model.vocab_size:
            raise PatchbayError(
                f"label-supervision: classes={self.classes}, and this model has tokens 0..{model.vocab_size - 1}"
            )
        if self.two_way:
            unmask(model, "label-supervision")

    def told(self, document: Document) -> list[int]:
        return list(document[0])

    def row(self, document: Document, draw: random.Random) -> tuple[list[int], list[int]]:
        if len(document) != 2 or len(document[1]) not in (1, len(document[0])):
            raise PatchbayError(
                f"label-supervision: a document is a text and its label, or as many labels as tokens; got units of {[len(unit) for unit in document]} tokens"
            )
        text, said = map(list, document)
        strange = next((label for label in said if label not in self.tokens), None)
        if strange is not None:
            raise PatchbayError(f"label-supervision: label {strange} is none of the classes {self.classes}")
        if len(said) == len(text) > 1 and self.pool == "max":
            raise PatchbayError(
                "label-supervision: pool=max is of one label for a whole text, not of one for each token"
            )
        return text, said if len(said) == len(text) else [IGNORED] * (len(text) - 1) + said

    def logits(self, model: Model, hf: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Of all tokens [row, position, vocab] where labels are read."""
        real, more = batch["attention_mask"].bool(), {"output_hidden_states": True} if self.pool == "max" else {}
        if self.two_way:
            output = masked(hf, batch["input_ids"], real, real[:, 0], **more)
        else:
            output = output_of(hf, batch, **more)
        found: Tensor = output.logits
        if self.pool == "max":  # transformers' last state is normed already
            largest = output.hidden_states[-1].masked_fill(~real[..., None], -torch.inf).amax(1, keepdim=True)
            found = model.unembed_logits(largest).expand(-1, real.shape[1], -1)
        return found

    def losses(self, model: Model, hf: nn.Module, batch: dict[str, Tensor], whole: bool) -> tuple[Tensor, Tensor]:
        """- log p of each label, and the row of each."""
        labels = batch["labels"]
        logits = self.logits(model, hf, batch)[labels != IGNORED]  # [label, vocab]
        said = labels[labels != IGNORED]
        rows = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)[labels != IGNORED]
        if whole:
            return nn.functional.cross_entropy(logits.float(), said, reduction="none"), rows
        place = (said[:, None] == torch.tensor(self.tokens, device=said.device)).int().argmax(1)
        return -among(logits, self.tokens).gather(1, place[:, None])[:, 0], rows

    def loss(self, model: Model, hf: nn.Module, batch: dict[str, Tensor], n: Tensor | int) -> Tensor:
        return self.losses(model, hf, batch, self.whole)[0].mean()

    @torch.no_grad()
    def scores(self, model: Model, held: Sequence[Document]) -> Tensor:
        found = []
        for i in range(0, len(held), TOGETHER):
            rows = [self.row(one, random.Random(0)) for one in held[i : i + TOGETHER]]
            batch = {name: value.to(model.device) for name, value in collated(rows).items()}
            nats, at = self.losses(model, model.hf, batch, whole=False)
            found += [float(nats[at == row].double().mean()) for row in range(len(rows))]
        return torch.tensor(found, dtype=torch.float64)


OBJECTIVE = LabelSupervision

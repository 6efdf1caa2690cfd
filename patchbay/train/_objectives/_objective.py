"""What every objective is: the row that a document becomes, the loss of a batch of rows, and the arm that is its null."""

from __future__ import annotations

import random
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.signal.port import PatchbayError, Port

IGNORED = -100  # the label of a place that is not learned
TOGETHER = 32  # held-out documents that run as one batch
Document = Sequence[Sequence[int]]  # units, each of token ids


@dataclass(frozen=True)
class Before:
    """What a run reads before its data: so many updates on texts of `length` tokens out of `vocab` in a language of `corpus.synthetic`."""

    source: str
    steps: int
    vocab: int
    length: int


@dataclass(frozen=True)
class Objective:
    """The next token of the document as it stands. Others say what they do otherwise."""

    alone = ""  # why processes cannot share the rows of a step; "" where its loss is a sum over n, or a mean over rows

    def check(self) -> None:
        """Raise PatchbayError for settings that cannot be."""

    @property
    def twin(self) -> str:
        """The objective of the twin, as text: the plain one, or where documents are read in parts the same without what is claimed."""
        return "ntp"

    @property
    def null(self) -> str | None:
        """The objective of the null arm, as text; None: the twin's on other batches."""
        return None

    @property
    def before(self) -> Before | None:
        """What is read before the data, after which the rows of tokens are drawn anew; None: nothing."""
        return None

    @property
    def unit(self) -> str:
        """Of the scores; lower is better."""
        return "nats per token"

    def told(self, document: Document) -> list[int]:
        """The document as it is scored when it was held out."""
        return joined(document)

    def of_batch(self, draw: random.Random) -> Objective:
        """The objective of one batch: what is drawn once for all of its rows is drawn here."""
        return self

    def row(self, document: Document, draw: random.Random) -> tuple[list[int], list[int]]:
        """Tokens, and the label of each: the token itself where it is learned from those before it, else IGNORED."""
        ids = self.told(document)
        return ids, list(ids)

    def adapt(self, model: Model) -> None:
        """Raise PatchbayError where the objective cannot be had of a model; set what it needs of one."""

    def leave(self, model: Model) -> None:
        """Take away, after training, what `adapt` gave the model."""

    def loss(self, model: Model, hf: nn.Module, batch: dict[str, Tensor], n: Tensor | int) -> Tensor:
        """Sum over learned places of - log p, divided by n. `hf` is what runs: the model's own, or what several processes wrap it in."""
        return cross_entropy(logits_of(hf, batch), batch["labels"]) / n

    def scores(self, model: Model, held: Sequence[Document]) -> Tensor:
        """Mean - log p of a token of each held-out document, float64 [document]."""
        texts, found = [self.told(one) for one in held], []
        for i in range(0, len(texts), TOGETHER):
            some = texts[i : i + TOGETHER]
            for row, ids in zip(run(model, some).logits, some, strict=True):
                said = torch.tensor(ids[1:], device=row.device)
                found.append(nn.functional.cross_entropy(row[: len(ids) - 1].float(), said))
        return torch.stack(found).double().cpu()


def joined(document: Document) -> list[int]:
    return [token for unit in document for token in unit]


def logits_of(hf: nn.Module, batch: dict[str, Tensor], **more: Any) -> Tensor:
    """Logits [row, position, vocab]."""
    found: Tensor = output_of(hf, batch, **more).logits
    return found


def output_of(hf: nn.Module, batch: dict[str, Tensor], **more: Any) -> Any:
    masked = {"attention_mask": batch["attention_mask"]} if not bool(batch["attention_mask"].all()) else {}
    return hf(input_ids=batch["input_ids"], use_cache=False, **{**masked, **more})


def cross_entropy(logits: Tensor, labels: Tensor, smooth: float = 0.0) -> Tensor:
    """The sum over places of - log p(label there | what is before), from logits and labels [row, position(, vocab)]; of the target a share `smooth` is all tokens alike."""
    said, told = logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(said, told, ignore_index=IGNORED, reduction="sum", label_smoothing=smooth)


def learned(labels: Tensor) -> Tensor:
    """How many places of a batch are learned; at least one, so that an empty batch has loss 0."""
    return (labels[:, 1:] != IGNORED).sum().clamp_min(1)


def collated(rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Rows as one batch, padded at the right with token 0, which is masked and never learned."""
    longest = max(len(ids) for ids, _ in rows)
    ids, labels = ([row[i] + [fill] * (longest - len(row[i])) for row in rows] for i, fill in ((0, 0), (1, IGNORED)))
    mask = [[1] * len(row[0]) + [0] * (longest - len(row[0])) for row in rows]
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "attention_mask": torch.tensor(mask),
    }


_BEFORE: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


def states_before(model: Model) -> int:
    """How many `hidden_states` of a Hugging Face model stand before the stream after its first layer: 1, the embedding's, or 0, as in Mamba.

    Asked of a few tokens, once. Raises PatchbayError where the streams after the layers are not among them in their order.
    """
    if (known := _BEFORE.get(model.hf)) is not None:
        return known
    ids = [i % model.vocab_size for i in (1, 2, 3, 4)]
    ports = [Port("resid_out", i) for i in range(model.n_layers - 1)]  # the last one is normed there
    trace = run(model, [ids], taps=list(ports))
    with torch.no_grad():
        output = model.hf(
            input_ids=torch.tensor([ids], device=model.device), use_cache=False, output_hidden_states=True
        )
    states = output.hidden_states or ()
    for before in (1, 0):
        some = states[before : before + len(ports)]
        if len(some) == len(ports) and all(
            torch.allclose(one, trace[port].to(one), rtol=1e-3, atol=1e-3)
            for one, port in zip(some, ports, strict=True)
        ):
            _BEFORE[model.hf] = before
            return before
    raise PatchbayError(
        f"the hidden_states of this {model.family.name} model are not the streams after its layers: objectives that read between layers (multi-exit, translico) cannot be had of it"
    )


def state_after(model: Model, output: Any, layer: int) -> Tensor:
    """The stream after a layer, counted from 1, of an output with hidden states; after the last one normed, as the model itself has it."""
    found: Tensor = output.hidden_states[-1 if layer == model.n_layers else states_before(model) + layer - 1]
    return found

"""Prompts, run before their texts join the batch: whole, or in chunks between the batch's own tokens, under edits of their own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from patchbay.edits.edit import Edit
from patchbay.jacks.arguments import cache_of, with_cache
from patchbay.jacks.session import Session
from patchbay.knobs.rows import by_row
from patchbay.model.model import Model

Heard = Callable[
    [Tensor, int], None
]  # logits [token, vocab] of a chunk, and the place of its first token in the prompt


class Prefill:
    """Prompts of one length on their way through the model, each under its own edits. `done` tokens of them have run; `cache` holds
    these. `logits` [row, vocab]: after the last.

    `heard`, of one prompt, is told the logits after every token, chunk by chunk: they are kept nowhere.
    """

    def __init__(
        self,
        model: Model,
        rows: Sequence[Sequence[int]],
        edits: Sequence[Sequence[Edit]] = (),
        heard: Heard | None = None,
    ) -> None:
        self.model, self.rows, self.heard = model, [list(ids) for ids in rows], heard
        own = list(edits) or [()] * len(self.rows)
        self.edits = list(own[0]) if len(own) == 1 else by_row(model, [list(one) for one in own])
        self.done = 0
        self.cache: Any = None
        self.logits = torch.empty(0)

    @property
    def length(self) -> int:
        return len(self.rows[0])

    @property
    def left(self) -> int:
        """Tokens of each prompt that have not run."""
        return self.length - self.done

    @torch.no_grad()
    def run(self, n: int) -> None:
        """The next `n` tokens of the prompts, or those that are left."""
        n = min(n, self.left)
        sent = torch.tensor([ids[self.done : self.done + n] for ids in self.rows], device=self.model.device)
        options: dict[str, Any] = {"use_cache": True, "attention_mask": sent.new_ones(len(sent), self.done + n)}
        if self.cache is not None:
            options |= with_cache(self.model.hf, self.cache)
        if self.heard is None and not any(edit.port.signal == "logits" for edit in self.edits) and keeps(self.model):
            options["logits_to_keep"] = 1
        with Session(self.model, (), self.edits, whole=True, prompt_length=self.length):
            output = self.model.hf(sent, **options)
        self.cache = cache_of(output)
        if self.heard is not None:
            self.heard(output.logits[0].float(), self.done)
        self.done += n
        self.logits = output.logits[:, -1].float()


def keeps(model: Model) -> bool:
    """Whether a model can be told to compute the logits of its last tokens alone."""
    return "logits_to_keep" in inspect.signature(model.hf.forward).parameters

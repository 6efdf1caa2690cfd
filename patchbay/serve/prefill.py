"""A prompt, run before its text joins the batch: whole, or in chunks between the batch's own tokens, under edits of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from patchbay.edits.edit import Edit
from patchbay.jacks.arguments import CACHE_NAMES, with_cache
from patchbay.jacks.session import Session
from patchbay.model.model import Model

Heard = Callable[
    [Tensor, int], None
]  # logits [token, vocab] of a chunk, and the place of its first token in the prompt


def cache_of(output: Any) -> Any:
    """The cache that a model returned; None without one."""
    return next((found for name in CACHE_NAMES if (found := getattr(output, name, None)) is not None), None)


class Prefill:
    """A prompt on its way through the model. `done` tokens of it have run; `cache` holds them. `logits` [vocab]: after the last one.

    `heard` is told the logits after every token, chunk by chunk: they are kept nowhere.
    """

    def __init__(
        self, model: Model, ids: Sequence[int], edits: Sequence[Edit] = (), heard: Heard | None = None
    ) -> None:
        self.model, self.ids, self.edits, self.heard = model, list(ids), list(edits), heard
        self.done = 0
        self.cache: Any = None
        self.logits = torch.empty(0)

    @property
    def left(self) -> int:
        return len(self.ids) - self.done

    @torch.no_grad()
    def run(self, n: int) -> None:
        """The next `n` tokens of the prompt, or those that are left."""
        n = min(n, self.left)
        sent = torch.tensor([self.ids[self.done : self.done + n]], device=self.model.device)
        options: dict[str, Any] = {"use_cache": True, "attention_mask": sent.new_ones(1, self.done + n)}
        if self.cache is not None:
            options |= with_cache(self.model.hf, self.cache)
        if self.heard is None and not any(edit.port.signal == "logits" for edit in self.edits) and keeps(self.model):
            options["logits_to_keep"] = 1
        with Session(self.model, (), self.edits, whole=True, prompt_length=len(self.ids)):
            output = self.model.hf(sent, **options)
        self.cache = cache_of(output)
        if self.heard is not None:
            self.heard(output.logits[0].float(), self.done)
        self.done += n
        self.logits = output.logits[0, -1].float()


def keeps(model: Model) -> bool:
    """Whether a model can be told to compute the logits of its last tokens alone."""
    return "logits_to_keep" in inspect.signature(model.hf.forward).parameters

"""Scores of rows: a task's metric, or a function of the logits, from no more of the unembedding than it reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from patchbay import maths
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import METRICS, Task

Metric = Callable[[Tensor, Tensor], Tensor]  # (logits [row, vocab], prompt of each row [row]) -> [row]


class Scorer:
    """The metric on rows: logits of only the tokens that it reads, where it reads few."""

    def __init__(self, model: Model, task: Task | None, metric: str | Metric | None) -> None:
        self.model, self.task, self.given = model, task, metric
        if task is None and not callable(metric):
            raise PatchbayError("prompts without a Task need metric=function(logits [row, vocab], prompt [row])")
        name = metric if isinstance(metric, str) else task.metric if task is not None else ""
        if not callable(metric) and name not in METRICS:
            raise PatchbayError(f"metric {name!r}; possible are {', '.join(METRICS)}")
        self.name = getattr(metric, "__name__", "metric") if callable(metric) else str(name)
        self.unit = "" if callable(metric) else METRICS[self.name]
        self.tokens: Tensor | None = None
        self._reference: dict[int, Tensor] = {}
        if task is not None and not callable(metric):
            task.check(model.vocab_size)
            self.right = torch.tensor(task.right)
            widest = max(1, *(len(ids) for ids in task.wrong))
            self.wrong = torch.tensor([ids + (-1,) * (widest - len(ids)) for ids in task.wrong])
            if self.name == "logit_diff":
                self.tokens = torch.unique(torch.cat([self.right, self.wrong[self.wrong >= 0]]))

    @property
    def width(self) -> int:
        return self.model.vocab_size if self.tokens is None else len(self.tokens)

    def columns(self, logits: Tensor) -> Tensor:
        return logits if self.tokens is None else logits[:, self.tokens.to(logits.device)]

    def logits(self, normed: Tensor, every: bool = False) -> Tensor:
        """Logits of the tokens that the metric reads, from the normalised stream [row, d_model]."""
        unembed = self.model.hf.get_output_embeddings()
        if self.tokens is None or every:
            return self.model.unembed_logits(normed)
        tokens = self.tokens.to(normed.device)
        bias = getattr(unembed, "bias", None)
        raw = torch.nn.functional.linear(normed, unembed.weight[tokens], None if bias is None else bias[tokens])
        return self.model.scaled_logits(raw)

    def reference(self, logits: Tensor, prompts: Tensor) -> None:
        """Keep the unedited logits: kl compares with them."""
        if self.name == "kl":
            self._reference |= {int(i): row for i, row in zip(prompts, logits, strict=True)}

    def score(self, logits: Tensor, prompts: Tensor, every: bool = False) -> Tensor:
        if callable(self.given):
            return self.given(logits, prompts)
        right, wrong = self.right[prompts].to(logits.device), self.wrong[prompts].to(logits.device)
        if self.tokens is not None and not every:
            tokens = self.tokens.to(logits.device)
            right = torch.searchsorted(tokens, right)
            wrong = torch.where(wrong >= 0, torch.searchsorted(tokens, wrong.clamp(min=0)), -1)
        if self.name == "kl":
            return maths.kl(torch.stack([self._reference[int(i)] for i in prompts]), logits)
        if self.name == "logit_diff":
            return maths.logit_diff(logits, right, wrong)
        return {
            "probability": maths.probability,
            "log_probability": maths.log_probability,
            "rank": maths.rank,
            "accuracy": maths.accuracy,
        }[self.name](logits, right)

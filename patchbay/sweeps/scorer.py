"""Scores of rows: a task's metric, or a function of the logits, from no more of the unembedding than it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.model.linear import bias_of, is_plain, rows
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError
from patchbay.sweeps.identity import identity
from patchbay.tasks.scoring import COMPARING, METRICS
from patchbay.tasks.task import Task

Metric = Callable[..., Tensor]  # (logits [row, vocab], prompt of each row [row]) -> [row]


class Scorer:
    """The metric on rows: logits of only the tokens that it reads, where it reads few."""

    def __init__(self, model: Model, task: Task | None, metric: str | Metric | None) -> None:
        self.model, self.task, self.given = model, task, metric
        if metric is None and task is not None and callable(task.metric):
            self.given = metric = task.metric
        if task is None and not callable(metric):
            raise PatchbayError("prompts without a Task need metric=function(logits [row, vocab], prompt [row])")
        name = metric if isinstance(metric, str) else task.metric if task is not None else ""
        if not callable(metric) and name not in METRICS:
            raise PatchbayError(f"metric {name!r}; possible are {', '.join(METRICS)}")
        self.name = getattr(metric, "__name__", "metric") if callable(metric) else str(name)
        self.unit = str(getattr(metric, "unit", "")) if callable(metric) else METRICS[self.name]
        named = getattr(metric, "tokens", None) if callable(metric) else None
        self.tokens: Tensor | None = None if named is None else torch.as_tensor(named)
        self.places = torch.tensor(task.places) if task is not None and task.places else None
        self.everywhere = callable(metric) and getattr(metric, "positions", None) == "all"
        self._reference: dict[int, Tensor] = {}
        if task is not None and not callable(metric):
            task.check(model.vocab_size)
        if task is not None and not callable(metric) and self.name != "kl":
            self.right = torch.tensor(task.right)
            widest = max(1, *(len(ids) for ids in task.wrong))
            self.wrong = torch.tensor([ids + (-1,) * (widest - len(ids)) for ids in task.wrong])
            if self.name in COMPARING:
                self.tokens = torch.unique(torch.cat([self.right, self.wrong[self.wrong >= 0]]))

    def identity(self) -> Any:
        """All that the scores depend on but the logits, as plain data: the metric, by what it does, and the answers."""
        answers = [self.task.right, self.task.wrong, self.task.places] if self.task is not None else []
        return [identity(self.given, "the metric") if callable(self.given) else self.name, answers]

    @property
    def width(self) -> int:
        return self.model.vocab_size if self.tokens is None else len(self.tokens)

    def columns(self, logits: Tensor) -> Tensor:
        return logits if self.tokens is None else logits[..., self.tokens.to(logits.device)]

    def read(self, logits: Tensor) -> Tensor:
        """What the metric reads of logits [row, position, vocab]: those of the last position, or all."""
        return logits if self.everywhere else logits[:, -1]

    def logits(self, normed: Tensor, every: bool = False) -> Tensor:
        """Logits of the tokens that the metric reads, from the normalised stream [row, d_model]."""
        unembed = self.model.hf.get_output_embeddings()
        if self.tokens is None or every:
            return self.model.unembed_logits(normed)
        tokens = self.tokens.to(normed.device)
        if not is_plain(unembed):  # an adapter, or quantised: its rows are not what it multiplies by
            return self.model.unembed_logits(normed)[:, tokens]
        bias = bias_of(unembed)
        weight = rows(unembed)[tokens]
        raw = torch.nn.functional.linear(normed.to(weight.dtype), weight, None if bias is None else bias[tokens])
        return self.model.scaled_logits(raw)

    def reference(self, logits: Tensor, prompts: Tensor) -> None:
        """Keep the unedited logits: kl compares with them."""
        if self.name == "kl":
            self._reference |= {int(i): row for i, row in zip(prompts, logits, strict=True)}

    def _own(self, metric: Metric, logits: Tensor, prompts: Tensor) -> Tensor:
        values = metric(logits, prompts if self.places is None else self.places[prompts])
        if getattr(values, "shape", None) != (len(prompts),):
            found = list(values.shape) if hasattr(values, "shape") else type(values).__name__
            raise PatchbayError(f"the metric {self.name} gives one number for each of {len(prompts)} rows, got {found}")
        return values

    def score(self, logits: Tensor, prompts: Tensor, every: bool = False) -> Tensor:
        if callable(self.given):
            return self._own(self.given, self.columns(logits) if every else logits, prompts)
        if self.name == "kl":
            return maths.kl(torch.stack([self._reference[int(i)] for i in prompts]), logits)
        right, wrong = self.right[prompts].to(logits.device), self.wrong[prompts].to(logits.device)
        if self.tokens is not None and not every:
            tokens = self.tokens.to(logits.device)
            right = torch.searchsorted(tokens, right)
            wrong = torch.where(wrong >= 0, torch.searchsorted(tokens, wrong.clamp(min=0)), -1)
        if self.name in COMPARING:
            compare = {"logit_diff": maths.logit_diff, "logit_diff_best": maths.logit_diff_best}
            return compare.get(self.name, maths.accuracy)(logits, right, wrong)
        return {
            "probability": maths.probability,
            "log_probability": maths.log_probability,
            "rank": maths.rank,
            "accuracy": maths.accuracy,
        }[self.name](logits, right)

"""Windows: the loss of rows and its gradient, so many tokens at a time, so that the activations of one window alone are held.

    forward, first window to last, without a graph     keys and values of all tokens are kept
    backward, last to first                            the window runs again on the kept keys and values before it, as leaves;  its loss + <keys and values that it makes,
                                                       what later windows asked of them>  is differentiated, and what that asks of the leaves is added to what was asked

The gradient is that of one whole backward pass, to rounding, for one forward pass more. Keys and values, their slopes, and one window's activations are what is held.

Oliaro et al. 2024, "FlexLLM: A System for Co-Serving Large Language Model Inference and Parameter-Efficient Finetuning", whose fine-tuning this is; what it serves in the same batch is not here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from patchbay.model.caches import cache_way
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError
from patchbay.train._objectives._objective import IGNORED, Objective

Slopes = list[list[Tensor]]  # of each layer's keys and values, [row, head, position, d]


def prove(model: Model, aim: Objective, processes: int) -> None:
    """Raise PatchbayError where rows cannot be trained by windows."""
    if type(aim).loss is not Objective.loss:
        raise PatchbayError(
            f"window: the objective {type(aim).__name__} does more with a row than say its next tokens; leave window out, or train ntp, spt, transfer, impossible, cloned"
        )
    if processes > 1:
        raise PatchbayError(f"window: of one process, and there are {processes}")
    with torch.no_grad():
        output = model.hf(torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=True)
    kinds = {type(one) for one in getattr(getattr(output, "past_key_values", None), "layers", [])}
    if kinds != {DynamicLayer} or cache_way(model) != "mask":
        raise PatchbayError(
            f"window: this {model.family.name} model keeps more than keys and values of all tokens ({', '.join(sorted(one.__name__ for one in kinds)) or 'no layers'}), "
            "through which no gradient comes here; leave window out"
        )


def backward(
    hf: nn.Module, batch: dict[str, Tensor], n: Tensor | int, window: int, run_back: Callable[[Tensor], Any]
) -> Tensor:
    """Add the gradient of the rows' summed - log p, over n, to the parameters', by windows; returns that loss. `run_back`: what takes one back, such as Tensor.backward."""
    length = batch["input_ids"].shape[1]
    spans = [(at, min(at + window, length)) for at in range(0, length, window)]
    kept: Any = DynamicCache()
    with torch.no_grad():
        for start, end in spans[:-1]:
            _run(hf, batch, start, end, kept)
    pairs = [(one.keys, one.values) for one in kept.layers]
    asked: Slopes = [[torch.zeros_like(one) for one in pair] for pair in pairs]
    total = torch.zeros((), device=batch["input_ids"].device)
    for start, end in reversed(spans):
        leaves = [[one[:, :, :start].detach().requires_grad_() for one in pair] for pair in pairs] if start else []
        cache: Any = DynamicCache()
        for layer, pair in enumerate(leaves):
            cache.update(*pair, layer)
        logits = _run(hf, batch, start, end, cache)
        loss = _loss(logits, batch["labels"], start, end) / n
        total = total + loss.detach()
        if end < length:  # nothing later asks anything of the last window
            made = [[one.keys, one.values] for one in cache.layers]
            loss = loss + _product(made, asked, start, end)
        run_back(loss)
        for pair, slopes in zip(leaves, asked, strict=False):
            for leaf, slope in zip(pair, slopes, strict=True):
                if leaf.grad is not None:
                    slope[:, :, :start] += leaf.grad
    return total


def _product(made: Slopes, asked: Slopes, start: int, end: int) -> Tensor:
    """The sum over a window's keys and values of each number times its slope."""
    pairs = zip((one for pair in made for one in pair), (one for pair in asked for one in pair), strict=True)
    return torch.stack([(one[:, :, start:end] * slope[:, :, start:end]).sum() for one, slope in pairs]).sum()


def _run(hf: nn.Module, batch: dict[str, Tensor], start: int, end: int, cache: Any) -> Tensor:
    """Logits of the tokens of a window, whose keys and values join the cache."""
    logits: Tensor = hf(
        input_ids=batch["input_ids"][:, start:end],
        attention_mask=batch["attention_mask"][:, :end],
        past_key_values=cache,
        use_cache=True,
    ).logits
    return logits


def _loss(logits: Tensor, labels: Tensor, start: int, end: int) -> Tensor:
    """The sum of - log p of the labels one token on."""
    said = labels[:, start + 1 : end + 1]
    return nn.functional.cross_entropy(
        logits[:, : said.shape[1]].float().flatten(0, 1), said.flatten(), ignore_index=IGNORED, reduction="sum"
    )

"""Prompts in all the forms that users have, as token ids of one model."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchbay.signal.port import PatchbayError

if TYPE_CHECKING:
    from patchbay.model.model import Model


def encode(model: Model, prompts: Any) -> list[list[int]]:
    """Token ids of prompts: a text, texts, ids, lists of ids, a tensor [prompt, position] or a Task (its clean prompts)."""
    if hasattr(prompts, "clean"):
        prompts = [list(ids) for ids in prompts.clean]
    if hasattr(prompts, "tolist"):
        prompts = prompts.tolist()
    if not isinstance(prompts, str | Sequence):
        raise PatchbayError(
            f"prompts are a text, texts, token ids, lists of ids, a tensor or a Task, got {type(prompts).__name__}"
        )
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], Integral)):
        prompts = [prompts]
    out = [model._need_tokenizer()(p)["input_ids"] if isinstance(p, str) else [int(i) for i in p] for p in prompts]
    if not out:
        raise PatchbayError("no prompts were given")
    longest, n_embedded = model.max_positions, model.hf.get_input_embeddings().weight.shape[0]
    for i, (ids, prompt) in enumerate(zip(out, prompts, strict=True)):
        if not ids:
            raise PatchbayError(f"prompt {i} is empty: {prompt!r}")
        if longest is not None and len(ids) > longest:
            raise PatchbayError(f"prompt {i} has {len(ids)} tokens, the model takes {longest}")
        if not 0 <= min(ids) <= max(ids) < n_embedded:
            raise PatchbayError(
                f"prompt {i} has token ids {min(ids)}..{max(ids)}, the vocabulary is 0..{model.vocab_size - 1}"
            )
    return out


def batch(model: Model, prompts: Any) -> tuple[Tensor, Tensor, bool]:
    """Token ids of prompts [prompt, position] on the model's device, 0 to the right of a shorter one, their lengths
    [prompt], and whether these differ."""
    embedding = model.hf.get_input_embeddings().weight
    whole = isinstance(prompts, Tensor) and prompts.ndim == 2 and prompts.dtype in (torch.int64, torch.int32)
    if whole and prompts.numel() and prompts.shape[1] <= (model.max_positions or prompts.shape[1]):
        low, high = prompts.aminmax()
        if int(low) >= 0 and int(high) < len(embedding):
            ids = prompts.to(embedding.device, torch.int64, copy=True)
            return ids, torch.full((len(prompts),), prompts.shape[1]), False
    encoded = encode(model, prompts)  # other forms, and what is to be refused
    lengths = [len(ids) for ids in encoded]
    width = max(lengths)
    filled = torch.tensor([ids + [0] * (width - len(ids)) for ids in encoded], device=embedding.device)
    return filled, torch.tensor(lengths), min(lengths) < width

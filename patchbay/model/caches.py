"""Which caches are believed: a model's keys and values, or states, kept from one call to the next.

A cache is believed where a short run of it repeats runs of the whole text. What is proved is kept on the model.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from patchbay.jacks.arguments import cache_of, with_cache
from patchbay.jacks.session import Session
from patchbay.model.model import Model


def serves(model: Model, start: int, end: int) -> bool:
    """Whether a cache that grows from `start` to `end` tokens gives what runs of the whole text give."""
    return model.regime(start) == model.regime(end) and cache_way(model) != "none"


def cache_way(model: Model) -> str:
    """How a model's cache is believed: "mask" with the attention mask of the whole text, "plain" without one, or "none" at all."""
    if "_cache_way" not in model.__dict__:
        model.__dict__["_cache_way"] = next((way for way in ("mask", "plain") if _proved(model, way)), "none")
    return str(model.__dict__["_cache_way"])


@torch.no_grad()
def _proved(model: Model, way: str) -> bool:
    """A short run: two rows cached, repeated and continued by two tokens have the logits of whole runs of the four texts."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocab_size, (2, 7), generator=draw).repeat(2, 1).to(model.device)
    more = torch.randint(model.vocab_size, (4, 2), generator=draw).to(model.device)
    both = torch.cat([ids, more], 1)
    seen = []
    with Session(model, whole=True):
        cache = cache_of(model.hf(ids[:2], attention_mask=torch.ones_like(ids[:2]), use_cache=True))
        if not hasattr(cache, "reorder_cache"):
            return False
        cache.reorder_cache(torch.tensor([0, 1, 0, 1], device=model.device))
        for at in range(more.shape[1]):
            mask = {"attention_mask": torch.ones_like(both[:, : 8 + at])} if way == "mask" else {}
            output = model.hf(more[:, at : at + 1], use_cache=True, **mask, **with_cache(model.hf, cache))
            cache = cache_of(output)
            seen.append(output.logits[:, -1].double())
        whole = model.hf(both, attention_mask=torch.ones_like(both), use_cache=False).logits[:, -2:].double()
    return within_rounding(model, torch.stack(seen, 1), whole)


def within_rounding(model: Model, seen: Tensor, whole: Tensor) -> bool:
    """Whether logits are those of whole runs but for the order of sums."""
    gap = (seen - whole).square().mean().sqrt() / whole.std().clamp(min=1e-30)
    return float(gap) <= (2e-5 if model.dtype in (torch.float32, torch.float64) else 0.25)


def branches(model: Model) -> bool:
    """Whether rows of this model's cache can be repeated, and each continued by several tokens at once."""
    if "_cache_branches" not in model.__dict__:
        model.__dict__["_cache_branches"] = cache_way(model) != "none" and _proved_branches(model)
    return bool(model.__dict__["_cache_branches"])


@torch.no_grad()
def _proved_branches(model: Model) -> bool:
    """A short run: two rows cached, the first repeated, and all three continued by three tokens in one call have the logits of whole runs."""
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(model.vocab_size, (2, 6), generator=draw).to(model.device)
    more = torch.randint(model.vocab_size, (3, 3), generator=draw).to(model.device)
    of = torch.tensor([0, 0, 1], device=model.device)
    with Session(model, whole=True):
        output = continued_from(model, started(model, ids, 1)[1], of, more)
        both = torch.cat([ids[of], more], 1)
        whole = model.hf(both, attention_mask=torch.ones_like(both), use_cache=False).logits[:, -3:]
    return within_rounding(model, output.double(), whole.double())


def started(model: Model, ids: Tensor, keep: int) -> tuple[Tensor, Any]:
    """Logits after each of the last `keep` tokens of rows of one length [row, keep, vocab], and the cache that they leave."""
    few = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(model.hf.forward).parameters else {}
    output = model.hf(ids, attention_mask=torch.ones_like(ids), use_cache=True, **few)
    return output.logits[:, -keep:], cache_of(output)


def continued_from(model: Model, cache: Any, of: Tensor, ids: Tensor) -> Tensor:
    """Logits [row, token, vocab] of tokens `ids` [row, token] that follow row `of` [row] of a cache, which is used up."""
    cache.reorder_cache(of)
    mask = {}
    if cache_way(model) == "mask":
        width = int(cache.get_seq_length()) + ids.shape[1]
        mask = {"attention_mask": torch.ones(len(ids), width, dtype=torch.long, device=ids.device)}
    logits: Tensor = model.hf(ids, use_cache=True, **mask, **with_cache(model.hf, cache)).logits
    return logits

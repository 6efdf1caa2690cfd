"""Caches from which the last tokens are taken back: which models have one that is exact, and which layers forbid it.

A cache that is cropped has to be what it was before those tokens came. Keys and values can be cut; a state that is carried from token to
token cannot, unless the layer keeps the inputs that it was made from. What a model's cache does is proved by a short run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from patchbay.decode._loop import Call, Rows
from patchbay.jacks.arguments import cache_of, with_cache
from patchbay.jacks.session import Session
from patchbay.model.caches import cache_way, within_rounding
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError


def refuse_states(model: Model, name: str) -> None:
    """Raise PatchbayError where layers carry a state that cannot be wound back, by their numbers."""
    carried = [layer for layer in range(model.n_layers) if "attn.pattern" not in model.signals(layer)]
    if carried and not crops(model):
        raise PatchbayError(
            f"{name}: layers {', '.join(map(str, carried[:6]))} of {model.family.name} carry a state from token to token (no attn.pattern), from "
            "which tokens that are refused cannot be taken back; decode.samplers and decode.beam continue it token by token"
        )


def crops(model: Model) -> bool:
    """Whether tokens can be taken back from this model's cache, and several be sent at once, exactly."""
    if "_cache_crops" not in model.__dict__:
        model.__dict__["_cache_crops"] = cache_way(model) != "none" and _proved(model)
    return bool(model.__dict__["_cache_crops"])


def croppable(call: Call, members: Sequence[int], **options: Any) -> Rows:
    """Rows from which tokens can be taken back (`Rows.drop`); where the model's cache cannot do that, every pass runs the whole text."""
    rows = call.rows(members, **options)
    if crops(call.model):
        rows.fresh = _recording(call.model)
    else:
        rows.cached = False
    return rows


def _recording(model: Model) -> Any:
    """A cache that keeps what a window or a convolution has left behind until it is cropped."""
    cache = DynamicCache(config=model.hf.config)
    cache.activate_past_recording()
    return cache


@torch.no_grad()
def _proved(model: Model) -> bool:
    """A short run: two rows of a cache to which tokens are sent, some taken back and others sent in their place, the prompt's own pass
    too, have the logits of whole runs of what stayed."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(model.vocab_size, (2, 12), generator=draw).to(model.device)
    wrong = torch.randint(model.vocab_size, (2, 2), generator=draw).to(model.device)
    seen, held = [], 0
    with Session(model, whole=True):
        cache = _recording(model)
        for n, extra in ((6, 2), (1, 2), (2, 0), (1, 2), (2, 0)):
            sent = torch.cat([ids[:, held : held + n], wrong[:, :extra]], 1)
            mask = torch.ones(2, held + sent.shape[1], dtype=torch.long, device=ids.device)
            options: dict[str, Any] = {"attention_mask": mask} if held == 0 or cache_way(model) == "mask" else {}
            output = model.hf(sent, use_cache=True, **options, **with_cache(model.hf, cache))
            if cache_of(output) is not cache or not cache.is_croppable:
                return False
            cache.crop(-extra)
            seen.append(output.logits[:, :n].double())
            held += n
        whole = model.hf(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.double()
    return within_rounding(model, torch.cat(seen, 1), whole)

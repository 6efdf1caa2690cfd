"""Masks that open what a causal model hides, and the proof that a model hears them; and the causal mask taken away for good."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError

LEARNED = (
    "_cache_way",
    "_cache_branches",
    "_cache_crops",
    "_packs",
    "_joins",
)  # what was found out about a model while it was causal
HEARD = 1e-4  # of the largest logit: by as much a mask of four axes may change what the model's own mask gives; in half precision by four roundings


def opened(seen: Tensor, both: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers to add to scores [row, 1, query, key]: `seen` [row, key] are not hidden from later queries, nor from earlier ones among the first
    `both` [row] tokens; all tokens where `both` is truth values and true."""
    n = seen.shape[1]
    places = torch.arange(n, device=seen.device)
    first = both * n if both.dtype == torch.bool else both
    open_ = seen[:, None, None] & ((places <= places[:, None]) | (places < first[:, None, None, None]))
    return torch.zeros(open_.shape, dtype=dtype, device=seen.device).masked_fill(~open_, torch.finfo(dtype).min)


def masked(hf: nn.Module, ids: Tensor, seen: Tensor, both: Tensor, **more: Any) -> Any:
    """What the model gives under that mask."""
    dtype = next(p.dtype for p in hf.parameters() if p.is_floating_point())
    return hf(input_ids=ids, attention_mask=opened(seen, both, dtype), use_cache=False, **more)


@torch.no_grad()
def prove(model: Model, what: str, around: contextlib.AbstractContextManager[None] | None = None) -> None:
    """Raise PatchbayError where the model does not hear masks of four axes: closed, its logits are its own; opened, the last token moves the
    first logit."""
    length = min(6, model.max_positions or 6)
    ids = torch.arange(length, device=model.device)[None] % model.vocab_size
    every = torch.ones_like(ids, dtype=torch.bool)
    try:
        plain = model.hf(input_ids=ids, use_cache=False).logits
        with around or contextlib.nullcontext():
            closed, open_ = (masked(model.hf, ids, every, every[:, 0] & on).logits for on in (False, True))
            other = masked(
                model.hf, torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % model.vocab_size], 1), every, every[:, 0]
            )
    except PatchbayError:
        raise
    except Exception as error:  # whatever a family's own code says of such a mask
        raise PatchbayError(f"{what}: this {model.family.name} model takes no mask of four axes ({error})") from error
    off = float((closed - plain).abs().max() / plain.abs().max())
    if off > max(HEARD, 4 * torch.finfo(plain.dtype).eps) or torch.equal(open_[:, 0], other.logits[:, 0]):
        raise PatchbayError(
            f"{what}: this {model.family.name} model does not do what a mask of four axes says (closed, its logits are {off:.0e} off; opened, the last "
            f"token {'does not move' if torch.equal(open_[:, 0], other.logits[:, 0]) else 'moves'} the first logit); possible: llama, qwen2"
        )
    window = getattr(model.config, "sliding_window", None)
    if window and any("sliding" in str(kind) for kind in getattr(model.config, "layer_types", None) or ()):
        raise PatchbayError(
            f"{what}: this {model.family.name} model has windows of {window} tokens, which a mask of four axes would open"
        )


@torch.no_grad()
def unmask(model: Model, what: str) -> None:
    """Take the causal mask away for good, by transformers' own switch (`is_causal` of the config), which goes with the checkpoint: loaded, it is the same.

    Raises PatchbayError, and leaves the model as it was, where its own code does not then do what an open mask of four axes does, padded and not.
    """
    prove(model, what)
    length = min(6, model.max_positions or 6)
    ids = torch.arange(length, device=model.device).repeat(2, 1) % model.vocab_size
    every = torch.ones_like(ids, dtype=torch.bool)
    padded = every.clone()
    padded[1, length // 2 :] = False
    opened = [masked(model.hf, ids, real, every[:, 0]).logits[real] for real in (every, padded)]
    configs = {id(one): one for one in (model.hf.config, model.config)}.values()
    before = [getattr(one, "is_causal", None) for one in configs]
    for one in configs:
        one.is_causal = False
    try:
        for key in LEARNED:
            model.__dict__.pop(key, None)
        model._adopt(model.family)
        own = [
            model.hf(
                input_ids=ids, use_cache=False, **({} if real is every else {"attention_mask": real.long()})
            ).logits[real]
            for real in (every, padded)
        ]
        same = all(
            torch.allclose(one, other, rtol=HEARD, atol=HEARD * float(other.abs().max()))
            for one, other in zip(own, opened, strict=True)
        )
        if model.causal or not same:
            raise PatchbayError("its logits are others")
    except PatchbayError as error:
        for one, was in zip(configs, before, strict=True):
            if was is None:
                del one.is_causal
            else:
                one.is_causal = was
        model._adopt(model.family)
        raise PatchbayError(
            f"{what}: this {model.family.name} model keeps its causal mask where transformers' own switch (is_causal) takes it away ({error}), so that its checkpoint would be causal "
            "again; possible: llama, qwen2"
        ) from error

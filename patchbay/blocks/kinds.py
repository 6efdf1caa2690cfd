"""Attention kinds: what stands in the place of the softmax, as attention functions that transformers' models call by name.

With scores s_ij = scaling q_i . k_j and the mask's numbers added to them:

    softmax1             a_ij = e^s_ij / (1 + sum_j e^s_ij)                    attention may rest on nothing
    k_bias               softmax over (q_i . k*, s_i1, ...), k* one learned key a head with value 0, its column dropped
    kv_bias              the same, k* with a learned value v*: z_i = sum_j a_ij v_j + (1 - sum_j a_ij) v*
    sigmoid              a_ij = sigma(s_ij + bias), not normalised
    normalised_sigmoid   the same, divided by its sum

Gu et al. 2024, "When Attention Sink Emerges in Language Models: An Empirical View": no sink emerges with unnormalised sigmoid up to 1B.

softmax1 is k_bias at k* = 0, and that is gpt_oss's attention with sink logits 0. Both run on SDPA with one more key. Row mass is 1 minus the null's share, so that
attention to the first token is to be read beside it. sigma(0) = 1/2, so that at the start z grows with the number of keys: `bias` = -log(length) holds it.
What is learned lies on the attention module, as `null_key` and `null_value` [group, d_head]; keys are those after rotation, so that the null has no place.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from patchbay.errors import PatchbayError
from patchbay.jacks.attention import implement
from patchbay.jacks.patterns import additive_mask, is_causal, to_heads

NULLED = ("softmax1", "k_bias", "kv_bias")
KINDS = (*NULLED, "sigmoid", "normalised_sigmoid")
FREE = ("softmax1", "sigmoid", "normalised_sigmoid")  # without weights of their own
# terms of families' own attention that these functions do not have
UNHEARD = ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices")


def attend(
    kind: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> Tensor:
    """z [prompt, query, head, d] of a kind, on the fused kernel where there is one."""
    if kind in NULLED:
        return _with_null(kind, module, query, key, value, mask, options)
    dropout = options.get("dropout", 0.0)
    numbers = additive_mask(mask, query, key.shape[2], causal=is_causal(module, kind, options))
    weights = pattern(kind, module, query, key, numbers, **options)
    weights = nn.functional.dropout(weights, dropout, module.training) if dropout else weights
    return (weights @ to_heads(value, query.shape[1])).transpose(1, 2)


def show(
    kind: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, numbers: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """z and the pattern [prompt, head, query, key], as the formulas stand above."""
    weights = pattern(kind, module, query, key, numbers, **options)
    z = (weights @ to_heads(value, query.shape[1])).transpose(1, 2)
    if kind == "kv_bias":
        null = to_heads(module.null_value[None, :, None], query.shape[1]).transpose(1, 2)  # type: ignore[index,operator]
        z = z + (1.0 - weights.sum(-1)).transpose(1, 2)[..., None] * null
    return z, weights


def pattern(kind: str, module: nn.Module, query: Tensor, key: Tensor, numbers: Tensor, **options: Any) -> Tensor:
    """The weights of a kind, computed in float32 or better; `numbers` are added to the scores and close what is hidden."""
    _refuse(kind, options)
    keys = to_heads(key, query.shape[1])
    scores = (query * _scale(query, options)) @ keys.transpose(-1, -2) + numbers
    scores = scores.to(torch.promote_types(query.dtype, torch.float32))
    if kind in NULLED:
        null = _null_scores(kind, module, query, options).to(scores)  # [prompt, head, query, 1]
        return torch.softmax(torch.cat([null, scores], -1), -1)[..., 1:].to(query.dtype)
    weights = torch.sigmoid(scores + getattr(module, "sigmoid_bias", 0.0))
    if kind == "normalised_sigmoid":
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return weights.to(query.dtype)


def _with_null(
    kind: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """SDPA over one more key, which every query sees."""
    _refuse(kind, options)
    numbers = additive_mask(mask, query, key.shape[2], causal=is_causal(module, kind, options))
    opened = nn.functional.pad(numbers, (1, 0), value=0.0)  # [prompt or 1, 1, query, 1 + key]
    first, read = _null(kind, module, key, value)
    keys, values = (torch.cat([n.expand(len(t), -1, -1, -1), t], 2) for n, t in ((first, key), (read, value)))
    out = nn.functional.scaled_dot_product_attention(
        query,
        to_heads(keys, query.shape[1]),
        to_heads(values, query.shape[1]),
        attn_mask=opened,
        dropout_p=options.get("dropout", 0.0) if module.training else 0.0,
        scale=_scale(query, options),
    )
    return out.transpose(1, 2)


def _null(kind: str, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The null's key and value, [1, group, 1, d]."""
    first, read = (t.new_zeros(1, t.shape[1], 1, t.shape[3]) for t in (key, value))
    if kind != "softmax1":
        first = module.null_key[None, :, None].to(key)  # type: ignore[index,operator]
    if kind == "kv_bias":
        read = module.null_value[None, :, None].to(value)  # type: ignore[index,operator]
    return first, read


def _null_scores(kind: str, module: nn.Module, query: Tensor, options: dict[str, Any]) -> Tensor:
    if kind == "softmax1":
        return query.new_zeros(*query.shape[:3], 1)
    null = to_heads(module.null_key[None, :, None], query.shape[1])  # type: ignore[index,operator]
    return (query * _scale(query, options)) @ null.transpose(-1, -2).to(query)


def _scale(query: Tensor, options: dict[str, Any]) -> float:
    found: float | None = options.get("scaling")
    return float(query.shape[-1] ** -0.5) if found is None else found


def _refuse(kind: str, options: dict[str, Any]) -> None:
    """Raise PatchbayError where a family's own attention has a term that this kind would drop."""
    lost = [name for name in UNHEARD if options.get(name) is not None]
    if lost:
        raise PatchbayError(
            f"attention {kind!r} has no {', '.join(lost)}, which this family's own attention has: it would be another model in more than "
            "the softmax; possible: a family without (llama, mistral, qwen2, gpt2)"
        )


def _function(kind: str) -> Any:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        return attend(kind, module, query, key, value, mask, **options), None

    return attention


def _row(kind: str) -> Any:
    def shown(module: nn.Module) -> Any:
        return lambda attention, *given, **options: show(kind, attention, *given, **options)

    return shown


def register() -> None:
    """Let transformers know the kinds that need no weights of their own by name, for any model: `attn_implementation="softmax1"`."""
    for kind in FREE:
        implement(kind, _function(kind), _row(kind))


def finite(value: Any, what: str) -> float:
    """A number that was asked for, or a PatchbayError."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise PatchbayError(f"{what}={value!r}: a number, and a finite one")
    return float(value)

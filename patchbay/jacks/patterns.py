"""What attention implementations compute: z and the pattern of one call, from q, k, v, the mask and the options.

`SHOWN` is the table: an implementation's name -> (z, pattern); `implement` registers one with its row. A row has to give the z that the implementation
made in that very call; what of it the pattern times the values is not (a learned value that every query may take) stays under edits of the pattern. What is registered under another name (transformers'
`AttentionInterface` takes any function) is asked: the weights that it returns, or else the softmax of q k^T, scaled and masked, is
its pattern if that times the values is the z that it gave in this very call. Where neither is, its pattern is refused by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from patchbay.signal.port import PatchbayError

Shown = Callable[..., tuple[Tensor, Tensor]]  # (module, q, k, v, additive mask, **options) -> z, pattern
NEAR = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def eager_of(module: nn.Module) -> Callable[..., Any]:
    """The family's own eager attention: the function of that name in the module that defines the attention class."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", plain_eager)


def plain_eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scaling + mask) v, for families without an eager function of their own."""
    pattern = plain_pattern(query, key, attention_mask, scaling)
    return (pattern @ to_heads(value, query.shape[1])).transpose(1, 2), pattern


def plain_pattern(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """softmax(q k^T * scaling + mask), which is what SDPA uses and does not return: [prompt, head, query, key]."""
    scale, keys = scaling or query.shape[-1] ** -0.5, to_heads(key, query.shape[1]).transpose(-1, -2)
    in_place = not torch.is_grad_enabled() and query.dtype == torch.float32
    if in_place and mask is not None and mask.shape[:2] == (1, 1):  # scaled, masked and multiplied in one pass
        numbers = mask.expand(*query.shape[:2], -1, -1).flatten(0, 1)
        keys = keys.expand(*query.shape[:2], -1, -1)
        scores = torch.baddbmm(numbers, query.flatten(0, 1), keys.flatten(0, 1), alpha=scale)
        scores = scores.unflatten(0, query.shape[:2])
    else:
        scores = (query * scale) @ keys
        scores = scores if mask is None else scores.add_(mask)
    if in_place:  # every row is read before it is written, so the scores can become the pattern where they lie
        return torch.softmax(scores, dim=-1, out=scores)
    return torch.softmax(scores, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)


def to_heads(x: Tensor, n_heads: int) -> Tensor:
    """Repeat key/value groups so that every query head has its own: [prompt, group, key, d] -> [prompt, head, key, d]."""
    return x if x.shape[1] in (1, n_heads) else x.repeat_interleave(n_heads // x.shape[1], dim=1)


def additive_mask(mask: Tensor | None, query: Tensor, n_keys: int, *, causal: bool = True) -> Tensor:
    """The mask as numbers to add to the scores, [prompt or 1, head or 1, query, key].

    Where none was given it is what the kernel does without one: several queries of a causal module see the keys up to their own
    place, a single one sees all, and so do all of a module that is not causal.
    """
    n_queries, lowest = query.shape[2], torch.finfo(query.dtype).min
    if mask is None:
        mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=query.device)
        mask = (mask.tril() if causal and n_queries > 1 else mask)[None, None]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, lowest)
    return mask[..., :n_keys]


def is_causal(module: nn.Module, implementation: str, options: dict[str, Any]) -> bool:
    """Whether a call without a mask hides later keys: SDPA asks the call, then the module; eager attention hides nothing."""
    said = options.get("is_causal")
    return implementation != "eager" and bool(getattr(module, "is_causal", True) if said is None else said)


SHOWN: dict[str, Callable[[nn.Module], Shown]] = {"sdpa": eager_of, "eager": eager_of}
"""Where edits or gradients need the pattern of SDPA, the family's own eager mathematics gives it: the same function."""


def of_transformers(implementation: str) -> bool:
    """Whether the function of that name is transformers' own: anybody may register another under any name."""
    if implementation == "eager":
        return True
    function = ALL_ATTENTION_FUNCTIONS.get(implementation, None)
    return str(getattr(function, "__module__", "")).split(".")[0] == "transformers"


def in_table(implementation: str) -> bool:
    """Whether the table says how this implementation is shown."""
    return implementation in SHOWN and (implementation != "sdpa" or of_transformers(implementation))


def shown(
    inner: Shown, implementation: str, causal: bool, module: nn.Module, *qkv: Tensor, mask: Any, options: dict[str, Any]
) -> tuple[Tensor, Any, Tensor, Tensor | None]:
    """z of an implementation of the table, what it returned beside it, its pattern, and what of z is not the pattern times the values."""
    query, key, value = qkv
    z, returned = inner(module, query, key, value, mask, **options)
    numbers = additive_mask(mask, query, key.shape[2], causal=causal)
    made, pattern = SHOWN[implementation](module)(module, query, key, value, numbers, **options)
    if (off := _off(made, z)) > NEAR.get(value.dtype, 1e-2):
        raise PatchbayError(
            f"attention {implementation!r}: its row of the table gives another z than it made (off by {off:.1e}): a fault of the row; "
            "q, k, v and z can be tapped and edited"
        )
    return z, returned, pattern, _beside(z, pattern, value)


def _beside(z: Tensor, pattern: Tensor, value: Tensor) -> Tensor | None:
    """What of z [prompt, query, head, d] is not the pattern times the values; None where that is rounding."""
    rest = z - (pattern @ to_heads(value, pattern.shape[1])).transpose(1, 2).reshape(z.shape)
    size = z.detach().abs().max().clamp(min=1e-30)
    return rest if float(rest.detach().abs().max() / size) > NEAR.get(value.dtype, 1e-2) else None


def asked(
    inner: Shown, implementation: str, causal: bool, module: nn.Module, *qkv: Tensor, mask: Any, options: dict[str, Any]
) -> tuple[Tensor, Any, Tensor]:
    """z [prompt, query, head, d] of an implementation that is not in the table, what it returned beside it, and its pattern."""
    query, key, value = qkv
    z, returned = inner(module, query, key, value, mask, **options)
    off = float("inf")
    for weights in _candidates(returned, causal, module, query, key, value, mask, options):
        pattern, far = _explained(z, weights, value)
        off = min(off, far)
        if pattern is not None:
            return z, returned, pattern
    raise PatchbayError(
        f"attention {implementation!r}: neither the weights that it returns nor the family's softmax of q k^T times the values is the z "
        f"that it makes (off by {off:.1e}): it has no pattern to read or edit; q, k, v and z can be tapped and edited. For patterns load "
        "the model with attn_implementation='sdpa' or 'eager', or let the function return its weights beside z"
    )


def explained(z: Tensor, weights: Tensor, value: Tensor, module: nn.Module) -> Tensor:
    """The pattern that times the values is z: the weights that eager attention returned, or these times one factor for each query,
    where a family scales behind its softmax (which is a sink in another form)."""
    pattern, off = _explained(z, weights, value)
    if pattern is None:
        raise PatchbayError(
            f"{type(module).__name__}: the weights that its attention returns times the values are not the z that it makes (off by "
            f"{off:.1e}), also up to a factor for each query: it has no pattern to read or edit; q, k, v and z can be tapped and edited"
        )
    return pattern


def _explained(z: Tensor, weights: Tensor, value: Tensor) -> tuple[Tensor | None, float]:
    each, near = to_heads(value, weights.shape[1]), NEAR.get(value.dtype, 1e-2)
    made = (weights @ each).transpose(1, 2)
    z = z.reshape(made.shape)
    if (off := _off(made, z)) <= near:
        return weights, off
    factor = (z * made).sum(-1) / made.square().sum(-1).clamp(min=1e-30)  # [prompt, query, head]
    scaled = weights * factor.transpose(1, 2)[..., None]
    far = _off((scaled @ each).transpose(1, 2), z)
    return (scaled if far <= near else None), far


def cut(pattern: Tensor, blocked: Tensor, implementation: str) -> Tensor:
    """The pattern of a softmax without the blocked keys: what they had goes to the others in proportion."""
    if float((pattern.sum(-1) - 1).abs().max()) > NEAR.get(pattern.dtype, 1e-2):
        raise PatchbayError(
            f"block under attention {implementation!r}: its weights do not sum to 1, so that it is no softmax and a blocked key's "
            "share goes nowhere that is known; pb.zero(pattern) sets weights to 0 and leaves the others"
        )
    left = pattern.masked_fill(blocked, 0.0)
    return left / left.sum(-1, keepdim=True)


def _candidates(
    returned: Any,
    causal: bool,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    options: dict[str, Any],
) -> Iterator[Tensor]:
    """What the pattern [prompt, head, query, key] may be: what was returned, then the softmax under the masks that may be meant."""
    n_queries, n_keys = query.shape[2], key.shape[2]
    if isinstance(returned, Tensor) and returned.shape == (*query.shape[:3], n_keys):
        yield returned.to(query.dtype)
    every = torch.ones(1, 1, n_queries, n_keys, dtype=torch.bool, device=query.device)
    masks = [mask] if isinstance(mask, Tensor) and mask.ndim == 4 else []
    masks += [every.tril(n_keys - n_queries) if back else every for back in dict.fromkeys((causal, True, False))]
    for one in masks:
        yield eager_of(module)(module, query, key, value, additive_mask(one, query, n_keys), **options)[1]


def _off(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))

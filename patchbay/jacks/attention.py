"""The jack at attention: q, k, v and the pattern of every head, without re-implementing a model.

142 of the 189 causal architectures of transformers call the function registered under `config._attn_implementation`. While a
session wants an attention signal, the config names a function of ours that wraps the one the model uses (SDPA, or the
family's own eager mathematics where it has a soft cap or sinks). It is registered with the mask interface too: without that,
transformers builds no mask and attention silently turns bidirectional. Layers in which nothing is wanted call straight
through. The pattern is computed only in layers, and for query rows, that are asked. Asked whole in float32 or float64 it is
computed in SDPA's place and is what the model used, which moves the logits by rounding; asked by rows, or in half precision
where that rounding would be felt, it is computed beside SDPA. No edit of a pattern reaches a key that the mask hides: it
stays 0, so that no query sees what comes after it.

Architectures that compute attention inline (GPT-J, GPT-Neo, BLOOM, Falcon) are reached at the operators that they call:
inside the attention module's forward, the first matrix product is q k^T, the softmax is the pattern, the next product is z.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from patchbay.signal.port import PatchbayError, Port

PREFIX = "patchbay_"
_ACTIVE: dict[int, Callable[..., Any]] = {}  # id(attention module) -> what attends in its place, called as `attend` is


def use_name(implementation: str) -> str:
    """Register (once) the wrapper of an attention implementation, with its mask, and return its name."""
    name = PREFIX + implementation
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, _wrapper(implementation))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


def _wrapper(implementation: str) -> Callable[..., Any]:
    def patchbay_attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        inner = eager_of(module) if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        listening = _ACTIVE.get(id(module))
        if listening is None:
            return inner(module, query, key, value, attention_mask, **options)
        return listening(inner, implementation, module, query, key, value, attention_mask, options)

    return patchbay_attention


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
    return (pattern @ _to_heads(value, query.shape[1])).transpose(1, 2), pattern


def plain_pattern(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """softmax(q k^T * scaling + mask), which is what SDPA uses and does not return: [prompt, head, query, key]."""
    scale, keys = scaling or query.shape[-1] ** -0.5, _to_heads(key, query.shape[1]).transpose(-1, -2)
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


def _to_heads(x: Tensor, n_heads: int) -> Tensor:
    """Repeat key/value groups so that every query head has its own: [prompt, group, key, d] -> [prompt, head, key, d]."""
    return x if x.shape[1] in (1, n_heads) else x.repeat_interleave(n_heads // x.shape[1], dim=1)


def additive_mask(mask: Tensor | None, query: Tensor, n_keys: int, causal: bool = True) -> Tensor:
    """The mask as numbers to add to the scores, [prompt or 1, head or 1, query, key]. Where none was given: causal, or nothing."""
    n_queries, lowest = query.shape[2], torch.finfo(query.dtype).min
    if mask is None and not causal:
        return query.new_zeros(1, 1, n_queries, n_keys)
    if mask is None:
        place = torch.arange(n_keys, device=query.device)
        mask = place[None, :] <= place[n_keys - n_queries :, None]  # [query, key]
        mask = mask[None, None]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, lowest)
    return mask[..., -n_keys:] if mask.shape[-1] > n_keys else mask


class Listener(Protocol):
    """What attention asks of the session that listens to it; `session.py` has the one there is."""

    grad: bool
    start: int
    wants: dict[tuple[str, int | None], Any]
    stash: dict[tuple[str, int], Any]

    def site(
        self, signal: str, layer: int | None, x: Tensor, n_keys: int | None = None, closed: Tensor | None = None
    ) -> Tensor: ...

    def blocked(self, layer: int, n_heads: int, n_queries: int, n_keys: int) -> Tensor | None: ...

    def query_rows(self, taps: Sequence[Port], n_queries: int) -> Tensor | None: ...

    def capture_rows(self, layer: int, pattern: Tensor, rows: Tensor) -> None: ...


def attend(
    session: Listener,
    layer: int,
    inner: Callable[..., Any],
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer with the session's taps and edits. q, k, v [prompt, head, position, d]; z [prompt, query, head, d]."""
    n_keys = key.shape[2]
    query = session.site("attn.q", layer, query)
    key = session.site("attn.k", layer, key, n_keys=n_keys)
    value = session.site("attn.v", layer, value, n_keys=n_keys)
    want = session.wants.get(("attn.pattern", layer))
    if want is None:
        return inner(module, query, key, value, mask, **options)
    if implementation not in ("sdpa", "eager"):
        raise PatchbayError(
            f"L{layer}.attn.pattern under attention {implementation!r}: the pattern is not computed there; "
            "load the model with attn_implementation='sdpa' or 'eager'"
        )
    blocked = session.blocked(layer, query.shape[1], query.shape[2], n_keys)
    eager = plain_eager if options.pop("plain", False) else eager_of(module)
    if blocked is not None or want.changes or session.grad:
        numbers = additive_mask(mask, query, n_keys, _causal(module, options))
        closed = numbers <= torch.finfo(query.dtype).min / 2
        if blocked is not None:
            _check_not_empty(numbers, blocked, layer, session.start)
            mask = numbers = numbers.masked_fill(blocked, torch.finfo(query.dtype).min)
        if want.changes or session.grad:
            _, pattern = eager(module, query, key, value, numbers, **options)
            pattern = session.site("attn.pattern", layer, pattern, closed=closed)
            return (pattern @ _to_heads(value, query.shape[1])).transpose(1, 2), pattern
    rows = session.query_rows(want.taps, query.shape[2]) if want.taps else None
    exact = query.dtype in (torch.float32, torch.float64)  # a half-precision pattern would round more than SDPA does
    if want.taps and rows is None and implementation == "sdpa" and exact:  # computed once, seen and used
        pattern = plain_pattern(
            query, key, _held_mask(session, mask, query, n_keys, _causal(module, options)), options.get("scaling")
        )
        session.site("attn.pattern", layer, pattern)
        return (pattern @ _to_heads(value, query.shape[1])).transpose(1, 2).contiguous(), None
    out = inner(module, query, key, value, mask, **options)
    if not want.taps:
        return out
    if rows is None and implementation == "eager":
        session.site("attn.pattern", layer, out[1])
        return out
    numbers = _held_mask(session, mask, query, n_keys, _causal(module, options))
    if rows is not None:
        index = rows[:, None, :, None].to(query.device)  # [prompt, 1, row, 1]
        query = query.gather(2, index.expand(-1, query.shape[1], -1, query.shape[3]))
        numbers = numbers.expand(len(query), -1, -1, -1)
        numbers = numbers.gather(2, index.expand(-1, numbers.shape[1], -1, n_keys))
    if implementation == "sdpa":
        pattern = plain_pattern(query, key, numbers, options.get("scaling"))
    else:
        _, pattern = eager(module, query, key, value[..., :1], numbers, **options)  # the values are not needed
    if rows is None:
        session.site("attn.pattern", layer, pattern)
    else:
        session.capture_rows(layer, pattern, rows)
    return out


def _held_mask(session: Listener, mask: Tensor | None, query: Tensor, n_keys: int, causal: bool) -> Tensor:
    """`additive_mask`, with the causal one kept from layer to layer."""
    if mask is not None or not causal:
        return additive_mask(mask, query, n_keys, causal)
    held = session.stash.get(("causal", n_keys))
    if held is None or (held.shape[2], held.dtype, held.device) != (query.shape[2], query.dtype, query.device):
        held = session.stash[("causal", n_keys)] = additive_mask(None, query, n_keys)
    return held


def _causal(module: nn.Module, options: dict[str, Any]) -> bool:
    """What SDPA takes a missing mask for: the call's own word, else the module's."""
    said = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if said is None else said)


def _check_not_empty(numbers: Tensor, blocked: Tensor, layer: int, start: int) -> None:
    """A query cut from every key has no attention to renormalise. `start`: position of the first query."""
    open_before = (numbers > torch.finfo(numbers.dtype).min / 2).any(-1)
    open_after = ((numbers > torch.finfo(numbers.dtype).min / 2) & ~blocked).any(-1)
    lost = (open_before & ~open_after).nonzero()
    if len(lost):
        prompt, head, row = lost[0].tolist()
        raise PatchbayError(
            f"block at L{layer}: query position {start + row} of prompt {prompt} (head {head}) is left with no key to attend to; "
            "keep at least one, for example its own position"
        )


# ---- architectures that do not ask the interface ---------------------------------------------------------------------

_PRODUCTS = {torch.matmul, torch.bmm, torch.baddbmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.baddbmm}
_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}


class Operators(TorchFunctionMode):
    """Taps and edits attention inside the forward of a module that computes it inline, by the operators it calls."""

    def __init__(self, session: Listener, layer: int, n_heads: int, module: nn.Module) -> None:
        super().__init__()
        self.session, self.layer, self.n_heads, self.module = session, layer, n_heads, module
        self.step = "scores"

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._fused(*args, **kwargs)
        if func in _PRODUCTS and min(args[0].ndim, args[-1].ndim) < 3 and not kwargs:
            return func(*args, **kwargs)  # a weight matrix: Falcon writes its projections as products
        if self.step == "scores" and func in _PRODUCTS:
            self.step = "softmax"
            at = len(args) - 2 if "batch1" not in kwargs else None
            q = kwargs["batch1"] if at is None else args[at]
            k = (kwargs["batch2"] if at is None else args[at + 1]).transpose(-1, -2)
            q, k = self._site("attn.q", q), self._site("attn.k", k, n_keys=k.shape[-2])
            if at is None:
                return func(*args, **(kwargs | {"batch1": q, "batch2": k.transpose(-1, -2)}))
            return func(*args[:at], q, k.transpose(-1, -2), **kwargs)
        if self.step == "softmax" and func in _SOFTMAX:
            self.step = "values"
            return self._pattern(func, args, kwargs)
        if self.step == "values" and func in _PRODUCTS:
            self.step = "done"
            v = self._site("attn.v", args[1], n_keys=args[1].shape[-2])
            return func(args[0], v, *args[2:], **kwargs)
        return func(*args, **kwargs)

    def _site(self, signal: str, x: Tensor, **more: int) -> Tensor:
        """Call the site with [prompt, head, position, d]; BLOOM's products see [prompt * head, position, d]."""
        if x.ndim == 4:
            return self.session.site(signal, self.layer, x, **more)
        split = x.reshape(-1, self.n_heads, *x.shape[1:])
        return self.session.site(signal, self.layer, split, **more).reshape(x.shape)

    def _pattern(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if args[0].ndim == 3:  # [prompt * head, query, key]
            split = args[0].reshape(-1, self.n_heads, *args[0].shape[1:])
            return self._pattern(func, (split, *args[1:]), kwargs).reshape(args[0].shape)
        scores = args[0]
        closed = scores <= torch.finfo(scores.dtype).min / 2
        blocked = self.session.blocked(self.layer, *scores.shape[1:])
        if blocked is not None:
            _check_not_empty(scores, blocked, self.layer, self.session.start)
            scores = scores.masked_fill(blocked, torch.finfo(scores.dtype).min)
        pattern = func(scores, *args[1:], **kwargs)
        want = self.session.wants.get(("attn.pattern", self.layer))
        rows = None if want is None or self.session.grad else self.session.query_rows(want.taps, pattern.shape[2])
        if rows is None or want is None or want.changes:
            return self.session.site("attn.pattern", self.layer, pattern, closed=closed).contiguous()  # callers view it
        index = rows[:, None, :, None].to(pattern.device).expand(-1, pattern.shape[1], -1, pattern.shape[3])
        self.session.capture_rows(self.layer, pattern.gather(2, index), rows)
        return pattern

    def _fused(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any) -> Tensor:
        def inner(_: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **__: Any) -> tuple[Tensor, None]:
            causal = options.get("is_causal", False) and mask is None
            return F.scaled_dot_product_attention(q, k, v, mask, **(options | {"is_causal": causal})).transpose(
                1, 2
            ), None

        z, _ = attend(
            self.session, self.layer, inner, "sdpa", self.module, query, key, value, attn_mask, {"plain": True}
        )
        return z.transpose(1, 2)


def listen(function: Callable[..., Any], layer: int, module: nn.Module) -> None:
    """Let `function(inner, implementation, module, query, key, value, mask, options)` attend for this module."""
    if id(module) in _ACTIVE:
        raise PatchbayError(
            f"attention of layer {layer} is already tapped or edited through another Model of the same Hugging Face model; "
            "load it once and nest `with model.edited(...)` blocks on that"
        )
    _ACTIVE[id(module)] = function


def unlisten(module: nn.Module) -> None:
    _ACTIVE.pop(id(module), None)


def pattern_rows(ports: list[Port]) -> tuple[int, ...] | None:
    """The query rows that all the pattern taps of a layer need together; None when one of them needs every row."""
    if not ports or any(port.query is None for port in ports):
        return None
    return tuple(dict.fromkeys(row for port in ports for row in port.query or ()))

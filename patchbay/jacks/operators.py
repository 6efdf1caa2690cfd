"""Architectures that compute attention, or route to experts, inline: reached at the operators that they call.

Inside an attention module's forward the first matrix product is q k^T, the softmax is the pattern, the next product is z; inside
a router's, the first linear map to one number per expert gives its logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from patchbay.jacks.attention import attend, check_not_empty
from patchbay.jacks.sites import Sites


class RouterLogits(TorchFunctionMode):
    """Inside a router's forward, the first linear map to one number per expert gives the logits: the family's own
    softmax, top-k and renormalisation follow from what `change` returns."""

    def __init__(self, n_experts: int, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.n_experts, self.change, self.done = n_experts, change, False

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.linear and not self.done and out.shape[-1] == self.n_experts:
            self.done = True
            return self.change(out)
        return out


_PRODUCTS = {torch.matmul, torch.bmm, torch.baddbmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.baddbmm}
_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}


class Operators(TorchFunctionMode):
    """Taps and edits attention inside the forward of a module that computes it inline, by the operators it calls."""

    def __init__(self, session: Sites, layer: int, n_heads: int, module: nn.Module) -> None:
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
        self.session.here.reached.add(("attn.pattern", self.layer))
        closed = scores <= torch.finfo(scores.dtype).min / 2
        blocked = self.session.blocked(self.layer, *scores.shape[1:])
        if blocked is not None:
            check_not_empty(scores, blocked, self.layer, self.session.here.start)
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

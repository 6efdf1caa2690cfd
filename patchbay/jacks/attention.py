"""The jack at attention: q, k, v and the pattern of every head, without re-implementing a model.

142 of the 189 causal architectures of transformers call the function registered under `config._attn_implementation`. While a
session wants an attention signal, the config names a function of ours that wraps the one the model uses (SDPA, or the
family's own eager mathematics where it has a soft cap or sinks). It is registered with the mask interface too: without that,
transformers builds no mask and attention silently turns bidirectional. Layers in which nothing is wanted call straight
through. The pattern is computed only in layers, and for query rows, that are asked. Asked whole in float32 or float64 it is
computed in SDPA's place and is what the model used, which moves the logits by rounding; asked by rows, or in half precision
where that rounding would be felt, it is computed beside SDPA. No edit of a pattern reaches a key that the mask hides: it
stays 0, so that no query sees what comes after it.

What the functions compute, and which are known, is in `patterns.py`.

Architectures that compute attention inline (GPT-J, GPT-Neo, BLOOM, Falcon) are reached in `operators.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from patchbay.edits.apply import row_mask
from patchbay.jacks.defaults import on_own_device
from patchbay.jacks.hooks import LOCK, Scope
from patchbay.jacks.patterns import (
    SHOWN,
    additive_mask,
    asked,
    cut,
    eager_of,
    explained,
    in_table,
    is_causal,
    plain_eager,
    plain_pattern,
    shown,
    to_heads,
)
from patchbay.jacks.sites import Sites, Want
from patchbay.signal.port import PatchbayError

PREFIX = "patchbay_"
# id(attention module) -> what attends in its place for each scope, called as `attend` is
_ACTIVE: dict[int, dict[Scope, Callable[..., Any]]] = {}
_NAMED: dict[int, list[Any]] = {}  # id(config) -> the config, the implementation it named, how many scopes wrap it


def use_name(implementation: str) -> str:
    """Register (once) the wrapper of an attention implementation, with its mask, and return its name."""
    name = PREFIX + implementation
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, _wrapper(implementation))
        if (
            implementation in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()
        ):  # else transformers gives it no mask, nor the wrapper
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


def implement(name: str, function: Callable[..., Any], row: Callable[[nn.Module], Any]) -> None:
    """Register an attention implementation with transformers, under SDPA's masks, and its row of the table."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    SHOWN[name] = row


def _wrapper(implementation: str) -> Callable[..., Any]:
    def patchbay_attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        inner = eager_of(module) if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        listening = _listening(module)
        if listening is None:
            return inner(module, query, key, value, attention_mask, **options)
        return listening(inner, implementation, module, query, key, value, attention_mask, options)

    return patchbay_attention


@on_own_device
def attend(
    session: Sites,
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
    session.here.reached.add(("attn.pattern", layer))
    causal = is_causal(module, implementation, options)
    if implementation not in ("sdpa", "eager") or not in_table(implementation):
        return _attend_asked(session, layer, inner, implementation, module, (query, key, value), mask, options)
    blocked = session.blocked(layer, query.shape[1], query.shape[2], n_keys)
    eager = plain_eager if options.pop("plain", False) else SHOWN[implementation](module)
    others = _untouched(session, want)
    plain = None if others is None else inner(module, query, key, value, mask, **options)
    if blocked is not None or want.changes or session.grad:
        numbers = additive_mask(mask, query, n_keys, causal=causal)
        closed = numbers <= torch.finfo(query.dtype).min / 2
        if blocked is not None:
            check_not_empty(numbers, blocked, layer, session.here.start)
            mask = numbers = numbers.masked_fill(blocked, torch.finfo(query.dtype).min)
        if want.changes or session.grad:
            z, pattern = eager(module, query, key, value, numbers, **options)
            pattern = explained(z, pattern, value, module) if implementation == "eager" else pattern
            pattern = session.site("attn.pattern", layer, pattern, closed=closed)
            z = (pattern @ to_heads(value, query.shape[1])).transpose(1, 2)
            return z if plain is None else torch.where(others, plain[0], z), pattern
    rows = session.query_rows(want.taps, query.shape[2]) if want.taps else None
    exact = query.dtype in (torch.float32, torch.float64)  # a half-precision pattern would round more than SDPA does
    if want.taps and rows is None and implementation == "sdpa" and exact:  # computed once, seen and used
        pattern = plain_pattern(query, key, _held_mask(session, mask, query, n_keys, causal), options.get("scaling"))
        session.site("attn.pattern", layer, pattern)
        return (pattern @ to_heads(value, query.shape[1])).transpose(1, 2).contiguous(), None
    out = inner(module, query, key, value, mask, **options)
    if plain is not None:
        out = torch.where(others, plain[0], out[0]), out[1]
    if not want.taps:
        return out
    if rows is None and implementation == "eager":
        session.site("attn.pattern", layer, explained(out[0], out[1], value, module))
        return out
    numbers = _held_mask(session, mask, query, n_keys, causal)
    if rows is not None:
        index = rows[:, None, :, None].to(query.device)  # [prompt, 1, row, 1]
        query = query.gather(2, index.expand(-1, query.shape[1], -1, query.shape[3]))
        numbers = numbers.expand(len(query), -1, -1, -1)
        numbers = numbers.gather(2, index.expand(-1, numbers.shape[1], -1, n_keys))
    if implementation == "sdpa":
        pattern = plain_pattern(query, key, numbers, options.get("scaling"))
    else:
        z, pattern = eager(module, query, key, value, numbers, **options)
        pattern = explained(z, pattern, value, module)
    if rows is None:
        session.site("attn.pattern", layer, pattern)
    else:
        session.capture_rows(layer, pattern, rows)
    return out


def _untouched(session: Sites, want: Want) -> Tensor | None:
    """Prompts of a batch whose patterns no edit of this layer names, bool [prompt, 1, 1, 1]: they keep the fused kernel's numbers, to the
    last bit. None where there is none, or a graph, which has to go through what is computed in its place."""
    if session.grad or not want.edits or any(edit.rows is None for _, edit in want.edits):
        return None
    batch = session.here.batch
    assert batch is not None
    named = torch.stack([row_mask(edit, len(batch.ids)) >= 0 for _, edit in want.edits]).any(0)
    return None if bool(named.all()) else ~named[:, None, None, None].to(batch.ids.device)


def _attend_asked(
    session: Sites,
    layer: int,
    inner: Callable[..., Any],
    implementation: str,
    module: nn.Module,
    qkv: tuple[Tensor, Tensor, Tensor],
    mask: Any,
    options: dict[str, Any],
) -> tuple[Tensor, Any]:
    """`attend` where the pattern is that of a row of the table, or is asked of an implementation that is not in it."""
    query, key, value = qkv
    want, causal = session.wants["attn.pattern", layer], is_causal(module, implementation, options)
    said, rest = in_table(implementation), None
    if said:
        z, returned, pattern, rest = shown(inner, implementation, causal, module, *qkv, mask=mask, options=options)
        numbers = additive_mask(mask, query, key.shape[2], causal=causal)
        hidden = numbers <= torch.finfo(query.dtype).min / 2
    else:
        z, returned, pattern = asked(inner, implementation, causal, module, *qkv, mask=mask, options=options)
        hidden = pattern == 0
        numbers = torch.zeros_like(pattern).masked_fill(hidden, torch.finfo(pattern.dtype).min)
    blocked = session.blocked(layer, query.shape[1], query.shape[2], key.shape[2])
    if blocked is not None:
        check_not_empty(numbers, blocked, layer, session.here.start)
        if said:  # hidden as the causal mask hides: what is left is the implementation's own
            numbers = numbers.masked_fill(blocked, torch.finfo(query.dtype).min)
            _, _, pattern, rest = shown(inner, implementation, causal, module, *qkv, mask=numbers, options=options)
        else:
            pattern = cut(pattern, blocked, implementation)
    others = _untouched(session, want)
    if blocked is not None or want.changes or session.grad:
        pattern = (
            pattern if rest is None else pattern.clone()
        )  # of what rest is made of no edit and no gradient takes part
        pattern = session.site("attn.pattern", layer, pattern, closed=hidden)
        made = (pattern @ to_heads(value, query.shape[1])).transpose(1, 2).reshape(z.shape)
        made = made if rest is None else made + rest
        return made if others is None else torch.where(others, z, made), pattern
    rows = session.query_rows(want.taps, query.shape[2])
    if rows is None:
        session.site("attn.pattern", layer, pattern)
    else:
        index = rows[:, None, :, None].to(pattern.device).expand(-1, pattern.shape[1], -1, pattern.shape[3])
        session.capture_rows(layer, pattern.gather(2, index), rows)
    return z, returned


def _held_mask(session: Sites, mask: Tensor | None, query: Tensor, n_keys: int, causal: bool) -> Tensor:
    """`additive_mask`, with the one of no mask kept from layer to layer."""
    if mask is not None:
        return additive_mask(mask, query, n_keys)
    key = ("causal" if causal else "open", n_keys)
    held = session.here.stash.get(key)
    if held is None or (held.shape[2], held.dtype, held.device) != (query.shape[2], query.dtype, query.device):
        held = session.here.stash[key] = additive_mask(None, query, n_keys, causal=causal)
    return held


def check_not_empty(numbers: Tensor, blocked: Tensor, layer: int, start: int) -> None:
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


def _listening(module: nn.Module) -> Callable[..., Any] | None:
    """What attends in the place of this module in the call that runs now."""
    found = _ACTIVE.get(id(module))
    return next((f for scope, f in reversed(list(found.items())) if scope.acts), None) if found else None


def listen(scope: Scope, function: Callable[..., Any], layer: int, module: nn.Module) -> Callable[[], None]:
    """Let `function(inner, implementation, module, query, key, value, mask, options)` attend for this module; returns the undoing."""
    with LOCK:
        if _listening(module) is not None and not scope.whole:
            raise PatchbayError(f"attention of layer {layer} is already tapped or edited here")
        _ACTIVE.setdefault(id(module), {})[scope] = function

    def undo() -> None:
        with LOCK:
            here = _ACTIVE.get(id(module), {})
            here.pop(scope, None)
            if not here:
                _ACTIVE.pop(id(module), None)

    return undo


def wrap(config: Any) -> Callable[[], None]:
    """Let the config name our wrapper of its attention implementation; returns the undoing, which the last one does."""
    with LOCK:
        held = _NAMED.get(id(config))
        if held is None:
            before = config._attn_implementation_internal
            if before.startswith(PREFIX):  # a copy of a config that was wrapped
                return lambda: None
            held = _NAMED[id(config)] = [config, before, 0]
            config._attn_implementation_internal = use_name(before)
        held[2] += 1

    def undo() -> None:
        with LOCK:
            held[2] -= 1
            if not held[2]:
                del _NAMED[id(config)]
                config._attn_implementation_internal = held[1]

    return undo

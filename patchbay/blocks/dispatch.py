"""Dispatch: one attention implementation for models whose layers attend in different ways; each module says its own.

A module with `attention_kind` attends by that kind, any other by SDPA, or where its family has terms that SDPA does not know by the family's own mathematics. `blocks` is the implementation's name in a config.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from patchbay.blocks import gla, kinds, meta_tokens
from patchbay.jacks.attention import implement
from patchbay.jacks.patterns import additive_mask, eager_of, is_causal

NAME = "blocks"


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """z [prompt, query, head, d], and no weights: the table gives them where they are asked."""
    kind = getattr(module, "attention_kind", None)
    if kind is None:
        if all(options.get(name) is None for name in kinds.UNHEARD):
            return sdpa_attention_forward(module, query, key, value, mask, **options)
        # soft caps, sinks: the family's own mathematics
        numbers = additive_mask(mask, query, key.shape[2], causal=is_causal(module, NAME, options))
        return eager_of(module)(module, query, key, value, numbers, **options)[0], None
    if kind == "gla":
        return gla.attend(module, query, key, value, mask, **options), None
    if kind == "meta":
        return meta_tokens.attend(module, query, key, value, mask, **options), None
    return kinds.attend(str(kind), module, query, key, value, mask, **options), None


def row(module: nn.Module) -> Any:
    """The module's row of the table: (module, q, k, v, numbers, **options) -> z, pattern."""
    kind = getattr(module, "attention_kind", None)
    if kind is None:
        return eager_of(module)
    if kind == "gla":
        return gla.show
    if kind == "meta":
        return meta_tokens.show
    return lambda *given, **options: kinds.show(str(kind), *given, **options)


def register() -> None:
    """Let transformers and the table know the name."""
    implement(NAME, attend, row)

"""Meta-tokens: a token that is put among others at random, and layers in which only such tokens look at one another.

    insert: token M at a share of random places; the label is left out where the target is M, and what follows M is predicted at M
    layer:  x + W_O softmax(Q K^T / sqrt(d_head) + causal + P) V,  P = 0 between places of M, else closed; rows with nothing to look at add exactly 0

so that without M in the text the model is the same model without these layers, to the last bit. A layer is a decoder layer of its own without MLP, so that heads and sums stay what they are; `masked=False` lets it look everywhere: the same
compute without the claim. The plain formula is no number on rows with nothing to look at.

Shah et al. 2025, "Language Modeling with Learned Meta-Tokens".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from patchbay.errors import PatchbayError
from patchbay.jacks.patterns import additive_mask, to_heads

IGNORED = -100


def insert(
    rows: list[list[int]], meta: int, *, share: float = 0.1, seed: int = 0
) -> tuple[list[list[int]], list[list[int]]]:
    """Texts with M after a share of their tokens, drawn for each text by itself, and labels that leave out what is M."""
    if not 0.0 <= share <= 1.0 or any(meta in row for row in rows):
        raise PatchbayError(
            f"share={share} and meta token {meta}: a share from 0 to 1, and a token that no text holds yet"
        )
    texts, labels = [], []
    for i, row in enumerate(rows):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + i)
        after = set(torch.randperm(len(row), generator=generator)[: round(share * len(row))].tolist())
        text = [token for at, own in enumerate(row) for token in ((own, meta) if at in after else (own,))]
        texts.append(text)
        labels.append([IGNORED if token == meta else token for token in text])
    return texts, labels


class MetaLayer(GradientCheckpointingLayer):
    """A decoder layer of attention alone, whose attention is among places of M (`attention_kind` "meta")."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = layer.input_layernorm, layer.self_attn

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        return hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **options)[0]  # type: ignore[no-any-return]


def show(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, numbers: Tensor, *, meta: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """z and the pattern; `meta` [prompt, position] says where M stands."""
    scaling = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    opened = (numbers > torch.finfo(numbers.dtype).min / 2) & (meta[:, None, :, None] & meta[:, None, None, :])
    scores = (query * scale) @ to_heads(key, query.shape[1]).transpose(-1, -2)
    closed = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(
        ~opened, torch.finfo(scores.dtype).min
    )
    weights = (torch.softmax(closed, -1) * opened).to(query.dtype)
    return (weights @ to_heads(value, query.shape[1])).transpose(1, 2), weights


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    """z [prompt, query, head, d], with the family's dropout in training."""
    z, weights = show(module, query, key, value, additive_mask(mask, query, key.shape[2]), **options)
    if not (module.training and options.get("dropout")):
        return z
    weights = nn.functional.dropout(weights, options["dropout"])
    return (weights @ to_heads(value, query.shape[1])).transpose(1, 2)

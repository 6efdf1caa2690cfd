"""What the finders of layers share: random draws and groups of tokens; the stream through the depth is `model/states.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchbay.model.model import Model
from patchbay.model.states import SITES, depth, last_states, lens
from patchbay.signal.port import PatchbayError

__all__ = ["SITES", "depth", "exceeded", "last_states", "lens", "permutations", "token_ids"]


def permutations(n: int, draws: int, seed: int) -> Tensor:
    """`draws` random orders of 0..n-1, [draw, n], from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(n, generator=generator) for _ in range(draws)])


def exceeded(observed: Tensor, null: Tensor) -> Tensor:
    """p that a null draw is as high as what was observed, (1 + hits) / (1 + draws): [..., ] against [draw, ...]."""
    return (1.0 + (null >= observed - 1e-12).sum(0)) / (1.0 + len(null))


def token_ids(model: Model, tokens: Any, what: str) -> list[int]:
    """Ids of a group of tokens, given as ids or as texts that are single tokens; an empty or foreign one is refused."""
    listed = list(tokens)
    found = [model.token_id(token) if isinstance(token, str) else int(token) for token in listed]
    outside = [token for token in found if not 0 <= token < model.vocab_size]
    if not found or outside:
        problem = f"token ids {outside[:5]} are outside 0..{model.vocab_size - 1}" if outside else "it has no tokens"
        raise PatchbayError(f"{what}: {problem}")
    return list(dict.fromkeys(found))

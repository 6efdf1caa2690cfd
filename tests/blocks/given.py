"""What tests of blocks are given: small models whose attention is uneven, and a text."""

from __future__ import annotations

from typing import Any

import torch

import patchbay as pb
from patchbay.tiny import twins

IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))


def built(family: str = "llama", *, seed: int = 0, **blocks: Any) -> Any:
    """A small model with blocks, its weights large enough that every mechanism matters."""
    torch.manual_seed(seed)
    hf = pb.blocks.build(twins.twin(family).config, **blocks)
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if weight.ndim > 1 and "taps" not in name:
                weight.mul_(8.0)
    return hf

"""What several decoders draw from: the nucleus of a law, and continuations drawn from it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.generation.logits_process import TopPLogitsWarper

from patchbay.signal.port import PatchbayError


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Logits [row, vocab] with -inf outside the smallest set of likeliest tokens that holds `top_p` of the law."""
    if top_p == 1.0:
        return logits
    kept: Tensor = TopPLogitsWarper(top_p)(torch.empty(0, dtype=torch.long), logits)
    return kept


def check_top_p(top_p: float) -> None:
    if not 0.0 < top_p <= 1.0:
        raise PatchbayError(f"top_p={top_p}: the share of the law that is drawn from, above 0 and up to 1")

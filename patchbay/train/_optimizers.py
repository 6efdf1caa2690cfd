"""Optimisers by name: what the Trainer is given. AdamW is its own; others stand in a file of theirs."""

from __future__ import annotations

import torch

from patchbay.signal.port import PatchbayError, suggest

NAMES = ("adamw", "cosmos")


def optimizer(name: str) -> type[torch.optim.Optimizer] | None:
    """The class, or None for the Trainer's own AdamW."""
    if name == "adamw":
        return None
    if name == "cosmos":
        from patchbay.train._cosmos import Cosmos

        return Cosmos
    raise PatchbayError(f"no optimizer {name!r}; optimizers are {', '.join(NAMES)}{suggest(name, NAMES)}")

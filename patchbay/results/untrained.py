"""Untrained: a network of a model's form with the weights that training starts from, as the control of what training brought."""

from __future__ import annotations

import copy

from patchbay.model.model import Model
from patchbay.results.method import seeded
from patchbay.signal.port import PatchbayError


def untrained(model: Model, seed: int) -> Model | str:
    """A network of the same architecture with the weights that it starts training with; or why there is none."""
    try:
        with seeded(seed):
            hf = type(model.hf)(copy.deepcopy(model.hf.config)).to(device=model.device, dtype=model.dtype)
        # False: that name is no place where a tokenizer is looked for
        return Model(hf.eval(), False, family=model.family, source="untrained")
    except (PatchbayError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"

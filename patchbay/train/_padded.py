"""Rows of other lengths in one batch: a training step pads them at the right behind a mask, and what a row's own tokens say must not depend on that.

In a causal model it does not. Where tokens see those after them (PaliGemma's prompt is one prefix) the next token is read from itself, and the mask that hides padding
closes what was open: the same row is of another model beside a longer one. Where positions are scaled by the longest row of a batch, a short row is. Both are refused, and so is a model
whose rows have other logits in a batch for another reason, by a short run.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from patchbay.model.caches import within_rounding
from patchbay.model.model import Model
from patchbay.model.regime import regimes
from patchbay.signal.port import PatchbayError
from patchbay.train._objectives._objective import collated, output_of

LENGTHS = (7, 3, 5)  # of the rows that are asked


def refuse_padding(model: Model, lengths: Iterable[int]) -> None:
    """Raise PatchbayError where rows of these lengths cannot be trained on as batches."""
    if not model.causal:
        raise PatchbayError(
            f"tokens of this {model.hf.config.model_type} model see those after them: a row shows what it is to say next, and beside a longer one, where padding is masked, "
            "it no longer does. Training is of causal models"
        )
    own = regimes(model, lengths)
    if len(set(own.values())) > 1:
        alike = [n for n, regime in own.items() if not regime]
        less = f"give rows of at most {max(alike)} tokens, or all of one length" if alike else "give rows of one length"
        raise PatchbayError(
            f"positions of this {model.hf.config.model_type} model are scaled by the longest row of a batch, and rows have {min(own)} to {max(own)} tokens: {less}"
        )
    _prove(model)


@torch.no_grad()
def _prove(model: Model) -> None:
    """Rows of several lengths give the logits of each alone."""
    limit = model.max_positions or max(LENGTHS)
    draw = torch.Generator().manual_seed(4)
    rows = [torch.randint(1, max(2, model.vocab_size // 2), (min(n, limit),), generator=draw).tolist() for n in LENGTHS]
    batch = {name: one.to(model.device) for name, one in collated([(ids, ids) for ids in rows]).items()}
    together = output_of(model.hf, batch).logits
    for row, ids in zip(together, rows, strict=True):
        alone = model.hf(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
        if not within_rounding(model, row[: len(ids)], alone):
            off = float((row[: len(ids)] - alone).abs().max())
            raise PatchbayError(
                f"a row of {len(ids)} tokens of this {model.hf.config.model_type} model has other logits alone than in a batch (by up to {off:.2g}), where padding is masked: "
                "what is learned of it would hang on the other rows"
            )

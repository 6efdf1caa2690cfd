"""Induction heads: attention heads that look at what followed this token the last time.

    score[layer, head] = mean over prompts, and over queries i whose token stood before at some p < i - 1,
                         of the sum over these p of A[i, p + 1], A the head's attention pattern

On a string that is random and then repeated, that is the attention from each token of the second copy to the token after
its first occurrence (the prefix-matching score). In [0, 1]. Two nulls: `uniform`, what even attention over all keys would
score, and `null_mean` and `null_high`, the mean and the highest score of the same head when the target is moved by up to
`SHIFTS` positions to either side: a head that looks at the earlier copy of the token itself, or at a fixed distance
around it, scores as high there. `without_first` is the score with the first key left out and the rest scaled to 1. Each
prompt counts the same. One forward pass with all patterns.

Olsson et al. 2022, "In-context Learning and Induction Heads".

It says where a head looks, not what it does with it: copying is for `direct_logit_attribution`, use by the model for
`prove.ablation`. On text that is not repeated random tokens the score mixes induction with whatever repeats there. With one
fixed distance between the copies a head that looks that far back passes for an induction head; `tasks.repeated_tokens`
draws the distance anew for every prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchbay.find._attention import (
    ATTENTION,
    GRID,
    Finder,
    after_earlier,
    looks,
    moved,
    null_of,
    parts_of,
    pattern_layers,
    repeats,
    standard_error,
    together,
)
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

SHIFTS = 3


@method(paper="olsson2022", unit="attention")
def induction_heads(model: Model, prompts: Task | list[str] | list[list[int]] | Any, *, batch_size: int = 16) -> Result:
    """Attention from each repeated token to the token after its earlier occurrence, mean over prompts.

    `prompts` must repeat themselves, as `pb.tasks.repeated_tokens(model)` does. Beside the ranking: `standard_error` over
    prompts, `without_first`, `null_mean` and `null_high` (the target moved), and `uniform` (even attention).
    """
    encoded = model.encode(prompts)
    return together(model, encoded, [finder(model, encoded)], batch_size=batch_size)[0]


def finder(model: Model, encoded: list[list[int]]) -> Finder:
    """The finder for these prompts, for `together`."""
    pattern_layers(model, "induction_heads")
    lacking = [i for i, ids in enumerate(encoded) if not repeats(ids)]
    if lacking:
        raise PatchbayError(
            f"induction_heads: {len(lacking)} of {len(encoded)} prompts repeat no token (first: prompt {lacking[0]}); use prompts "
            "that say something twice, such as pb.tasks.repeated_tokens(model)"
        )

    def targets(_: int, ids: list[int]) -> Tensor:
        """The true targets, then those moved to either side, bool [1 + move, query, key]."""
        true = after_earlier(ids)
        return torch.cat([true[None], moved(true, SHIFTS)])

    def report(seen: Tensor) -> Result:
        plain = parts_of(seen)[0]
        score, without, even, _ = (part[..., 0] for part in parts_of(seen))  # each [prompt, layer, head]
        return Result(
            {
                "score": (score.mean(0), GRID, ATTENTION),
                "standard_error": (standard_error(score), GRID, ATTENTION),
                "without_first": (without.nanmean(0), GRID, ATTENTION),
                **null_of(plain[..., 1:]),
                "uniform": (even.nanmean(), (), ATTENTION),
            }
        )

    return Finder(looks(targets), report)

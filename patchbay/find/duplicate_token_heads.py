"""Duplicate-token heads: attention heads that look at earlier occurrences of the token they stand at.

    score[layer, head] = mean over prompts, and over queries i whose token stood before,
                         of the sum over all p < i with x_p = x_i of A[i, p], A the head's attention pattern

In [0, 1]. Nulls: `uniform`, what even attention would score; `null_mean` and `null_high`, the mean and the highest score of the
same head when the target is moved by up to `SHIFTS` positions to either side, so that an induction head (one to the right)
and a head that looks back a fixed distance are told apart. `excess` is the score beyond even attention, with `low` and `high`
(95 % bootstraps over prompts) and `p` by sign flips, `p_adjusted` over all heads. `without_first` is the score with the
first key left out and the rest scaled to 1. One forward pass with all patterns.

Wang et al. 2022, "Interpretability in the Wild", where such heads tell the inhibition heads which name came twice.

It says where a head looks, not what it writes about it, nor that the model uses that: follow with `prove.ablation`. A head that
looks at similar tokens, its own among them, scores too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchbay.find._attention import (
    ATTENTION,
    GRID,
    Finder,
    clear_of,
    earlier,
    ends,
    held_out,
    looks,
    moved,
    null_of,
    parts_of,
    pattern_layers,
    together,
)
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

SHIFTS = 3


@method(paper="wang2022", unit="attention")
def duplicate_token_heads(
    model: Model, prompts: Task | list[str] | list[list[int]] | Any, *, batch_size: int = 16
) -> Result:
    """Attention from each repeated token to its own earlier occurrences, mean over prompts.

    `prompts` must repeat tokens, as `pb.tasks.repeated_tokens(model)` and `pb.tasks.indirect_object(model)` do. Beside the
    ranking: `low` and `high`, `without_first`, `null_mean` and `null_high` (the target moved), `excess` over even attention
    with `p` and `p_adjusted`, `uniform` (even attention) and `held_out`.
    """
    encoded = model.encode(prompts)
    return together(model, encoded, [finder(model, encoded)], batch_size=batch_size)[0]


def finder(model: Model, encoded: list[list[int]]) -> Finder:
    """The finder for these prompts, for `together`."""
    pattern_layers(model, "duplicate_token_heads")
    lacking = [i for i, ids in enumerate(encoded) if len(set(ids)) == len(ids)]
    if lacking:
        raise PatchbayError(
            f"duplicate_token_heads: {len(lacking)} of {len(encoded)} prompts repeat no token (first: prompt {lacking[0]}); "
            "use prompts that say something twice, such as pb.tasks.repeated_tokens(model)"
        )

    return Finder(looks(lambda _, ids: _targets(ids)), _report)


def _targets(ids: list[int]) -> Tensor:
    """The true targets, then those moved to either side, bool [1 + move, query, key]."""
    true = earlier(ids)
    return torch.cat([true[None], moved(true, SHIFTS)])


def _report(seen: Tensor) -> Result:
    plain, without, even, _ = parts_of(seen)  # each [prompt, layer, head, statistic]
    score = plain[..., 0]
    excess = score - even[..., 0]
    best, notes = held_out(score)
    return Result(
        {
            "score": (score.nanmean(0), GRID, ATTENTION),
            **ends(score),
            "without_first": (without[..., 0].nanmean(0), GRID, ATTENTION),
            **null_of(plain[..., 1:]),
            "excess": (excess.nanmean(0), GRID, ATTENTION),
            **clear_of(excess),
            **best,
            "uniform": (even[..., 0].nanmean(), (), ATTENTION),
        },
        notes=notes,
    )

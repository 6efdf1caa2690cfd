"""Previous-token heads: attention heads that look one position back.

    score[layer, head] = mean over prompts, and over queries i >= first, of A[i, i-1], A the head's attention pattern

In [0, 1]; a head that spreads its attention evenly scores `uniform`, the mean of 1 / (i + 1). Queries before `first` are left
out: of the first positions many heads can only look back, and many rest on the very first token. `without_first` is the
same with the first key left out and the rest scaled to 1. Each prompt counts the same whatever its length. One forward
pass with all patterns.

Olsson et al. 2022, "In-context Learning and Induction Heads", where such a head is the first half of the induction circuit.

It says where a head looks, not that the model uses what it finds there: follow with `prove.ablation`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchbay.find._attention import ATTENTION, GRID, Finder, looks, parts_of, pattern_layers, standard_error, together
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task


@method(paper="olsson2022", unit="attention")
def previous_token_heads(
    model: Model, prompts: Task | list[str] | list[list[int]] | Any, *, first: int = 2, batch_size: int = 16
) -> Result:
    """Attention that each head pays to the token just before, from position `first` on, mean over prompts.

    Any text will do. Beside the ranking: `standard_error` over prompts, `without_first`, and `uniform`, what even attention
    would score.

    `first`: the first position whose look back counts, from 1 on.
    """
    encoded = model.encode(prompts)
    return together(model, encoded, [finder(model, encoded, first=first)], batch_size=batch_size)[0]


def finder(model: Model, encoded: list[list[int]], *, first: int = 2) -> Finder:
    """The finder for these prompts, for `together`."""
    pattern_layers(model, "previous_token_heads")
    if first < 1:
        raise PatchbayError(f"first={first}: position 0 has no token before it, so first is at least 1")
    short = next((i for i, ids in enumerate(encoded) if len(ids) <= first), None)
    if short is not None:
        raise PatchbayError(
            f"prompt {short} has {len(encoded[short])} tokens; with first={first} each needs {first + 1} or more"
        )

    def just_before(n: int) -> Tensor:
        """Bool [query, key]."""
        target = torch.eye(n, dtype=torch.bool).roll(-1, 1)
        target[:first] = False
        return target

    def report(seen: Tensor) -> Result:
        score, without, even, _ = (part[..., 0] for part in parts_of(seen))  # each [prompt, layer, head]
        return Result(
            {
                "score": (score.mean(0), GRID, ATTENTION),
                "standard_error": (standard_error(score), GRID, ATTENTION),
                "without_first": (without.nanmean(0), GRID, ATTENTION),
                "uniform": (even.nanmean(), (), ATTENTION),
            }
        )

    return Finder(looks(lambda _, ids: just_before(len(ids))[None]), report)

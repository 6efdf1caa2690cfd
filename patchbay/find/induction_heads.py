"""Induction heads: attention heads that look at what followed this token the last time.

    score[layer, head] = mean over prompts, and over queries i whose token stood before at some p < i - 1,
                         of the sum over these p of A[i, p + 1], A the head's attention pattern

On a string that is random and then repeated, that is the attention from each token of the second copy to the token after
its first occurrence (the prefix-matching score). In [0, 1]. Two nulls: `uniform`, what even attention over all keys would
score, and `null_mean` and `null_high`, the mean and the highest score of the same head when the target is moved by up to
`SHIFTS` positions to either side: a head that looks at the earlier copy of the token itself, or at a fixed distance
around it, scores as high there. Each prompt counts the same. One forward pass with all patterns.

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

from patchbay.method import method
from patchbay.model import Model
from patchbay.port import PatchbayError, Port
from patchbay.result import Result
from patchbay.run import run
from patchbay.task import Task

SHIFTS = 3


@method(paper="olsson2022", unit="attention")
def induction_heads(model: Model, prompts: Task | list[str] | list[list[int]] | Any, *, batch_size: int = 16) -> Result:
    """Attention from each repeated token to the token after its earlier occurrence, mean over prompts.

    `prompts` must repeat themselves, as `pb.tasks.repeated_tokens(model)` does. Beside the ranking: `standard_error` over
    prompts, `null_mean` and `null_high` (the target moved), and `uniform` (even attention).
    """
    encoded = model.encode(prompts)
    layers = [i for i in range(model.n_layers) if "attn.pattern" in model.signals(i)]
    if not layers:
        raise PatchbayError(
            f"induction_heads needs attention patterns; no layer of this {model.family.name} model has them"
        )
    targets = [_targets(ids) for ids in encoded]
    lacking = [i for i, target in enumerate(targets) if not target.any()]
    if lacking:
        raise PatchbayError(
            f"induction_heads: {len(lacking)} of {len(encoded)} prompts repeat no token (first: prompt {lacking[0]}); use prompts "
            "that say something twice, such as pb.tasks.repeated_tokens(model)"
        )
    moves = [0, *(move for size in range(1, SHIFTS + 1) for move in (-size, size))]
    scores = torch.full((len(moves), len(encoded), model.n_layers, max(map(model.n_heads, layers))), torch.nan)
    for start in range(0, len(encoded), batch_size):
        trace = run(
            model, encoded[start : start + batch_size], taps=[Port("attn.pattern", i) for i in layers], logits="last"
        )
        for i in layers:
            patterns = trace[Port("attn.pattern", i)].float().cpu()  # [prompt, head, query, key]
            for n, pattern in enumerate(patterns, start=start):
                for m, move in enumerate(moves):
                    scores[m, n, i, : len(pattern)] = _paid(pattern, targets[n], move)
    score, null = scores[0], scores[1:].nanmean(1)  # [prompt, layer, head], [move, layer, head]
    even = [(target.sum(1) / torch.arange(1, len(target) + 1))[target.any(1)].mean() for target in targets]
    error = score.std(0) / len(encoded) ** 0.5 if len(encoded) > 1 else torch.full_like(score[0], torch.nan)
    grid = ("layer", "head")
    return Result(
        {
            "score": (score.mean(0), grid, "attention"),
            "standard_error": (error, grid, "attention"),
            "null_mean": (null.nanmean(0), grid, "attention"),
            "null_high": (null.nan_to_num(-1.0).amax(0).where(score[0].isfinite(), torch.nan), grid, "attention"),
            "uniform": (torch.stack(even).mean(), (), "attention"),
        }
    )


def _targets(ids: list[int]) -> Tensor:
    """Bool [query, key]: the key stands just after an earlier occurrence of the query's token, and before the query."""
    tokens = torch.tensor(ids)
    same = (tokens[:, None] == tokens[None, :]).tril(-2)  # [query, earlier position]
    return torch.nn.functional.pad(same[:, :-1], (1, 0))  # one to the right


def _paid(pattern: Tensor, target: Tensor, move: int) -> Tensor:
    """Mean attention from the queries that have a target to their targets moved by `move`, [head].

    A moved target that falls outside the keys of its query, or on another target, does not count; NaN where none is left.
    """
    n = len(target)
    place = torch.arange(n)
    moved = torch.zeros_like(target)
    moved[:, max(move, 0) : n + min(move, 0)] = target[:, max(-move, 0) : n - max(move, 0)]
    if move:
        moved &= ~target & (place[None, :] <= place[:, None])
    queries = moved.any(1)
    return (pattern[:, :n, :n] * moved)[:, queries].sum(-1).mean(-1)  # [head, query, key] -> [head]

"""Previous-token heads: attention heads that look one position back.

    score[layer, head] = mean over prompts, and over queries i >= first, of A[i, i-1], A the head's attention pattern

In [0, 1]; a head that spreads its attention evenly scores `uniform`, the mean of 1 / (i + 1). Queries before `first` are left
out: of the first positions many heads can only look back, and many rest on the very first token. Each prompt counts the
same whatever its length. One forward pass with all patterns.

Olsson et al. 2022, "In-context Learning and Induction Heads", where such a head is the first half of the induction circuit.

It says where a head looks, not that the model uses what it finds there: follow with `prove.ablation`.
"""

from __future__ import annotations

from typing import Any

import torch

from patchbay.method import method
from patchbay.model import Model
from patchbay.port import PatchbayError, Port
from patchbay.result import Result
from patchbay.run import run
from patchbay.task import Task


@method(paper="olsson2022", unit="attention")
def previous_token_heads(
    model: Model, prompts: Task | list[str] | list[list[int]] | Any, *, first: int = 2, batch_size: int = 16
) -> Result:
    """Attention that each head pays to the token just before, from position `first` on, mean over prompts.

    Any text will do. Beside the ranking: `standard_error` over prompts, and `uniform`, what even attention would score.
    """
    encoded = model.encode(prompts)
    layers = [i for i in range(model.n_layers) if "attn.pattern" in model.signals(i)]
    if not layers:
        raise PatchbayError(
            f"previous_token_heads needs attention patterns; no layer of this {model.family.name} model has them"
        )
    if first < 1:
        raise PatchbayError(f"first={first}: position 0 has no token before it, so first is at least 1")
    short = next((i for i, ids in enumerate(encoded) if len(ids) <= first), None)
    if short is not None:
        raise PatchbayError(
            f"prompt {short} has {len(encoded[short])} tokens; with first={first} each needs {first + 1} or more"
        )
    scores = torch.full((len(encoded), model.n_layers, max(map(model.n_heads, layers))), torch.nan)
    for start in range(0, len(encoded), batch_size):
        piece = slice(start, start + batch_size)
        trace = run(model, encoded[piece], taps=[Port("attn.pattern", i) for i in layers], logits="last")
        for i in layers:
            pattern = trace[Port("attn.pattern", i)]  # [prompt, head, query, key], NaN in the rows of padding
            look_back = pattern.diagonal(-1, -2, -1)[..., first - 1 :]  # [prompt, head, query - first]
            scores[piece, i, : model.n_heads(i)] = look_back.float().nanmean(-1).cpu()
    uniform = torch.tensor([sum(1 / (i + 1) for i in range(first, len(ids))) / (len(ids) - first) for ids in encoded])
    error = scores.std(0) / len(encoded) ** 0.5 if len(encoded) > 1 else torch.full_like(scores[0], torch.nan)
    return Result(
        {
            "score": (scores.mean(0), ("layer", "head"), "attention"),
            "standard_error": (error, ("layer", "head"), "attention"),
            "uniform": (uniform.mean(), (), "attention"),
        }
    )

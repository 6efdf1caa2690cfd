"""Head importance: how much each head writes, and whether that says how much the model loses without it.

    importance[layer, head] = mean over prompts and their tokens of the sum over d_model of |z W_O[head]|       (AMP, L1)
                              W_O with the factor by which the family scales what enters the stream
    norm                    = mean of the length of z W_O[head] (L2), which does not depend on the basis of the stream
    loss_increase           = mean over prompts of loss(the head set to 0) - loss, in nats per next token

One forward pass for the scores; one per head and batch for the true loss increase of `exact` heads (all, where there
are no more; else random ones), with which Spearman's correlation is printed: its bootstrap interval over prompts, p,
and the 95th percentile of random orders. Each prompt counts the same.

Mugnaini et al. 2025, "Efficient LLMs with AMP: Attention Heads and MLP Pruning" (importance; heads of one layer are
compared and the same share of every layer is cut).

A large output is not a needed one: importance ignores that heads cancel and that later parts may not read what is
written, and it depends on the calibration text. Where the heads that compute are known (docs/truth.md, by
`python -m bench.truth`) it finds none of them: the notes say so. The loss increase is of single heads: several that stand in for one
another each cost nothing, and together everything.
"""

from __future__ import annotations

from typing import Any

import torch

from patchbay.find._chance import standard_error
from patchbay.find._importance import removals, texts, token_mean
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError, Port
from patchbay.tasks.task import Task

WHAT = "head_importance"
KNOWN = (
    "the size of what a head writes does not find heads that compute: average precision 0.09 over eleven compiled programs "
    "(docs/truth.md)"
)


@method(paper="mugnaini2025")
def head_importance(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    *,
    exact: int = 128,
    batch_size: int = 16,
    seed: int = 0,
) -> Result:
    """Mean size of what each head writes on these prompts (L1 over the stream), beside what its removal costs.

    `exact`: for how many heads the true loss increase is measured; 0 for none.
    """
    layers = [i for i in range(model.n_layers) if "attn.z" in model.signals(i)]
    if not layers:
        raise PatchbayError(f"{WHAT} needs heads (attn.z); no layer of this {model.family.name} model has them")
    if exact < 0:
        raise PatchbayError(f"exact={exact}: 0 (none) or the number of heads whose removal is measured")
    encoded = texts(model, prompts, WHAT)
    shape = (model.n_layers, max(model.n_heads(i) for i in layers))
    amp, norm = (torch.full((len(encoded), *shape), torch.nan, dtype=torch.float64) for _ in range(2))
    for start in range(0, len(encoded), batch_size):
        piece = slice(start, start + batch_size)
        trace = run(model, encoded[piece], taps=[Port("attn.z", i) for i in layers], logits="last")
        for i in layers:
            z, w_o = trace[Port("attn.z", i)].nan_to_num(0.0), model.W_O(i).detach() * model.residual_scale
            for h in range(model.n_heads(i)):
                out = z[:, :, h].double() @ w_o[h].double()  # [prompt, position, d_model]
                amp[piece, i, h] = token_mean(out.abs().sum(-1), trace.lengths)
                norm[piece, i, h] = token_mean(out.norm(dim=-1), trace.lengths)
    axes = ("layer", "head")
    score = amp.mean(0)
    values: dict[str, Any] = {
        "importance": (score, axes, "stream"),
        "standard_error": (standard_error(amp), axes, "stream"),
        "norm": (norm.mean(0), axes, "stream"),
    }
    notes: list[str] = []
    if exact:
        heads = [Part(i, "head", h) for i in layers for h in range(model.n_heads(i))]
        cost, notes = removals(model, encoded, heads, {"importance": amp, "norm": norm}, exact, batch_size, seed)
        values |= cost
    return Result(values, notes=[*notes, KNOWN])

"""Neuron importance: how active each neuron is, and whether that says how much the model loses without it.

    importance[layer, neuron] = mean over prompts and their tokens of |a|, a what the down projection multiplies     (AMP)
    output                    = importance x |W_out[neuron]|: the mean length of what the neuron writes
    loss_increase             = mean over prompts of loss(the neuron set to 0) - loss, in nats per next token

One forward pass for the scores; one per neuron and batch for the true loss increase of `exact` random neurons, with
which Spearman's correlation of both scores is printed: bootstrap interval over prompts, p, and the 95th percentile of
random orders. Each prompt counts the same.

Mugnaini et al. 2025, "Efficient LLMs with AMP: Attention Heads and MLP Pruning" (importance; neurons of one layer are
compared, and the same share of every layer is cut).

Activity alone ignores how much a neuron writes, which `output` mends; both ignore whether anything reads it, and
depend on the calibration text. Single losses do not add up: neurons stand in for one another. A norm after the MLP is
left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchbay.find._chance import standard_error
from patchbay.find._importance import removals, texts, token_mean
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.model.weights import matrix
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError, Port
from patchbay.tasks.task import Task

WHAT = "neuron_importance"


@method(paper="mugnaini2025")
def neuron_importance(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    *,
    exact: int = 64,
    batch_size: int = 16,
    seed: int = 0,
) -> Result:
    """Mean absolute activation of each neuron on these prompts, beside what the removal of `exact` of them costs.

    `exact`: for how many random neurons the true loss increase is measured; 0 for none.
    """
    layers = [i for i in range(model.n_layers) if "mlp.act" in model.signals(i)]
    if not layers:
        raise PatchbayError(
            f"{WHAT} needs neuron activations (mlp.act); no layer of this {model.family.name} model has them"
            + (
                "; its neurons are inside fused experts"
                if any(model.n_experts(i) for i in range(model.n_layers))
                else ""
            )
        )
    if exact < 0:
        raise PatchbayError(f"exact={exact}: 0 (none) or the number of neurons whose removal is measured")
    encoded = texts(model, prompts, WHAT)
    shape = (model.n_layers, max(model.n_neurons(i) for i in layers))
    amp = torch.full((len(encoded), *shape), torch.nan, dtype=torch.float64)
    for start in range(0, len(encoded), batch_size):
        piece = slice(start, start + batch_size)
        trace = run(model, encoded[piece], taps=[Port("mlp.act", i) for i in layers], logits="last")
        for i in layers:
            amp[piece, i, : model.n_neurons(i)] = token_mean(trace[Port("mlp.act", i)].abs(), trace.lengths)
    writes = torch.full(shape, torch.nan, dtype=torch.float64)
    for i in layers:
        writes[i, : model.n_neurons(i)] = _writes(model, i)
    axes, score = ("layer", "neuron"), amp.mean(0)
    values: dict[str, Any] = {
        "importance": (score, axes, "activation"),
        "standard_error": (standard_error(amp), axes, "activation"),
        "output": (score * writes, axes, "stream"),
    }
    notes: list[str] = []
    if exact:
        neurons = [Part(i, "neuron", n) for i in layers for n in range(model.n_neurons(i))]
        scores = {"importance": amp, "output": amp * writes}
        cost, notes = removals(model, encoded, neurons, scores, exact, batch_size, seed)
        values |= cost
    return Result(values, notes=notes)


def _writes(model: Model, layer: int) -> Tensor:
    """Length of what each neuron of a layer writes at activation 1, [neuron]."""
    at = model.modules[layer]
    assert at.mlp_proj is not None
    return matrix(at.mlp_proj).detach().double().norm(dim=1).cpu() * model.residual_scale

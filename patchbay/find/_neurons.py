"""Neurons' activations, one number for each prompt; and what to say where a model has no neurons that can be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.signal.port import PatchbayError, Port

Pool = Literal["last", "mean", "max", "median"]
POOLS = ("last", "mean", "max", "median")


def neuron_layers(model: Model, what: str) -> tuple[list[int], list[str]]:
    """Layers with neurons that can be tapped, and notes on the others; an error where there is none."""
    layers = [i for i in range(model.n_layers) if "mlp.act" in model.signals(i)]
    routed = [i for i in range(model.n_layers) if model.n_experts(i)]
    inside = (
        "the neurons of its experts lie inside fused parameters, which have no port: see find.expert_specialisation"
    )
    if not layers:
        raise PatchbayError(
            f"{what} needs neurons (mlp.act), and no layer of this {model.family.name} model offers act"
            + (f"; {inside}" if routed else "; it has no MLP between projections")
        )
    notes = []
    lacking = [i for i in range(model.n_layers) if i not in layers]
    if lacking:
        reason = inside.replace("its experts", "the experts there") if set(lacking) & set(routed) else "no MLP there"
        notes.append(f"layers {_few(lacking)} are left out: {reason}")
    return layers, notes


def _few(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers[:8])) + (", ..." if len(layers) > 8 else "")


@torch.no_grad()
def activations(
    model: Model, prompts: Sequence[Sequence[int]], layers: Sequence[int], pool: Pool, batch_size: int
) -> Tensor:
    """Each neuron's activation on each prompt, at its last token or pooled over its tokens: [prompt, layer, neuron].

    NaN in layers that have none, and where a layer has fewer neurons than another.
    """
    widest = max(model.n_neurons(i) for i in layers)
    found = torch.full((len(prompts), model.n_layers, widest), torch.nan)
    for start in range(0, len(prompts), batch_size):
        batch = [list(ids) for ids in prompts[start : start + batch_size]]
        trace = run(model, batch, taps=[Port("mlp.act", i) for i in layers], logits="last")
        for i in layers:
            port = Port("mlp.act", i)
            value = trace.last(port) if pool == "last" else _pooled(trace[port], pool)  # [prompt, neuron]
            found[start : start + len(batch), i, : value.shape[1]] = value.float().cpu()
    return found


def _pooled(signal: Tensor, pool: Pool) -> Tensor:
    """[prompt, position, neuron] over positions; padding is NaN and does not count."""
    if pool == "mean":
        return signal.float().nanmean(1)
    if pool == "median":
        return signal.float().nanmedian(1).values
    return signal.float().nan_to_num(nan=-torch.inf).amax(1)

"""Reading: what a feature or a neuron writes to the stream, what that says to the logits, and which others write nearly the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patchbay.model.cards import FEATURES
from patchbay.model.model import Model
from patchbay.model.weights import norm_parts
from patchbay.signal.port import Part, PatchbayError

KINDS = ("neuron", *FEATURES)


def written(model: Model, layer: int, kind: str) -> Tensor:
    """What each feature, or neuron, of a layer adds to the stream at activation 1, up to the scale of a norm behind it: [feature, d_model]."""
    if kind == "neuron":
        return _neurons(model, layer, model.layers[layer].mlp.weights().W_out.detach().float())
    dictionary: Any = model.dictionaries[layer, f"{kind}s"]
    rows = dictionary.W_dec.detach().float()
    if dictionary.writes == "attn.z":
        w_o = model.W_O(layer).detach().float()
        return torch.einsum("fhd,hdm->fm", rows.unflatten(1, (w_o.shape[0], -1)), w_o)
    if dictionary.writes == "mlp.act":
        return _neurons(model, layer, rows @ model.layers[layer].mlp.weights().W_out.detach().float())
    return rows


def _neurons(model: Model, layer: int, rows: Tensor) -> Tensor:
    at = model.modules[layer]
    if at.mlp_added is None or at.mlp_added is at.mlp or at.mlp_added is at.mlp_proj:
        return rows
    gain, _, centred = norm_parts(at.mlp_added)
    return (rows - rows.mean(1, keepdim=True) if centred else rows) * gain.detach().float()


def logit_effect(model: Model, rows: Tensor) -> Tensor:
    """What writes [n, d_model] say to the logits, each less their mean, up to the final norm's scale: [n, vocab]. Its gain and centring are in."""
    gain, _, centred = norm_parts(model.final_norm_module)
    rows = rows - rows.mean(1, keepdim=True) if centred else rows
    effect = (rows * gain.detach().float().to(rows)) @ model.unembed.weight.detach().float().T
    return effect - effect.mean(1, keepdim=True)


def nearest(rows: Tensor, index: int, n: int) -> list[tuple[int, float]]:
    """The `n` others whose writes have the largest cosine with one's, and the cosines."""
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    cosines = unit @ unit[index]
    cosines[index] = -torch.inf
    top = cosines.topk(min(n, len(rows) - 1))
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def check_parts(model: Model, parts: Sequence[Part], what: str) -> None:
    """Raise unless all parts are features or neurons that the model has."""
    for part in parts:
        if part.kind not in KINDS or part.index is None:
            raise PatchbayError(f"{what}: {part} is no feature and no neuron; name some, such as L1.mlp.F3 or L2.N77")
        model.require(part.port())

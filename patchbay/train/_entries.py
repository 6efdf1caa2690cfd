"""Entries: which numbers of which tensors belong to a part, whatever way the family stores its weights.

A copy of the layer holds, in place of its weights, their own places 0, 1, 2, ...; what `weights` cuts out of that copy for a
head or a neuron are then the places of its weights. So there is one description of every layout, that of `weights`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from patchbay.model.linear import bias_of
from patchbay.model.model import Model, weights
from patchbay.model.placing import LayerModules, follow, layer_modules
from patchbay.signal.port import Part, PatchbayError

Entries = dict[str, Tensor]  # tensor name -> its flat places, int64


def entries(model: Model, parts: Sequence[Part]) -> Entries:
    """The entries of all the parts together, by the names of the model's parameters."""
    found: dict[str, list[Tensor]] = {}
    for own in each(model, list(dict.fromkeys(parts))):
        for name, places in own.items():
            found.setdefault(name, []).append(places)
    return {name: torch.cat(pieces).unique() for name, pieces in sorted(found.items())}


def each(model: Model, parts: Sequence[Part]) -> list[Entries]:
    """The entries of each part by itself."""
    names = {id(parameter): name for name, parameter in model.hf.named_parameters()}
    numbered: dict[int, Numbered] = {}
    listed = []
    for part in parts:
        found: dict[str, list[Tensor]] = {}
        if part.kind in ("head", "group", "neuron", "expert"):
            model.require(part.port())
            layer = part.layer or 0
            if layer not in numbered:
                numbered[layer] = Numbered(model, layer)
            own = numbered[layer]
            for places in own.of(part):
                for parameter, inside in own.split(places):
                    found.setdefault(names[id(parameter)], []).append(inside.flatten().long())
        else:
            for parameter in _whole(model, part).parameters():
                found.setdefault(names[id(parameter)], []).append(torch.arange(parameter.numel()))
        listed.append({name: torch.cat(pieces).unique() for name, pieces in sorted(found.items())})
    return listed


def _whole(model: Model, part: Part) -> nn.Module:
    """The module of a part that is one."""
    if part.layer is None:
        modules: dict[str, Any] = {
            "embed": model.hf.get_input_embeddings(),
            "final_norm": model.final_norm_module,
            "unembed": model.hf.get_output_embeddings(),
        }
        found = modules[part.kind]
    else:
        if not part.layer < model.n_layers:
            raise PatchbayError(f"{part}: the model has layers 0..{model.n_layers - 1}")
        at = model.modules[part.layer]
        found = {"layer": at.layer, "attn": at.attn or at.attn_added, "mlp": at.mlp, "router": at.router}.get(part.kind)
    if not isinstance(found, nn.Module) or not any(True for _ in found.parameters()):
        raise PatchbayError(f"{part}: this {model.family.name} model has no weights there")
    return found


class Numbered:
    """A layer whose weights are their own places."""

    def __init__(self, model: Model, layer: int) -> None:
        self.model, self.layer = model, layer
        self.own = list(model.modules[layer].layer.parameters())
        for parameter in self.own:
            if not parameter.is_floating_point():
                raise PatchbayError(f"layer {layer} holds {parameter.dtype}: only floating-point weights are tuned")
        ends = torch.tensor([parameter.numel() for parameter in self.own]).cumsum(0)
        self.starts = torch.cat([torch.zeros(1, dtype=torch.long), ends[:-1]])
        twin = copy.deepcopy(model.modules[layer].layer)
        for parameter, start in zip(twin.parameters(), self.starts.tolist(), strict=True):
            places = torch.arange(start, start + parameter.numel(), dtype=torch.float64)
            parameter.data = places.reshape(parameter.shape)
        self.at: LayerModules = layer_modules(model.family, twin, model.config)
        self._heads: weights.HeadWeights | None = None
        self._mlp: weights.MLPWeights | None = None

    def of(self, part: Part) -> list[Tensor]:
        """Places of a head's, group's, neuron's or expert's weights."""
        index = part.index or 0
        if part.kind == "expert":
            assert self.at.experts is not None
            n = self.model.n_experts(self.layer)
            return [p.detach()[index] for p in self.at.experts.parameters() if p.ndim > 1 and p.shape[0] == n]
        if part.kind == "neuron":
            if self._mlp is None:
                self._mlp = weights.mlp_weights(self.model.family, self.at)
            w = self._mlp
            columns = [one[:, index] for one in (w.W_in, w.W_gate) if one is not None]
            biases = [one[index] for one in (w.b_in, w.b_gate) if one is not None]
            return [*columns, *biases, w.W_out[index]]
        return self._of_head(part, index)

    def _of_latent_head(self, part: Part, index: int) -> list[Tensor]:
        """A head's columns of the maps out of the latents, which no other head reads, and its rows of W_O; the latents are all heads'."""
        assert self.at.attn_proj is not None
        n, attn = self.model.n_heads(self.layer), self.at.attn
        q_up, kv_up = (follow(attn, self.model.family.qkv_modules[i]) for i in (2, 5))
        shared = _columns_of(kv_up, n, index)
        if part.kind == "group":
            return shared
        return [*_columns_of(q_up, n, index), *shared, weights.output_weights(self.at, n)[index]]

    def _of_head(self, part: Part, index: int) -> list[Tensor]:
        if self.model.family.qkv == "latent":
            return self._of_latent_head(part, index)
        if self._heads is None:
            shape = (self.model.n_heads(self.layer), self.model.n_groups(self.layer), self.model.d_head(self.layer))
            self._heads = weights.head_weights(self.model.family, self.at, *shape)
        w = self._heads
        shared = [one for one in (w.W_K, w.W_V, w.b_K, w.b_V) if one is not None]
        if part.kind == "group":
            return [one[index] for one in shared]
        own = [one[index] for one in (w.W_Q, w.b_Q, w.W_O) if one is not None]
        alone = len(w.W_K) == len(w.W_Q) and (len(w.W_K) == 1 or not torch.equal(w.W_K[0], w.W_K[1]))
        return own + [one[index] for one in shared] if alone else own

    def split(self, places: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """Places of the layer as (parameter, places in it)."""
        flat = places.detach().flatten().long()
        which = torch.searchsorted(self.starts, flat, right=True) - 1
        return [(self.own[i], flat[which == i] - self.starts[i]) for i in which.unique().tolist()]


def _columns_of(module: nn.Module | None, n_heads: int, head: int) -> list[Tensor]:
    """A head's columns of a linear map [in, out], and of its bias."""
    assert module is not None
    bias = bias_of(module)
    found = [weights.matrix(module).unflatten(1, (n_heads, -1))[:, head]]
    return found if bias is None else [*found, bias.unflatten(0, (n_heads, -1))[head]]

"""Weights by part: W_Q, W_K, W_V, W_O of every head and the MLP's in, gate and out, whatever way the family stores them.

Row-vector convention: `q = x @ W_Q[head] + b_Q[head]`, with x what the layer's norm returned. Between that and the port `q`
stand what the family has of rotary, a norm of queries and keys, and in OPT the scale 1 / sqrt(d_head); nothing for v. W_Q [head, d_model, d_head],
W_K and W_V [group, d_model, d_head] (grouped-query heads share them), W_O [head, d_head, d_model]. These are the model's own
numbers; `fold_norm=True` folds the gain, bias and centring of the norm before them into copies, so that `x` may be the
normalised but not yet scaled stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patchbay.families import Family, LayerModules, follow
from patchbay.port import PatchbayError


@dataclass(frozen=True)
class HeadWeights:
    """Per-head weights of one attention layer; biases are None where the model has none."""

    W_Q: Tensor  # [head, d_model, d_head]
    W_K: Tensor  # [group, d_model, d_head]
    W_V: Tensor  # [group, d_model, d_head]
    W_O: Tensor  # [head, d_head, d_model]
    b_Q: Tensor | None = None  # [head, d_head]
    b_K: Tensor | None = None  # [group, d_head]
    b_V: Tensor | None = None  # [group, d_head]
    b_O: Tensor | None = None  # [d_model]

    def W_OV(self, head: int) -> Tensor:
        """W_V W_O of one query head, through its group: [d_model, d_model]."""
        return self.W_V[head * len(self.W_V) // len(self.W_Q)] @ self.W_O[head]

    def W_QK(self, head: int) -> Tensor:
        """W_Q W_K^T of one query head at rotary offset 0: [d_model, d_model]."""
        return self.W_Q[head] @ self.W_K[head * len(self.W_K) // len(self.W_Q)].T


@dataclass(frozen=True)
class MLPWeights:
    """W_in [d_model, neuron], W_gate likewise or None, W_out [neuron, d_model]; biases or None."""

    W_in: Tensor
    W_out: Tensor
    W_gate: Tensor | None = None
    b_in: Tensor | None = None
    b_gate: Tensor | None = None
    b_out: Tensor | None = None


def matrix(module: nn.Module) -> Tensor:
    """The weight of a linear map as [in, out]: Conv1D stores it so, Linear the other way round."""
    weight = module.weight
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise PatchbayError(
            f"{type(module).__name__} holds no plain floating-point matrix (quantised weights are not read)"
        )
    return weight if type(module).__name__ == "Conv1D" else weight.T


def output_weights(at: LayerModules, n_heads: int) -> Tensor:
    """W_O [head, d_head, d_model]."""
    assert at.attn_proj is not None
    return matrix(at.attn_proj).unflatten(0, (n_heads, -1))


def _columns(family: Family, n_heads: int, n_groups: int, d_head: int) -> list[Tensor]:
    """Column indices of q, k and v in the fused projection's output, each [head or group, d_head]."""
    place = torch.arange((n_heads + 2 * n_groups) * d_head)
    if family.qkv == "packed":  # all q, then all k, then all v
        q, k, v = place.split([n_heads * d_head, n_groups * d_head, n_groups * d_head])
        return [q.view(n_heads, d_head), k.view(n_groups, d_head), v.view(n_groups, d_head)]
    per_group = place.view(n_groups, n_heads // n_groups + 2, d_head)  # a group's queries, then its key and its value
    return [per_group[:, :-2].reshape(n_heads, d_head), per_group[:, -2], per_group[:, -1]]


def head_weights(
    family: Family, at: LayerModules, n_heads: int, n_groups: int, d_head: int, *, fold_norm: bool = False
) -> HeadWeights:
    """The layer's weights by head. Refuses layouts in which q, k or v is not a linear map of the normed stream."""
    if family.qkv == "latent":
        raise PatchbayError(
            f"{family.name}: keys and values pass a norm inside a compressed latent, so W_Q, W_K, W_V are not single matrices; "
            "ports q, k, v, z and W_O are available"
        )
    assert at.attn is not None
    assert at.attn_proj is not None
    modules: list[Any] = [follow(at.attn, name) for name in family.qkv_modules]
    if any(module is None for module in modules):
        raise PatchbayError(
            f"{type(at.attn).__name__} has no {', '.join(family.qkv_modules)}; give a family row that names them"
        )
    if len(modules) == 1:
        weight, bias = matrix(modules[0]), modules[0].bias
        n_stored = (weight.shape[1] // d_head - n_heads) // 2
        columns = _columns(family, n_heads, n_stored, d_head)
        columns[1:] = [
            c.repeat_interleave(n_groups // n_stored, 0) for c in columns[1:]
        ]  # Falcon copies them for each head
        weights = [weight[:, c].movedim(1, 0) for c in columns]  # [head, d_model, d_head]
        biases = [None if bias is None else bias[c] for c in columns]
    else:
        counts = (n_heads, n_groups, n_groups)
        weights = [matrix(m).unflatten(1, (n, -1)).movedim(1, 0) for m, n in zip(modules, counts, strict=True)]
        biases = [
            None if m.bias is None else m.bias.unflatten(0, (n, -1)) for m, n in zip(modules, counts, strict=True)
        ]
        if family.qkv == "gated":  # the query projection also gives the output gate, after each head's query
            weights[0] = weights[0][..., :d_head]
            biases[0] = None if biases[0] is None else biases[0][..., :d_head]
    if fold_norm and _norm(at.norm_attn, family.norm_attn, at) is not None:
        pairs = [folded(at.norm_attn, w, b) for w, b in zip(weights, biases, strict=True)]
        weights, biases = [w for w, _ in pairs], [b for _, b in pairs]
    (w_q, w_k, w_v), (b_q, b_k, b_v) = weights, biases
    b_o = getattr(at.attn_proj, "bias", None)
    return HeadWeights(w_q, w_k, w_v, output_weights(at, n_heads), b_q, b_k, b_v, b_o)


def _norm(norm: nn.Module | None, path: str, at: LayerModules) -> nn.Module | None:
    """The norm to fold: None where the family has none there, an error where its row names one that is missing."""
    if norm is None and path:
        raise PatchbayError(
            f"{type(at.layer).__name__} has no {path.replace('|', ' or ')}: give a family row that names its norm"
        )
    return norm


def mlp_weights(family: Family, at: LayerModules, *, fold_norm: bool = False) -> MLPWeights:
    """The layer's MLP weights; a fused gate-and-up projection is split."""
    if at.mlp_proj is None or at.mlp_up is None:
        raise PatchbayError(f"{type(at.layer).__name__} has no plain MLP (experts: see layer.experts)")
    w_out, b_out = matrix(at.mlp_proj), getattr(at.mlp_proj, "bias", None)
    w_in, b_in = matrix(at.mlp_up), getattr(at.mlp_up, "bias", None)
    w_gate, b_gate = None, None
    if at.mlp_gate is not None:
        w_gate, b_gate = matrix(at.mlp_gate), getattr(at.mlp_gate, "bias", None)
    elif w_in.shape[1] == 2 * w_out.shape[0]:  # gate first, then up
        w_gate, w_in = w_in.chunk(2, 1)
        b_gate, b_in = (None, None) if b_in is None else b_in.chunk(2)
    if fold_norm and _norm(at.norm_mlp, family.norm_mlp, at) is not None:
        w_in, b_in = folded(at.norm_mlp, w_in, b_in)
        if w_gate is not None:
            w_gate, b_gate = folded(at.norm_mlp, w_gate, b_gate)
    return MLPWeights(w_in, w_out, w_gate, b_in, b_gate, b_out)


def norm_parts(norm: nn.Module) -> tuple[Tensor, Tensor | None, bool]:
    """(gain, bias, centring) of a norm, measured on it: norms store the gain as w or as 1 + w, and some centre first."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if weight is None:
        raise PatchbayError(f"{type(norm).__name__} has no weight to read a gain from")
    probe = torch.randn(weight.shape[-1], generator=torch.Generator().manual_seed(0)).to(weight) + 0.5
    with torch.no_grad():
        out = norm(probe[None, None])[0, 0].double()
    out = out if bias is None else out - bias.detach().double()
    for centred in (False, True):
        x = probe.double() - probe.double().mean() if centred else probe.double()
        unit = x / x.pow(2).mean().sqrt()
        for gain in (weight, 1 + weight):
            if torch.allclose(out, gain.detach().double() * unit, rtol=1e-2, atol=1e-3 * float(out.abs().max())):
                return gain, bias, centred
    raise PatchbayError(
        f"{type(norm).__name__} is neither LayerNorm nor RMSNorm with gain w or 1 + w: it cannot be folded"
    )


def folded(norm: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A linear map behind a norm, with the norm's gain, bias and centring folded in: weight [..., d_model, out]."""
    gain, shift, centred = norm_parts(norm)
    new = gain[:, None] * weight
    if centred:
        new = new - new.mean(-2, keepdim=True)  # subtracting the stream's mean first is subtracting each column's mean
    if shift is not None:
        moved = shift @ weight
        bias = moved if bias is None else bias + moved
    return new, bias

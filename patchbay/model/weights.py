"""Weights by part: W_Q, W_K, W_V, W_O of every head and the MLP's in, gate and out, whatever way the family stores them.

Row-vector convention: `q = x @ W_Q[head] + b_Q[head]`, with x what the layer's norm returned. Between that and the port `q`
stand what the family has of rotary, a norm of queries and keys, and in OPT the scale 1 / sqrt(d_head); nothing for v. W_Q [head, d_model, d_head],
W_K and W_V [group, d_model, d_head] (grouped-query heads share them), W_O [head, d_head, d_model]. These are the model's own
numbers; `fold_norm=True` folds the gain, bias and centring of the norm before them into copies, so that `x` may be the
normalised but not yet scaled stream.

Latent attention (DeepSeek) makes keys, values and often queries of a compressed latent, c = x W_down, that passes an RMS norm
on its way: v = n(x) c gain W_up, with one positive number n(x) = 1 / sqrt(mean(c^2) + eps) for each token. So the maps are the
products W_down gain W_up times one number per layer in place of n(x). By convention that is the one of the root mean square
latent of an isotropic unit-variance stream, which weights alone give: n = 1 / sqrt(|W_down|_F^2 / d_latent + eps), the layer's
norm folded in (and its bias counted, where there is one). Directions are exact; n is right up to a factor per token,
`inner_rates`, times which x W_Q, x W_K and x W_V are the tapped q, k and v. Composition scores do not depend on the n of
queries, and those of values on none. A key's rotary part comes without that norm: the n of keys weighs its two parts
against each other, and with that W_QK, the scores of queries and keys alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patchbay.model.families import Family
from patchbay.model.linear import Linear, bias_of, is_plain, linear_map, there
from patchbay.model.placing import LayerModules, follow
from patchbay.signal.port import PatchbayError

# modules that norm queries and keys, by their names
QUERY_KEY_NORMS: tuple[tuple[str, str], ...] = (
    ("q_norm", "k_norm"),
    ("q_layernorm", "k_layernorm"),
    ("query_layernorm", "key_layernorm"),
)
QUERY_KEY_NORMS += (("qk_norm", "qk_norm"),)


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
class Latent:
    """x W_down + b_down, an RMS norm, then W_up: what latent attention has for queries, and for keys and values.

    `rate`: the number in place of the norm's 1 / length, by the convention above."""

    W_down: Tensor  # [d_model, d_latent]
    W_up: Tensor  # [head, d_latent, width], the norm's gain folded in
    rate: Tensor
    epsilon: float
    b_down: Tensor | None = None  # [d_latent]

    def rates(self, x: Tensor) -> Tensor:
        """What the norm does to tokens x [..., d_model], in units of `rate`: [..., 1]."""
        latent = x.double() @ self.W_down.detach().double()
        latent = latent if self.b_down is None else latent + self.b_down.detach().double()
        return (latent.pow(2).mean(-1, keepdim=True) + self.epsilon).rsqrt() / self.rate.double()

    def maps(self) -> tuple[Tensor, Tensor | None]:
        """W_down W_up times `rate`, [head, d_model, width], and the bias [head, width]; summed in float32 or better."""
        kept, wide = self.W_up.dtype, torch.promote_types(self.W_up.dtype, torch.float32)
        up = self.W_up.to(wide) * self.rate.to(wide)
        bias = None if self.b_down is None else (self.b_down.to(wide) @ up).to(kept)
        return (self.W_down.to(wide) @ up).to(kept), bias


@dataclass(frozen=True)
class LatentWeights:
    """The factors of one layer of latent attention: queries (None where they are one plain map), keys and values, and the keys'
    rotary part, which all heads share. W_up of keys and values holds the unturned part of the key, then the value."""

    query: Latent | None
    key_value: Latent
    W_rotary: Tensor  # [d_model, n_rotary]
    b_rotary: Tensor | None
    order: Tensor  # the rotary part's dimensions as the port has them at position 0

    def split(self, x: Tensor, d_head: int) -> list[Tensor]:
        """Unturned key and value of the last axis of `x`."""
        n = d_head - self.W_rotary.shape[1]
        return [x[..., :n], x[..., n:]]


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
    """The matrix [in, out] that a module maps with now, adapters and parametrisations included: see `linear.py`."""
    return linear_map(module)[0]


def of_layer(at: LayerModules, module: nn.Module | None) -> Linear:
    """A linear map of a layer; weights that are not stored as plain numbers come in the dtype that the model computes in."""
    at.refuse_replaced()
    weight, bias = linear_map(module)
    if is_plain(module):
        return weight, bias
    return weight.to(at.dtype), None if bias is None else bias.to(at.dtype)


def output_weights(at: LayerModules, n_heads: int) -> Tensor:
    """W_O [head, d_head, d_model]."""
    assert at.attn_proj is not None
    return of_layer(at, at.attn_proj)[0].unflatten(0, (n_heads, -1))


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
    """The layer's weights by head; of latent attention the products of its factors, by the convention above."""
    assert at.attn_proj is not None
    made = _latent_maps if family.qkv == "latent" else _plain_maps
    weights, biases = made(family, at, n_heads, n_groups, d_head)
    if fold_norm and _norm(at.norm_attn, family.norm_attn, at) is not None:
        pairs = [folded(at.norm_attn, w, b) for w, b in zip(weights, biases, strict=True)]
        weights, biases = [w for w, _ in pairs], [b for _, b in pairs]
    (w_q, w_k, w_v), (b_q, b_k, b_v) = weights, biases
    b_o = of_layer(at, at.attn_proj)[1]
    return HeadWeights(w_q, w_k, w_v, output_weights(at, n_heads), b_q, b_k, b_v, b_o)


Maps = tuple[
    list[Tensor], list[Tensor | None]
]  # of q, k and v: [head or group, d_model, d_head], [head or group, d_head]


def _plain_maps(family: Family, at: LayerModules, n_heads: int, n_groups: int, d_head: int) -> Maps:
    modules: list[Any] = [follow(at.attn, name) for name in family.qkv_modules]
    if any(module is None for module in modules):
        raise PatchbayError(
            f"{type(at.attn).__name__} has no {', '.join(family.qkv_modules)}; give a family row that names them"
        )
    if len(modules) == 1:
        weight, bias = of_layer(at, modules[0])
        n_stored = (weight.shape[1] // d_head - n_heads) // 2
        columns = _columns(family, n_heads, n_stored, d_head)
        columns[1:] = [
            c.repeat_interleave(n_groups // n_stored, 0) for c in columns[1:]
        ]  # Falcon copies them for each head
        weights = [weight[:, c].movedim(1, 0) for c in columns]  # [head, d_model, d_head]
        biases = [None if bias is None else bias[c] for c in columns]
    else:
        maps = [of_layer(at, module) for module in modules]
        n_stored = max(maps[1][0].shape[1] // d_head, 1)
        n_stored = n_stored if n_groups % n_stored == 0 else n_groups
        counts = (n_heads, n_stored, n_stored)
        weights = [w.unflatten(1, (n, -1)).movedim(1, 0) for (w, _), n in zip(maps, counts, strict=True)]
        biases = [None if b is None else b.unflatten(0, (n, -1)) for (_, b), n in zip(maps, counts, strict=True)]
        if n_stored != n_groups:  # inline attention that copies them for each head
            weights[1:] = [w.repeat_interleave(n_groups // n_stored, 0) for w in weights[1:]]
            biases[1:] = [None if b is None else b.repeat_interleave(n_groups // n_stored, 0) for b in biases[1:]]
        if family.qkv == "gated":  # the query projection also gives the output gate, after each head's query
            weights[0] = weights[0][..., :d_head]
            biases[0] = None if biases[0] is None else biases[0][..., :d_head]
    return weights, biases


# --- latent attention -----------------------------------------------------------------------------------


def latent_weights(family: Family, at: LayerModules, n_heads: int) -> LatentWeights:
    """The factors of a layer of latent attention, by the modules that the family's row names."""
    q_down, q_norm, _, kv_down, kv_norm, kv_up = (follow(at.attn, name) for name in family.qkv_modules)
    if kv_down is None or kv_norm is None or kv_up is None:
        raise PatchbayError(
            f"{type(at.attn).__name__} has no {', '.join(family.qkv_modules[3:])}; give a family row that names them"
        )
    n = int(norm_parts(kv_norm)[0].numel())
    down, bias = of_layer(at, kv_down)
    n_rotary = down.shape[1] - n
    order = torch.arange(n_rotary, device=down.device)
    if getattr(
        getattr(at.attn, "config", None), "rope_interleave", False
    ):  # neighbours that turn together are put apart
        order = torch.cat([order[::2], order[1::2]])
    key_value = _latent(at, down[:, :n], None if bias is None else bias[:n], kv_norm, kv_up, n_heads)
    query = None
    if q_down is not None and q_norm is not None:
        q_up = follow(at.attn, family.qkv_modules[2])
        query = _latent(at, *of_layer(at, q_down), q_norm, q_up, n_heads)
    return LatentWeights(query, key_value, down[:, n:], None if bias is None else bias[n:], order)


def _latent(at: LayerModules, down: Tensor, bias: Tensor | None, norm: Any, up: Any, n_heads: int) -> Latent:
    gain, shift, centred = norm_parts(norm)
    if shift is not None or centred or bias_of(up) is not None:
        raise PatchbayError(
            f"{type(at.attn).__name__}: its latent passes {type(norm).__name__}, which is no plain RMS norm before a map "
            "without bias: W_Q, W_K and W_V are not its product up to one number per token"
        )
    inward, moved = (down, bias) if at.norm_attn is None else folded(at.norm_attn, down, bias)
    power = inward.detach().double().pow(2).sum() + (0.0 if moved is None else moved.detach().double().pow(2).sum())
    epsilon = norm_epsilon(norm)
    rate = (power / down.shape[1] + epsilon).rsqrt()
    W_up = (gain[:, None] * of_layer(at, up)[0]).unflatten(1, (n_heads, -1)).movedim(1, 0)
    return Latent(down, W_up, rate, epsilon, bias)


def _latent_maps(family: Family, at: LayerModules, n_heads: int, n_groups: int, d_head: int) -> Maps:
    del n_groups  # keys and values are made for every query head
    found = latent_weights(family, at, n_heads)
    made, bias = found.key_value.maps()
    w_k, w_v = found.split(made, d_head)
    b_k, b_v = (None, None) if bias is None else found.split(bias, d_head)
    w_k = torch.cat([w_k, found.W_rotary[:, found.order].expand(n_heads, -1, -1)], -1)
    if b_k is not None and found.b_rotary is not None:
        b_k = torch.cat([b_k, found.b_rotary[found.order].expand(n_heads, -1)], -1)
    if found.query is not None:
        w_q, b_q = found.query.maps()
    else:
        plain: Any = follow(at.attn, family.qkv_modules[2])
        w_q, b_q = of_layer(at, plain)
        w_q = w_q.unflatten(1, (n_heads, -1)).movedim(1, 0)
        b_q = None if b_q is None else b_q.unflatten(0, (n_heads, -1))
    place = torch.arange(d_head, device=w_q.device)
    place[d_head - len(found.order) :] = found.order + d_head - len(found.order)
    w_q, b_q = w_q[..., place], None if b_q is None else b_q[..., place]
    return [w_q, w_k, w_v], [b_q, b_k, b_v]


def inner_rates(family: Family, at: LayerModules, n_heads: int, d_head: int, x: Tensor) -> list[Tensor]:
    """By what x W_Q, x W_K and x W_V of a latent layer are multiplied to be what its inner norms make of tokens x [..., d_model].

    `x`: what the layer's norm returned, whether that norm is folded into the weights or not. For queries and values [..., 1], for
    keys [..., d_head], 1 in the rotary part."""
    found = latent_weights(family, at, n_heads)
    shared = found.key_value.rates(x)  # [..., 1]
    key = shared.expand(*shared.shape[:-1], d_head).clone()
    key[..., d_head - len(found.order) :] = 1.0
    return [torch.ones_like(shared) if found.query is None else found.query.rates(x), key, shared]


# --- norms ----------------------------------------------------------------------------------------------


def norm_epsilon(norm: nn.Module) -> float:
    """What a norm adds to the mean square before the root."""
    return float(next((getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name)), 0.0) or 0.0)


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
    w_out, b_out = of_layer(at, at.mlp_proj)
    w_in, b_in = of_layer(at, at.mlp_up)
    w_gate, b_gate = None, None
    if at.mlp_gate is not None:
        w_gate, b_gate = of_layer(at, at.mlp_gate)
    elif w_in.shape[1] == 2 * w_out.shape[0]:  # gate first, then up
        w_gate, w_in = w_in.chunk(2, 1)
        b_gate, b_in = (None, None) if b_in is None else b_in.chunk(2)
    if fold_norm and _norm(at.norm_mlp, family.norm_mlp, at) is not None:
        w_in, b_in = folded(at.norm_mlp, w_in, b_in)
        if w_gate is not None:
            w_gate, b_gate = folded(at.norm_mlp, w_gate, b_gate)
    return MLPWeights(w_in, w_out, w_gate, b_in, b_gate, b_out)


def norms_nothing(norm: nn.Module) -> bool:
    """Whether what stands in a norm's place returns its input, as nn.Identity does."""
    if getattr(norm, "weight", None) is not None:
        return False
    width = (getattr(norm, "normalized_shape", None) or (4,))[-1]
    x = torch.arange(3 * width, dtype=torch.float32).view(1, 3, width) - 5
    with torch.no_grad():
        return torch.equal(norm.forward(x), x)


def norm_parts(norm: nn.Module) -> tuple[Tensor, Tensor | None, bool]:
    """(gain, bias, centring) of a norm, measured on it: norms store the gain as w or as 1 + w, and some centre first.

    A norm without weights has gain 1, [1]; so has nn.Identity, which does not divide by a length either."""
    with there(norm):
        return _norm_parts(norm)


def _norm_parts(norm: nn.Module) -> tuple[Tensor, Tensor | None, bool]:
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    shape = getattr(norm, "normalized_shape", None) or (64,)
    like = torch.ones(shape[-1], dtype=torch.float32) if weight is None else weight.detach()
    probe = torch.randn(2, 3, like.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(like)
    probe = probe * torch.tensor([1.0, 3.0], dtype=torch.float32).to(like)[:, None, None] + 0.5
    with torch.no_grad():
        out = norm.forward(probe).double()
    if weight is None and torch.equal(out, probe.double()):
        return torch.ones(1, dtype=torch.float32), None, False
    out = out if bias is None else out - bias.detach().double()
    gains = (torch.ones_like(like[:1]),) if weight is None else (weight, 1 + weight)
    for centred in (False, True):
        x = probe.double() - probe.double().mean(-1, keepdim=True) if centred else probe.double()
        unit = x / x.pow(2).mean(-1, keepdim=True).sqrt()
        for gain in gains:
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


def query_key_norms(attn: nn.Module | None) -> tuple[nn.Module, nn.Module] | None:
    """The modules that norm queries and keys; None where there are none."""
    for names in QUERY_KEY_NORMS:
        q, k = (getattr(attn, name, None) for name in names)
        if isinstance(q, nn.Module) and isinstance(k, nn.Module):
            return q, k
    return None


def norm_gain(norm: nn.Module, n_heads: int, d_head: int) -> tuple[Tensor, bool]:
    """Gain [head or 1, d_head] of a norm of queries or keys, and whether it centres each head's."""
    if isinstance(getattr(norm, "norms", None), nn.ModuleList):  # one norm per head
        parts = [norm_parts(one) for one in norm.norms]
        return torch.stack([gain for gain, _, _ in parts]), parts[0][2]
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 2:  # one gain per head, in one module
        x = torch.randn(1, 1, *weight.shape, generator=torch.Generator().manual_seed(0)).to(weight) + 0.5
        out = norm(x)[0, 0] / weight
        centred = bool(out.mean(-1).abs().max() < 1e-2 * out.abs().max())
        return weight, centred
    gain, _, centred = norm_parts(norm)
    if gain.numel() == 1:  # a norm without weights
        return gain.expand(1, d_head), centred
    if gain.numel() == d_head:
        return gain[None], centred
    if gain.numel() == n_heads * d_head and not centred:
        return gain.view(n_heads, d_head), False
    raise PatchbayError(
        f"{type(norm).__name__} of {gain.numel()} after queries or keys of {n_heads} heads of {d_head}: it cannot be folded"
    )

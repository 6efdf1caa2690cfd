"""Components: a part's weights as rank-1 terms, with what its norms do to them folded into copies.

A writer's out-map is A P with A^T A = 1, and the singular value decomposition of W_V W_O (or of an MLP's or an expert's maps) gives its
components: what each reads, how strongly, and what it writes. Gain and centring of the norm before a part are folded into its
reading side; a norm after attention or MLP (Gemma 2, OLMo 2) is part of the writer: its gain and centring give the direction of
what is written exactly; its size follows the token, since the norm divides each token's sum of writes by its length:
`Components.note` says so. The family's residual scale is part of the writer. Latent attention has a norm inside its maps: see
`weights.py` for the one number that stands in its place, `INNER` and `WEIGHED` for what depends on it. Elhage et al. 2021;
components as in Merullo et al. 2024.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patchbay.model.linear import bias_of, rows
from patchbay.model.placing import follow
from patchbay.model.weights import HeadWeights, matrix, norm_parts
from patchbay.signal.channel import Channel
from patchbay.signal.port import Part, PatchbayError, parse_part
from patchbay.wiring.timing import check_part, read_time, write_time

if TYPE_CHECKING:
    from patchbay.model.model import Model


# --- numbers ------------------------------------------------------------------------------------------


def precise(weight: Tensor) -> Tensor:
    """A weight in float32, or float64 where it is that; off the graph."""
    return weight.detach() if weight.dtype == torch.float64 else weight.detach().float()


def finite(weight: Tensor, what: object) -> Tensor:
    """The weight, if every number of it is finite."""
    if not bool(weight.isfinite().all()):
        raise PatchbayError(f"{what}: the weights hold NaN or infinite numbers")
    return weight


def root(gram: Tensor) -> Tensor:
    """L with L L^T = gram, for symmetric positive semi-definite matrices [..., n, n]."""
    lower, bad = torch.linalg.cholesky_ex(gram)
    if bool((bad != 0).any()):
        values, vectors = torch.linalg.eigh(gram[bad != 0].double())
        lower = lower.clone()
        lower[bad != 0] = (vectors * values.clamp_min(0).sqrt()[..., None, :]).to(gram)
    return lower


# --- what a layer's modules hold ----------------------------------------------------------------------


def after_norm(added: nn.Module | None, *plain: nn.Module | None) -> nn.Module | None:
    """The norm between a block and the stream, where the family has one there."""
    return None if added is None or any(added is module for module in plain) else added


def through(norm: nn.Module | None, rows: Tensor, scale: float) -> Tensor:
    """What rows [..., d_model] become on their way into the stream: behind the norm after a block, up to its rate, and scaled."""
    if norm is not None:
        gain, _, centred = norm_parts(norm)
        rows = (rows - rows.mean(-1, keepdim=True) if centred else rows) * precise(gain)
    return rows if scale == 1.0 else rows * scale


def folded_heads(model: Model, layer: int) -> HeadWeights:
    """Per-head weights with the norm before attention folded in, W_O and b_O with what follows; copies in float32 or better."""
    with torch.no_grad():
        w = model.layers[layer].attn.weights(fold_norm=True)
        at = model.modules[layer]
        norm = after_norm(at.attn_added, at.attn, at.attn_proj)
        out = through(norm, precise(w.W_O), model.residual_scale)
        b_o = None if w.b_O is None else through(norm, precise(w.b_O), model.residual_scale)
        what = f"attention of L{layer}"
        W_Q, W_K, W_V = (finite(precise(x), what) for x in (w.W_Q, w.W_K, w.W_V))
        b_Q, b_K, b_V = (None if b is None else precise(b) for b in (w.b_Q, w.b_K, w.b_V))
        return HeadWeights(W_Q, W_K, W_V, finite(out, what), b_Q, b_K, b_V, b_o)


def per_head(shared: Tensor, n_heads: int) -> Tensor:
    """[group, ...] -> [head, ...]: every query head with the keys or values of its group."""
    return shared if len(shared) == n_heads else shared.repeat_interleave(n_heads // len(shared), 0)


def expert_weights(model: Model, layer: int) -> tuple[Tensor, Tensor]:
    """(in and gate [expert, d_model, width], out [expert, d_ff, d_model]) of a layer's routed experts, as they are stored."""
    experts: Any = model.modules[layer].experts
    into, out = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    if into is None:
        into = getattr(experts, "up_proj", None)
    if into is None or out is None or into.ndim != 3 or not into.is_floating_point():
        raise PatchbayError(f"experts of L{layer} ({type(experts).__name__}) hold no plain gate_up_proj and down_proj")
    if not getattr(experts, "is_transposed", False):
        into, out = into.transpose(1, 2), out.transpose(1, 2)
    return precise(into), precise(out)


def mlp_out(model: Model, layer: int) -> Tensor:
    """W_out [neuron, d_model] as it reaches the stream."""
    at = model.modules[layer]
    assert at.mlp_proj is not None
    norm = after_norm(at.mlp_added, at.mlp, at.mlp_proj)
    return finite(through(norm, precise(matrix(at.mlp_proj)), model.residual_scale), f"L{layer}.mlp")


def has_heads(model: Model, layer: int) -> bool:
    return "attn.z" in model.signals(layer)


def has_neurons(model: Model, layer: int) -> bool:
    return "mlp.act" in model.signals(layer)


def position_embedding(model: Model) -> Tensor | None:
    """Learned positions [position, d_model] that are added to the embedding; None where the family has none."""
    inside = {id(module) for at in model.modules for module in at.layer.modules()}
    tokens = model.hf.get_input_embeddings()
    for module in model.hf.modules():
        if not isinstance(module, nn.Embedding) or module is tokens or id(module) in inside:
            continue
        if module.weight.shape[1] == model.d_model and module.weight is not tokens.weight:
            return precise(rows(module))
    return None


def token_embedding(model: Model) -> Tensor | None:
    """Token embedding [vocab, d_model], behind the norm that BLOOM puts there (up to its rate); None where the embedding is
    narrower than the stream."""
    weight = precise(model.embed.weight)
    if weight.shape[1] != model.d_model:
        return None
    return through(follow(model.hf, "transformer.word_embeddings_layernorm"), weight, 1.0)


def folded_norm(model: Model, layer: int | None, path: str, norm: nn.Module | None, weight: Tensor) -> Tensor:
    """A reading map [..., d_model, width] with the norm before it folded in; without a norm, as it is."""
    if norm is None:
        if path:
            raise PatchbayError(f"L{layer} has no {path.replace('|', ' or ')}: give a family row that names its norm")
        return weight
    gain, _, centred = norm_parts(norm)
    new = precise(gain).to(weight.device)[:, None] * weight
    return new - new.mean(-2, keepdim=True) if centred else new


# --- components ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Components:
    """W = sum_i s_i u_i v_i^T of one writer, largest first (row vectors: x W). u and v are orthonormal rows.

    `u` [component, n_in] is read: for a head in the stream behind its norm's scaling (n_in = d_model); for an MLP, neuron,
    expert, embedding or bias in what the out-map multiplies (neurons, tokens, the number 1). `v` [component, d_model] is written.
    For a head's z, an MLP's act: `read_z` [component, n] with c_i = z . read_z_i = (z W_O) . v_i, and `write_z` with
    write_z_i W_O = v_i: z (1 - (1 - t) read_z_i write_z_i^T) is component i at strength t. `note`: where this is not exact.
    """

    part: Part
    u: Tensor
    s: Tensor
    v: Tensor
    read_z: Tensor
    write_z: Tensor
    note: str = ""

    def __len__(self) -> int:
        return len(self.s)


AFTER = "a norm after the block divides what all its parts write by one length per token: directions are exact, sizes up to that"


INNER = (
    "values pass a norm inside a latent, which multiplies them by one positive number per token: singular values have in its "
    "place that of a root mean square latent of an isotropic stream; directions and coordinates are exact, these up to that"
)

WEIGHED = (
    "a latent's norm multiplies keys but for their rotary part by one positive number per token: query and key scores "
    "have both parts at the weight of a root mean square latent of an isotropic stream; value scores do not depend on it"
)


def weighed(model: Model, kinds: Iterable[str]) -> list[str]:
    """The note on scores of these kinds of readers, where the model has latent attention and one of them is query or key."""
    return [WEIGHED] if model.family.qkv == "latent" and not {"query", "key"}.isdisjoint(kinds) else []


def n_components(model: Model, part: Part) -> int:
    """How many components a writer has at most: the smaller side of its out-map."""
    layer = part.layer or 0
    if part.kind == "head":
        return min(int(model.W_O(layer).shape[1]), model.d_model)
    if part.kind == "mlp":
        return min(model.n_neurons(layer), model.d_model)
    if part.kind == "expert":
        return min(int(expert_weights(model, layer)[1].shape[1]), model.d_model)
    return model.d_model if part.kind == "embed" else 1


@torch.no_grad()
def components(model: Model, part: Part | str, named: str | None = None) -> Components:
    """Singular components of what a part writes. `named`: "bias" (of attn or mlp) or "positions" (of embed)."""
    part = parse_part(part) if isinstance(part, str) else part
    channel = Channel(part, named)
    check_part(model, part, channel)
    at = None if part.layer is None else model.modules[part.layer]
    note = ""
    if part.kind == "head":
        assert at is not None
        assert part.layer is not None
        assert part.index is not None
        w = folded_heads(model, part.layer)
        notes = [AFTER] * (after_norm(at.attn_added, at.attn, at.attn_proj) is not None)
        note = "; ".join(notes + [INNER] * (model.family.qkv == "latent"))
        W_V, W_O = per_head(w.W_V, len(w.W_O))[part.index], w.W_O[part.index]
        return _decomposed(part, W_V, W_O, note)
    if at is not None:
        is_attn = part.kind == "attn"
        norm = (
            after_norm(at.attn_added, at.attn, at.attn_proj)
            if is_attn
            else after_norm(at.mlp_added, at.mlp, at.mlp_proj)
        )
        note = AFTER if norm is not None else ""
    rows = writing_rows(model, part, named)
    return _decomposed(part, None, rows, note)


@torch.no_grad()
def components_of_layer(heads: HeadWeights) -> tuple[Tensor, Tensor]:
    """s [head, component] and v [head, component, d_model] of every head of a layer at once, from folded weights."""
    W_V, W_O = per_head(heads.W_V, len(heads.W_O)), heads.W_O
    q_out, r_out = torch.linalg.qr(W_O.mT)  # [head, d_model, n], [head, n, d_head]
    gram = W_V.double().mT @ W_V.double()
    inner = root(gram).mT @ r_out.double().mT  # the same right singular vectors as W_V r_out^T
    _, s, vh = torch.linalg.svd(inner, full_matrices=False)
    return s.to(W_O), vh.to(W_O) @ q_out.mT


def writing_rows(model: Model, part: Part, named: str | None = None) -> Tensor:
    """The out-map [n_in, d_model] of a part that is no head: MLP, neuron, expert, embedding, positions or bias."""
    if named == "bias":
        rows = bias_rows(model, part)
    elif named == "positions":
        rows = position_embedding(model)
    elif part.kind == "embed":
        rows = token_embedding(model)
    elif part.kind == "expert":
        rows = expert_weights(model, part.layer or 0)[1][part.index or 0] * model.residual_scale
    elif part.kind in ("mlp", "neuron"):
        if not has_neurons(model, part.layer or 0):
            raise PatchbayError(f"{part}: L{part.layer} of this {model.family.name} model has no plain MLP")
        rows = mlp_out(model, part.layer or 0)
        rows = rows if part.index is None else rows[part.index : part.index + 1]
    else:
        rows = None
    if rows is None:
        raise PatchbayError(f"{part}{'.' + named if named else ''}: this {model.family.name} model has no such writer")
    return finite(rows, part)


def bias_rows(model: Model, part: Part) -> Tensor | None:
    """What attention or MLP adds whatever the prompt, [1, d_model]: attention rows sum to 1, so that b_V W_O counts,
    but not in latent attention, which multiplies b_V by a number that differs by token. None: 0."""
    layer = part.layer or 0
    at = model.modules[layer]
    if part.kind == "mlp":
        bias = None if at.mlp_proj is None else bias_of(at.mlp_proj)
        norm = after_norm(at.mlp_added, at.mlp, at.mlp_proj)
        found = None if bias is None else through(norm, precise(bias), model.residual_scale)
    else:
        if not has_heads(model, layer):
            return None
        w = folded_heads(model, layer)
        found = w.b_O
        if w.b_V is not None and model.family.qkv != "latent":
            moved = torch.einsum("hr,hrd->d", per_head(w.b_V, len(w.W_O)), w.W_O)
            found = moved if found is None else found + moved
    return None if found is None or not bool(found.any()) else found[None]


def _decomposed(part: Part, into: Tensor | None, out: Tensor, note: str) -> Components:
    """SVD of into @ out, [n, r] and [r, d_model], from their QR factors (`into` None: the identity)."""
    kept, dtype = out.dtype, torch.float64
    q_out, r_out = torch.linalg.qr(out.to(dtype).T)  # out = r_out^T q_out^T
    if into is None:
        u, s, vh = torch.linalg.svd(r_out.T, full_matrices=False)
        left = u.T
    else:
        q_in, r_in = torch.linalg.qr(into.to(dtype))
        u, s, vh = torch.linalg.svd(r_in @ r_out.T, full_matrices=False)
        left = (q_in @ u).T
    v = vh @ q_out.T  # [component, d_model]
    sign = torch.where(v.gather(1, v.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)  # the largest entry is positive
    v, left, inner = v * sign, left * sign, vh * sign
    read_z = inner @ r_out  # v_i . out row by row
    write_z = inner @ torch.linalg.pinv(r_out.T)  # the shortest z with z @ out = v_i
    u, s, v, read_z, write_z = (x.to(kept) for x in (left, s, v, read_z, write_z))
    return Components(part, u, s, v, read_z, write_z, note)


def check_channel(channel: Channel, model: Model) -> Channel:
    """The channel, after making sure that the model has it: its parts, its component, and the reader after the writer."""
    for part in (channel.writer, channel.reader):
        if part is not None:
            check_part(model, part, channel)
    if isinstance(channel.component, int):
        count = n_components(model, channel.writer)
        if not 0 <= channel.component < count:
            raise PatchbayError(f"{channel}: {channel.writer} of this model has components 0..{count - 1}")
    if channel.reader is not None and write_time(channel.writer) >= read_time(model, channel.reader, str(channel.kind)):
        beside = (
            " (this family runs attention and MLP side by side)" if channel.reader.layer == channel.writer.layer else ""
        )
        raise PatchbayError(
            f"{channel}: {channel.reader} reads the stream before {channel.writer} writes into it{beside}"
        )
    return channel

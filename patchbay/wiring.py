"""Wiring: what each part writes into the stream and what each later part reads from it, as low-rank factors of the weights.

A **writer** is a factor P [rank, d_model] of its out-map: W = A P with A^T A = 1, so that |W X|_F = |P X|_F for every X. A
**reader** is a factor F [d_model, width] with |x F| = |x W_out| for every row x, W_out being W_Q R W_K^T (query), its transpose (key), W_V W_O
(value), the MLP's in and gate side by side, the router, or the unembedding. A **channel** is one writer, or one component of
it, and one later reader: `L0.H1.C3>L2.H0.q`. The composition score is |P F|_F / (|P|_F |F|_F); no product of two d_model x
d_model matrices is made for it.

Norms: gain and centring are folded into the reading side of copies (the model stays as it is). A norm after attention or MLP
(Gemma 2, OLMo 2) is part of the writer: its gain and centring give the direction of what is written exactly; its size
follows the token, since the norm divides each token's sum of writes by its length: `Components.note` says so. The family's
residual scale is part of the writer. Latent attention has a norm inside its maps: see `weights.py` for the one number that stands
in its place, `INNER` and `WEIGHED` for what depends on it. Elhage et al. 2021; components as in Merullo et al. 2024.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patchbay.channel import READS, WRITES, Channel, check_part, parse_channel, read_time, write_time
from patchbay.families import follow
from patchbay.port import Part, PatchbayError, parse_part, suggest
from patchbay.weights import HeadWeights, folded, matrix, norm_parts

if TYPE_CHECKING:
    from patchbay.model import Model
    from patchbay.rotary import Turn

__all__ = [
    "Channel",
    "Components",
    "Factors",
    "Readers",
    "Writers",
    "components",
    "n_components",
    "parse_channel",
    "read_time",
    "readers",
    "write_time",
    "writers",
]

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
        if module.weight.shape[1] == model.d_model and module.weight.data_ptr() != tokens.weight.data_ptr():
            return precise(module.weight)
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
        bias = None if at.mlp_proj is None else getattr(at.mlp_proj, "bias", None)
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


# --- factors ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factors:
    """Factors f [n, rank, d_model] of symmetric matrices f^T f, all that composition scores need of writers and of readers;
    where the rank would exceed d_model, `values` holds f^T f itself, [n, d_model, d_model]."""

    values: Tensor
    is_gram: bool = False

    @classmethod
    def of(cls, factors: Tensor) -> Factors:
        """The factors, or their Gram matrices where those are smaller."""
        return cls(factors) if factors.shape[1] <= factors.shape[2] else cls(factors.mT @ factors, True)

    def __len__(self) -> int:
        return len(self.values)

    def squares(self, rows: Tensor) -> Tensor:
        """|f x|^2 for every row x of [row, d_model]: [row, n]."""
        n, rank, _ = self.values.shape
        if self.is_gram:
            return torch.stack([((rows @ gram) * rows).sum(-1) for gram in self.values], 1)
        product = rows @ self.values.flatten(0, 1).mT  # [row, n * rank]
        return product.view(len(rows), n, rank).square_().sum(-1)

    def traces(self) -> Tensor:
        """tr, tr of the square and tr of the cube of f^T f: [n, 3] in float64."""
        grams = self.values if self.is_gram else self.values @ self.values.mT
        if grams.shape[-1] <= 256:
            grams = grams.double()
        square = grams @ grams
        found = [
            grams.diagonal(dim1=-2, dim2=-1).sum(-1),
            (grams * grams).sum((-2, -1)),
            (square * grams).sum((-2, -1)),
        ]
        return torch.stack([one.double() for one in found], -1)

    def spectrum(self, i: int) -> Tensor:
        """Eigenvalues other than 0 of one f^T f, in float64."""
        f = self.values[i].double()
        return torch.linalg.eigvalsh(f if self.is_gram else f @ f.mT).clamp_min(0)


# --- writers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Writers:
    """Writers of one kind and one time: names (channels without a reader) and factors P, [writer, rank, d_model]."""

    kind: str
    time: int
    names: list[Channel]
    factors: Factors


@torch.no_grad()
def writers(model: Model, kind: str, layer: int | None = None, heads: HeadWeights | None = None) -> Writers | None:
    """The writers of a kind in a layer (None for embed and positions), or None where it has none. `heads`: folded weights,
    where they are at hand."""
    if kind not in WRITES:
        raise PatchbayError(f"no writers {kind!r}; writers are {', '.join(WRITES)}" + suggest(kind, WRITES))
    if kind in ("embed", "positions"):
        part = Part(None, "embed")
        if layer is not None:
            return None
        found = position_embedding(model) if kind == "positions" else token_embedding(model)
        if found is None:
            return None
        return Writers(
            kind, -1, [Channel(part, None if kind == "embed" else kind)], Factors.of(finite(found, part)[None])
        )
    if layer is None:
        return None
    at = model.modules[layer]
    if kind == "head" and has_heads(model, layer):
        w = heads or folded_heads(model, layer)
        shared = root(w.W_V.mT @ w.W_V).mT  # [group, d_head, d_head]
        names = [Channel(Part(layer, "head", h)) for h in range(len(w.W_O))]
        return Writers(kind, 2 * layer, names, Factors.of(per_head(shared, len(w.W_O)) @ w.W_O))
    if kind == "mlp" and has_neurons(model, layer):
        return Writers(kind, 2 * layer + 1, [Channel(Part(layer, "mlp"))], Factors.of(mlp_out(model, layer)[None]))
    if kind == "neuron" and has_neurons(model, layer):
        rows = mlp_out(model, layer)
        names = [Channel(Part(layer, "neuron", n)) for n in range(len(rows))]
        return Writers(kind, 2 * layer + 1, names, Factors(rows[:, None]))
    if kind == "expert" and at.experts is not None:
        out = finite(expert_weights(model, layer)[1], f"experts of L{layer}") * model.residual_scale
        names = [Channel(Part(layer, "expert", e)) for e in range(len(out))]
        return Writers(kind, 2 * layer + 1, names, Factors.of(out))
    return None


def bias_writers(model: Model, layer: int) -> list[Writers]:
    """The biases of a layer's attention and MLP, each at its own time."""
    parts = [Part(layer, "attn"), Part(layer, "mlp")]
    found = [(part, bias_rows(model, part)) for part in parts]
    return [
        Writers("bias", write_time(part), [Channel(part, "bias")], Factors(finite(rows, part)[None]))
        for part, rows in found
        if rows is not None
    ]


# --- readers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Readers:
    """Readers of one kind in one layer: names (part and kind), and factors F^T [reader, width, d_model] with |x F| = |x W_out|.

    `by_offset`: for each rotary offset the factors there, where asked; |x F|^2 is the mean over offsets of |x F_offset|^2.
    """

    kind: str
    time: int
    names: list[tuple[Part, str]]
    factors: Factors
    by_offset: tuple[Factors, ...] = ()


@torch.no_grad()
def readers(
    model: Model,
    layer: int | None,
    kind: str,
    *,
    turn: Turn | None = None,
    heads: HeadWeights | None = None,
    by_offset: bool = False,
) -> Readers | None:
    """The readers of a kind in a layer (None: the unembedding); None where it has none. Queries and keys need the layer's
    `turn` (`rotary.turns`), which holds rotary offsets and the norm of queries and keys."""
    if kind not in READS:
        raise PatchbayError(f"no readers {kind!r}; readers are {', '.join(READS)}" + suggest(kind, list(READS)))
    if kind == "unembed":
        return _unembedding(model) if layer is None else None
    if layer is None:
        return None
    if kind in ("query", "key", "value"):
        if not has_heads(model, layer):
            return None
        w = heads or folded_heads(model, layer)
        names = [(Part(layer, "head", h), kind) for h in range(len(w.W_O))]
        if kind == "value":
            inner = root(w.W_O @ w.W_O.mT)  # [head, d_head, d_head]
            return Readers(kind, 2 * layer, names, Factors.of((per_head(w.W_V, len(w.W_O)) @ inner).mT))
        if turn is None:
            raise PatchbayError(f"L{layer}: reading {kind} needs the layer's turn, patchbay.rotary.turns(...)")
        return _attending(turn, layer, kind, names, by_offset)
    into = _into_mlp(model, layer, kind)
    if into is None:
        return None
    part_kind = "expert" if kind == "mlp" and model.modules[layer].experts is not None else kind
    parts = [Part(layer, part_kind, e if part_kind == "expert" else None) for e in range(len(into))]
    time = read_time(model, parts[0], kind)
    return Readers(kind, time, [(part, kind) for part in parts], Factors.of(finite(into, parts[0]).mT))


def _attending(turn: Turn, layer: int, kind: str, names: list[tuple[Part, str]], by_offset: bool) -> Readers:
    """Query: x W_Q R W_K^T; key: x W_K R^T W_Q^T; the factor is one side times a root of the other's turned Gram matrix."""
    W_Q, W_K = turn.W_Q, per_head(turn.W_K, len(turn.W_Q))
    near, far = (W_Q, W_K) if kind == "query" else (W_K, W_Q)
    gram, rotation = far.mT @ far, turn.rotation  # [head, d_head, d_head]
    if rotation is None:
        return Readers(kind, 2 * layer, names, Factors.of((near @ root(gram)).mT))
    turned = rotation if kind == "query" else rotation.mT  # [offset, d_head, d_head]
    grams = turned[:, None] @ gram @ turned.mT[:, None]  # [offset, head, d_head, d_head]
    each = tuple(Factors.of((near @ root(one)).mT) for one in grams) if by_offset else ()
    return Readers(kind, 2 * layer, names, Factors.of((near @ root(grams.mean(0))).mT), each)


def _into_mlp(model: Model, layer: int, kind: str) -> Tensor | None:
    """[reader, d_model, width]: the MLP's in and gate side by side, every expert's, or the router's map, norm folded in."""
    at, path = model.modules[layer], model.family.norm_mlp
    if kind == "router":
        weight = getattr(at.router, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != model.d_model:
            return None
        return folded_norm(model, layer, path, at.norm_mlp, precise(weight).T[None])
    if at.experts is not None:
        return folded_norm(model, layer, path, at.norm_mlp, expert_weights(model, layer)[0])
    if not has_neurons(model, layer) or at.mlp_up is None:
        return None
    w = model.layers[layer].mlp.weights()
    sides = [precise(w.W_in)] + ([] if w.W_gate is None else [precise(w.W_gate)])
    return folded_norm(model, layer, path, at.norm_mlp, torch.cat(sides, 1)[None])


def _unembedding(model: Model) -> Readers | None:
    """Unembedding rows less their mean (softmax does not see it), the final norm folded in."""
    rows = precise(model.unembed.weight)
    if rows.shape[1] != model.d_model:
        return None
    weight = folded(model.final_norm_module, (rows - rows.mean(0)).T, None)[0].detach()
    part = Part(None, "unembed")
    return Readers(
        "unembed", 2 * model.n_layers, [(part, "unembed")], Factors.of(finite(weight.to(rows), part).T[None])
    )

"""Wiring: what each part writes into the stream and what each later part reads from it, as low-rank factors of the weights.

A **writer** is a factor P [rank, d_model] of its out-map: W = A P with A^T A = 1, so that |W X|_F = |P X|_F for every X. A
**reader** is a factor F [d_model, width] with |x F| = |x W_out| for every row x, W_out being W_Q R W_K^T (query), its transpose (key), W_V W_O
(value), the MLP's in and gate side by side, the router, or the unembedding. A **channel** is one writer, or one component of
it, and one later reader: `L0.H1.C3>L2.H0.q`. The composition score is |P F|_F / (|P|_F |F|_F); no product of two d_model x
d_model matrices is made for it. What norms do is folded into copies: see `components.py`. Elhage et al. 2021; components as in
Merullo et al. 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patchbay.model.weights import HeadWeights, folded
from patchbay.signal.channel import READS, WRITES, Channel
from patchbay.signal.port import Part, PatchbayError, suggest
from patchbay.wiring.components import (
    bias_rows,
    expert_weights,
    finite,
    folded_heads,
    folded_norm,
    has_heads,
    has_neurons,
    mlp_out,
    per_head,
    position_embedding,
    precise,
    root,
    token_embedding,
)
from patchbay.wiring.timing import read_time, write_time

if TYPE_CHECKING:
    from patchbay.model.model import Model
    from patchbay.model.rotary import Turn

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
            raise PatchbayError(f"L{layer}: reading {kind} needs the layer's turn, patchbay.model.rotary.turns(...)")
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

"""Neuron vocabulary: the tokens that a neuron stands for, read off its weights through the unembedding.

    scores[token] = W_U[token] . g * c(w / |w|)        names = the tokens of the highest scores

w is the row that the neuron reads (`side="in"`, the paper's; `"gate"` of a gated MLP) or the column that it writes
(`"out"`). With `fold_norm` the gain and centring of the MLP's own norm are folded into w (of a norm after the MLP, on the
write side), and the final norm's gain g and centring c stand as above; without, scores are W_U w / |w|, and depend on
what gains happen to be. w is taken at length 1: the paper's softmax of W_U w has the same order, and its size is that of
w. A bias, scale or cap of the logits is left out.

Every direction has a highest token, so every neuron "has a name". The null turns w at random and keeps its length: a
direction uniform on the sphere. `margin` is the score of the first token less that of the second, `p` the share of turned
directions with a margin as high, `p_score` the same for the first score itself, both also adjusted over all neurons
(Benjamini and Hochberg); `share` is the part of a layer's neurons whose margin is above the 99th percentile of the null,
0.01 where names mean nothing. The null knows nothing of directions that all of a model's vectors lean to.

Against a second model (`other`) `agreement` is the share of neurons of the same place whose first tokens are the same;
its null pairs the neurons of each layer at random, so tokens that name many neurons do not count as agreement.

Cost: one product [neuron, d_model] x [d_model, vocab] in tiles, the top tokens by blocks of the vocabulary, exactly.

Davies 2025, "Decoding specialised feature neurons in LLMs with the final projection layer".

A name says what a neuron's weights point at, not when it fires or what it does: middle layers may speak another code than
the unembedding's. Follow with `prove.ablation` or `turn.scale`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from patchbay import maths
from patchbay.errors import one_of
from patchbay.find._neurons import neuron_layers
from patchbay.model.model import Model
from patchbay.model.weights import norm_parts
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError

Side = Literal["in", "gate", "out"]
SIDES = ("in", "gate", "out")
ROWS, BLOCK = 512, 64  # neurons in a tile; tokens of which the highest is looked at first
SHOWN = 25  # neurons in the table of names
LEVEL = 0.99


@method(paper="davies2025", unit="logits")
def neuron_vocabulary(
    model: Model,
    *,
    side: Side = "in",
    other: Model | None = None,
    top: int = 10,
    fold_norm: bool = True,
    draws: int = 2000,
    seed: int = 0,
) -> Result:
    """The `top` tokens of every neuron's reading or writing direction, ranked by how far the first stands out.

    Main variable `margin` [layer, neuron] with `score`, `p`, `p_adjusted`, `p_score`, `p_score_adjusted` and `in_out`
    (cosine of what the neuron reads and writes); `tokens` and `scores` [layer, neuron, token]; `share` [layer];
    `null_high` (of margins). With `other`: `same` [layer, neuron], `agreement` and `agreement_null` [layer], and over all
    layers `agreement_all` with `agreement_low`, `agreement_high` and `agreement_p`. Table `names`: the first neurons.

    `side`: what the neuron reads ("in", "gate") or what it writes ("out"). `other`: a second model to compare the names
    with, place by place. `top`: how many tokens name a neuron. `fold_norm`: count the gains of the norms into the
    direction. `draws`: random directions that make the null.
    """
    layers, notes = neuron_layers(model, "neuron_vocabulary")
    _check(model, side, top, draws, layers)
    reader = Reader(model, fold_norm)
    turned = reader.margins(_random_directions(reader, draws, seed))  # [draw], [draw]
    widest = max(model.n_neurons(i) for i in layers)
    grid = (model.n_layers, widest)
    tokens = torch.full((*grid, top), -1)
    scores, in_out = torch.full((*grid, top), torch.nan), torch.full(grid, torch.nan)
    margin = torch.full(grid, torch.nan)
    for i in layers:
        n = model.n_neurons(i)
        scores[i, :n], tokens[i, :n], margin[i, :n] = reader.top(directions(model, i, side, fold_norm), top)
        read, write = (directions(model, i, one, fold_norm) for one in ("in", "out"))
        in_out[i, :n] = maths.cosine(read, write).cpu()
    values = _with_null(margin, scores, turned) | {"in_out": (in_out, ("layer", "neuron"), "cosine")}
    values |= {"tokens": (tokens, ("layer", "neuron", "token"), "token id")}
    values |= {"scores": (scores, ("layer", "neuron", "token"), "logits")}
    if other is not None:
        values |= _agreement(model, other, side, fold_norm, tokens[..., 0], draws, seed)
    folded = "gains of the norms folded in" if fold_norm else "no norm folded in"
    notes = [f"side {side!r}, {folded}, directions of length 1", *notes]
    return Result(values, tables={"names": _names(model, margin, tokens)}, notes=notes)


def _check(model: Model, side: str, top: int, draws: int, layers: list[int]) -> None:
    one_of("side", side, SIDES)
    if side == "gate" and model.layers[layers[0]].mlp.weights().W_gate is None:
        raise PatchbayError(
            f"side='gate': the MLPs of this {model.family.name} model have no gate; possible are in, out"
        )
    if not 2 <= top <= model.vocab_size:
        raise PatchbayError(
            f"top={top}: from 2 (the margin needs two) to the {model.vocab_size} tokens of the vocabulary"
        )
    if draws < 1:
        raise PatchbayError(f"draws={draws}: a name needs turned directions to be compared with, at least 1")


@torch.no_grad()
def directions(model: Model, layer: int, side: str, fold_norm: bool) -> Tensor:
    """What each neuron reads or writes, in the stream's own directions: [neuron, d_model]."""
    if side != "out":
        weights = model.layers[layer].mlp.weights(fold_norm=fold_norm)
        found = weights.W_in if side == "in" else weights.W_gate
        assert found is not None
        return found.T.float()
    found = model.layers[layer].mlp.weights().W_out.float()
    at = model.modules[layer]
    if fold_norm and at.mlp_added is not None and at.mlp_added is not at.mlp and at.mlp_added is not at.mlp_proj:
        gain, _, centred = norm_parts(at.mlp_added)  # what is added to the stream passed a norm after the MLP
        found = (found - found.mean(-1, keepdim=True) if centred else found) * gain.float()
    return found


class Reader:
    """The unembedding as a reader of directions of the stream, with the final norm's gain and centring or without."""

    def __init__(self, model: Model, fold_norm: bool) -> None:
        self.weight = model.unembed.weight.detach().float()  # [vocab, d_model]; float32 weights are not copied
        self.gain: Tensor | None = None
        self.centred = False
        if fold_norm:
            gain, _, self.centred = norm_parts(model.final_norm_module)
            self.gain = gain.detach().float()

    def unit(self, vectors: Tensor) -> Tensor:
        """Vectors of length 1 among those that the final norm can tell apart (a centring one sees no mean)."""
        vectors = vectors - vectors.mean(-1, keepdim=True) if self.centred else vectors
        return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-30)

    @torch.no_grad()
    def tiles(self, vectors: Tensor) -> Iterator[Tensor]:
        """Scores of some vectors at a time, [vocab, row]; the space is used again for the next ones."""
        vectors = self.unit(vectors) if self.gain is None else self.unit(vectors) * self.gain
        space = vectors.new_empty(len(self.weight), min(ROWS, len(vectors)))  # [vocab, row]: the faster way round
        for start in range(0, len(vectors), ROWS):
            part = vectors[start : start + ROWS]
            space = space if len(part) == space.shape[1] else vectors.new_empty(len(self.weight), len(part))
            yield torch.mm(self.weight, part.T, out=space)

    def top(self, vectors: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scores and tokens of the `n` highest, [vector, n], and the first score less the second, on the CPU."""
        found = [_highest(scores, n) for scores in self.tiles(vectors)]
        values, tokens = (torch.cat(pieces).cpu() for pieces in zip(*found, strict=True))
        return values, tokens, values[:, 0] - values[:, 1]

    def margins(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Margins and first scores of turned directions, each sorted upwards."""
        values, _, margin = self.top(vectors, 2)
        return margin.sort().values, values[:, 0].sort().values


def _highest(scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n highest along the vocabulary [vocab, row] and their tokens, [row, n]: exactly torch.topk.

    The n highest lie in the n blocks of tokens with the highest maxima (or behind the last whole block).
    """
    n_vocab, n_rows = scores.shape
    n_blocks = n_vocab // BLOCK
    if n_blocks <= n:
        found = scores.T.topk(n)
        return found.values, found.indices
    whole = scores[: n_blocks * BLOCK].unflatten(0, (n_blocks, BLOCK))  # a view, [block, token in it, row]
    best = whole.amax(1).T.contiguous().topk(n).indices.T.contiguous()  # blocks, [n, row]
    inside = whole.gather(0, best[:, None].expand(-1, BLOCK, -1)).flatten(0, 1)  # [n * BLOCK, row]
    ids = (best[:, None] * BLOCK + torch.arange(BLOCK, device=scores.device)[:, None]).flatten(0, 1)
    rest = torch.arange(n_blocks * BLOCK, n_vocab, device=scores.device)[:, None].expand(-1, n_rows)
    values, places = torch.cat([inside, scores[n_blocks * BLOCK :]]).T.contiguous().topk(n)
    return values, torch.cat([ids, rest]).T.gather(1, places)


def _random_directions(reader: Reader, draws: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(draws, reader.weight.shape[1], generator=generator).to(reader.weight)


def _with_null(margin: Tensor, scores: Tensor, turned: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Margins and first scores with the share of turned directions that reach as high."""
    grid, high = ("layer", "neuron"), turned[0].quantile(LEVEL)
    p, p_score = (_share_as_high(value, null) for value, null in zip((margin, scores[..., 0]), turned, strict=True))
    above = (margin > high).double().where(margin.isfinite(), torch.nan).nanmean(1)
    return {
        "margin": (margin, grid, "logits"),
        "score": (scores[..., 0], grid, "logits"),
        "p": (p, grid, "probability"),
        "p_adjusted": (maths.benjamini_hochberg(p), grid, "probability"),
        "p_score": (p_score, grid, "probability"),
        "p_score_adjusted": (maths.benjamini_hochberg(p_score), grid, "probability"),
        "share": (above, ("layer",), "share of neurons"),
        "null_high": (high, (), "logits"),
    }


def _share_as_high(values: Tensor, null: Tensor) -> Tensor:
    """(1 + draws as high) / (1 + draws), NaN where there is no value."""
    below = torch.searchsorted(null, values.nan_to_num(0.0).contiguous())
    p = (1.0 + (len(null) - below).double()) / (1 + len(null))
    return p.where(values.isfinite(), torch.nan)


def _agreement(
    model: Model, other: Model, side: str, fold_norm: bool, ours: Tensor, draws: int, seed: int
) -> dict[str, Any]:
    """How often neurons of the same place have the same first token in both models, against neurons paired at random."""
    layers, _ = neuron_layers(other, "neuron_vocabulary of the other model")
    shapes = [(m.n_layers, m.vocab_size, [m.n_neurons(i) for i in range(m.n_layers)]) for m in (model, other)]
    if shapes[0] != shapes[1]:
        raise PatchbayError(
            "agreement compares neurons of the same place: both models need the same layers, neurons and vocabulary; "
            f"found (layers, vocabulary, neurons) {shapes[0]} and {shapes[1]}"
        )
    reader, theirs = Reader(other, fold_norm), torch.full_like(ours, -1)
    for i in layers:
        theirs[i, : other.n_neurons(i)] = reader.top(directions(other, i, side, fold_norm), 2)[1][:, 0]
    real, same = ours >= 0, (ours == theirs).double()
    chance = torch.full((len(ours),), torch.nan, dtype=torch.float64)
    for i in layers:
        n = int(real[i].sum())
        counts = [torch.bincount(first[i, :n], minlength=model.vocab_size).double() for first in (ours, theirs)]
        chance[i] = counts[0] @ counts[1] / n**2  # the mean over all ways to pair the layer's neurons
    mean, low, high = maths.bootstrap_interval(same[real], seed=seed)
    as_many = sum(_paired_at_random(ours, theirs, real, seed + k) >= mean - 1e-12 for k in range(min(draws, 1000)))
    return {
        "same": (same.where(real, torch.nan), ("layer", "neuron"), "same first token"),
        "agreement": (same.where(real, torch.nan).nanmean(1), ("layer",), "share of neurons"),
        "agreement_null": (chance, ("layer",), "share of neurons"),
        "agreement_all": (torch.tensor(mean), (), "share of neurons"),
        "agreement_low": (torch.tensor(low), (), "share of neurons"),
        "agreement_high": (torch.tensor(high), (), "share of neurons"),
        "agreement_p": (torch.tensor((1 + as_many) / (1 + min(draws, 1000))), (), "probability"),
    }


def _paired_at_random(ours: Tensor, theirs: Tensor, real: Tensor, seed: int) -> float:
    """Agreement over all layers when the neurons of each are paired at random."""
    generator, hits = torch.Generator().manual_seed(seed), 0
    for a, b, known in zip(ours, theirs, real, strict=True):
        n = int(known.sum())
        hits += int((a[:n] == b[torch.randperm(n, generator=generator)]).sum())
    return hits / int(real.sum())


def _names(model: Model, margin: Tensor, tokens: Tensor) -> list[dict[str, Any]]:
    """The neurons whose first token stands out most, with their tokens as text where there is a tokenizer."""
    flat = margin.flatten().nan_to_num(-torch.inf)
    rows = []
    for place in flat.argsort(descending=True, stable=True)[:SHOWN].tolist():
        layer, neuron = divmod(place, margin.shape[1])
        if margin[layer, neuron].isfinite():
            ids = tokens[layer, neuron].tolist()
            texts = [model.decode([token]) if model.tokenizer is not None else str(token) for token in ids]
            rows.append(
                {"part": Part(layer, "neuron", neuron), "margin": float(margin[layer, neuron]), "tokens": texts}
            )
    return rows

"""Frozen: one prompt's run as maps that are affine in the stream, with attention patterns and the scales of norms as they were.

    attention   adds  post(sum over heads of P (norm(x) W_V + b_V) W_O + b_O)
    MLP         adds  post(z W_dec) + what it adds whatever its features are (biases, a skip) + error
    feature     reads its encoder's column of norm(x), or of x; of plain MLPs the neurons are the features, and nothing is left for the error

A cross-layer transcoder's features write z W_dec[m] in every layer m from their own on, so that a layer's error is what they all leave.

A gated neuron, act(g) u, is bilinear: with act(g) / g held it is read half through its gate and half through its value, so that what
arrives sums to its activation. All is float64 on the CPU, and each map is held to what the model's own run gave: what is not affine there (a gate
on attention, an inner norm, experts) is refused by the layer's name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from patchbay.find._direct import precise
from patchbay.model.linear import bias_of
from patchbay.model.model import Model
from patchbay.model.run import Trace, run
from patchbay.model.weights import norm_parts
from patchbay.signal.port import PatchbayError, Port

WHAT = "attribution_graph"
Map = Callable[[Tensor], Tensor]  # [position, d_model] -> [position, d_model], affine


@dataclass
class Reads:
    """What features of a layer read: at each position the same columns, or of gated neurons each position's own."""

    gates: list[
        tuple[Tensor, Tensor, Tensor | None]
    ]  # columns [d_model, feature], bias [feature], factor [position, feature]

    def of(self, position: int, features: Tensor) -> tuple[Tensor, Tensor]:
        """Directions [n, d_model] of some features at a position, and what their own biases add [n]."""
        vectors, own = [], []
        for columns, bias, factor in self.gates:
            rate = torch.ones(len(features), dtype=torch.float64) if factor is None else factor[position, features]
            vectors.append(columns[:, features].T * rate[:, None])
            own.append(bias[features] * rate)
        return torch.stack(vectors).sum(0), torch.stack(own).sum(0)


@dataclass
class Block:
    """One layer, frozen: `attn`, `read` and `through` are maps of the stream that attention, or the MLP, reads; `post` is linear. `onward`: what
    its features write in later layers."""

    attn: Map
    read: Map
    through: Map
    post: Map
    sequential: bool
    acts: Tensor  # [position, feature]
    rows: Tensor  # [feature, d_model]
    reads: Reads
    kind: str  # of its features: "mlp_feature" or "neuron"
    stream: Tensor  # what the MLP reads before its norm, [position, d_model]
    added: Tensor  # what the MLP added
    rest: Tensor  # of it, what is no feature's: biases, a skip
    onward: dict[int, Tensor] = field(default_factory=dict)  # layer: [feature, d_model]


@dataclass
class Frozen:
    """The frozen run of one prompt: its layers, what enters the first one, the final norm, and the model's last logits."""

    model: Model
    ids: list[int]
    blocks: list[Block]
    embed: Tensor  # [position, d_model]
    final: Map
    logits: Tensor  # [vocab]
    columns: Tensor  # [d_model, vocab], times the logits' frozen scale and cap
    bias: Tensor  # [vocab], likewise

    def writers(self, layer: int) -> list[tuple[int, Tensor]]:
        """The layers whose features write in one, with their rows there, [feature, d_model]."""
        earlier = [(i, block.onward[layer]) for i, block in enumerate(self.blocks) if layer in block.onward]
        return [*earlier, (layer, self.blocks[layer].rows)]

    def error(self, layer: int, kept: Sequence[Tensor]) -> Tensor:
        """What an MLP added beyond its biases, a skip and what the features in `kept` [position, feature], by layer, write there."""
        block, said = self.blocks[layer], torch.zeros_like(self.embed)
        for i, rows in self.writers(layer):
            said = said + torch.where(kept[i], self.blocks[i].acts, 0.0) @ rows
        return block.added - block.rest - block.post(said)

    def centred(self, tokens: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Of some tokens: directions [token, d_model] after the final norm that read their centred logits, their biases, the logits."""
        columns, bias = self.columns[:, tokens].T - self.columns.mean(1), self.bias[tokens] - self.bias.mean()
        return columns, bias, self.logits[tokens] - self.logits.mean()


def frozen(model: Model, ids: list[int], dictionaries: dict[int, Any]) -> Frozen:
    """The prompt's run, frozen; `dictionaries`: transcoders by layer. Raises PatchbayError for what is not affine in this model."""
    taps = [Port("final_norm"), Port("resid_out", model.n_layers - 1)]
    wanted = ("resid_in", "resid_mid", "resid_out", "attn.pattern", "attn.out", "mlp.in", "mlp.out", "mlp.act")
    for layer in range(model.n_layers):
        _require(model, layer, layer in dictionaries)
        taps += [Port(signal, layer) for signal in wanted if signal in model.signals(layer)]
    trace = run(model, [ids], taps=list(dict.fromkeys(taps)), logits="last")
    blocks = [_block(model, trace, layer, dictionaries.get(layer)) for layer in range(model.n_layers)]
    stream = _seen(trace, "resid_out", model.n_layers - 1)
    final = affine_norm(model.final_norm_module, stream, model)
    unembed, bias = precise(model.unembed.weight), bias_of(model.hf.get_output_embeddings())
    added = torch.zeros(len(unembed), dtype=torch.float64) if bias is None else precise(bias)
    raw = final(stream)[-1] @ unembed.T + added
    raw = torch.where(raw.abs() < 1e-9, 1e-9, raw)
    scale = precise(model.scaled_logits(raw)) / raw
    logits = precise(trace.last_logits[0])
    _hold(model, "the logits are", (final(stream)[-1] @ unembed.T + added) * scale, logits)
    embed = _seen(trace, "resid_in", 0)
    return Frozen(model, list(ids), blocks, embed, final, logits, (unembed * scale[:, None]).T, added * scale)


def _require(model: Model, layer: int, transcoded: bool) -> None:
    has, name = model.signals(layer), model.family.name
    lacks = ["neurons that are its parts (mlp.act)"] if not transcoded and "mlp.act" not in has else []
    if "attn.pattern" not in has or model.family.qkv == "latent":
        lacks = [
            "attention patterns" if "attn.pattern" not in has else "values that pass no norm inside a latent",
            *lacks,
        ]
        raise PatchbayError(
            f"{WHAT}: layer {layer} of this {name} model has no {' and no '.join(lacks)}, so that it is not affine in the stream once patterns and norms "
            "are held; find.direct_logit_attribution works"
        )
    if lacks:
        raise PatchbayError(
            f"{WHAT}: the MLP of layer {layer} of this {name} model has no {lacks[0]}; it offers {', '.join(has)}. Attach a transcoder of it, "
            f"model.with_dictionaries(pb.load_dictionary(FOLDER, at='L{layer}.mlp.in to L{layer}.mlp.out'))"
        )


def _seen(trace: Trace, signal: str, layer: int) -> Tensor:
    return precise(trace[Port(signal, layer)][0])


def affine_norm(module: nn.Module | None, x: Tensor, model: Model) -> Map:
    """A norm as the affine map that it was on these vectors [position, d_model]: one rate a position, read off what came out."""
    if module is None:
        return lambda y: y
    gain, bias, centred = norm_parts(module)
    g = precise(gain)
    b = torch.zeros_like(g) if bias is None else precise(bias)
    with torch.no_grad():
        after = precise(module.forward(x.to(model.device, model.dtype)[None])[0]) - b
    scaled = g * (x - x.mean(-1, keepdim=True) if centred else x)
    rate = (after * scaled).sum(-1, keepdim=True) / (scaled * scaled).sum(-1, keepdim=True).clamp_min(1e-300)
    return lambda y: g * (y - y.mean(-1, keepdim=True) if centred else y) * rate + b


def _block(model: Model, trace: Trace, layer: int, dictionary: Any) -> Block:
    at, stream = model.modules[layer], _seen(trace, "resid_in", layer)
    sequential = "resid_mid" in model.signals(layer)
    attn = _attention(model, trace, layer, stream)
    added = _seen(trace, "attn.out", layer)
    _hold(
        model,
        f"what attention of layer {layer} adds is",
        attn(stream),
        added,
        "its patterns times the normed stream's values",
    )
    x = _seen(trace, "resid_mid", layer) if sequential else stream
    read, normed = affine_norm(at.norm_mlp, x, model), _seen(trace, "mlp.in", layer)
    _hold(model, f"what the MLP of layer {layer} reads is", read(x), normed, "the norm of the stream")
    if dictionary is not None and dictionary.reads == "resid_mid":
        read, normed = (lambda y: y), x
    out = _seen(trace, "mlp.out", layer)
    _hold(
        model,
        f"the stream after layer {layer} is",
        stream + added + out,
        _seen(trace, "resid_out", layer),
        "the sum of what its parts add",
    )
    made = _neurons(model, trace, layer, normed) if dictionary is None else _transcoded(dictionary, normed, read)
    block = Block(attn, read, sequential=sequential, stream=x, added=out, rest=made["through"](x), **made)
    if dictionary is None:
        whole = block.post(block.acts @ block.rows) + block.rest
        _hold(model, f"what the MLP of layer {layer} adds is", whole, out, "what its neurons write")
    return block


def _attention(model: Model, trace: Trace, layer: int, stream: Tensor) -> Map:
    """What attention adds to the stream, patterns and norms held."""
    at, weights = model.modules[layer], model.layers[layer].attn.weights()
    norm = affine_norm(at.norm_attn, stream, model)
    pattern = _seen(trace, "attn.pattern", layer)  # [head, query, key]
    groups = [head * len(weights.W_V) // len(weights.W_Q) for head in range(len(weights.W_Q))]
    w_v, w_o = precise(weights.W_V)[groups], precise(weights.W_O)
    b_v = 0.0 if weights.b_V is None else precise(weights.b_V)[groups][:, None]
    bias = bias_of(at.attn_proj)
    b_o = 0.0 if bias is None else precise(bias)

    def before(x: Tensor) -> Tensor:
        value = torch.einsum("km,hmd->hkd", norm(x), w_v) + b_v
        return torch.einsum("hqk,hkd,hdm->qm", pattern, value, w_o) + b_o

    after = _post(model, at.attn_added, (at.attn, at.attn_proj), before(stream))
    return lambda x: after(before(x)) * model.residual_scale


def _post(model: Model, added: nn.Module | None, own: tuple[nn.Module | None, ...], x: Tensor) -> Map:
    """The norm between a block and the stream, where the family has one."""
    return affine_norm(None if added is None or any(added is one for one in own) else added, x, model)


def _linear(affine: Map) -> Map:
    return lambda x: affine(x) - affine(torch.zeros_like(x))


# --- features ---------------------------------------------------------------------------------------


def _transcoded(it: Any, normed: Tensor, read: Map) -> dict[str, Any]:
    """A transcoder's features; they write what is added, whatever norm the family has there, of a cross-layer one in later layers too."""
    here = it.to("cpu").double()
    skip = None if here.W_skip is None else precise(here.W_skip)

    def through(x: Tensor) -> Tensor:
        constant = precise(here.b_dec).expand(len(normed), -1)
        return constant if skip is None else constant + read(x) @ skip

    columns = precise(here.W_enc)
    bias = precise(here.b_enc) - (precise(here.b_dec) @ columns if here.subtract else 0.0)
    return {
        "through": through,
        "post": lambda y: y,
        "acts": precise(here.encode(normed)),
        "rows": precise(here.W_dec),
        "reads": Reads([(columns, bias, None)]),
        "kind": "mlp_feature",
        "onward": {} if here.onward is None else dict(zip(here.later, precise(here.onward), strict=True)),
    }


def _neurons(model: Model, trace: Trace, layer: int, normed: Tensor) -> dict[str, Any]:
    """The neurons of a plain MLP."""
    at, weights = model.modules[layer], model.layers[layer].mlp.weights()
    acts, rows = _seen(trace, "mlp.act", layer), precise(weights.W_out)
    b_out = torch.zeros(rows.shape[1], dtype=torch.float64) if weights.b_out is None else precise(weights.b_out)
    post = _post(model, at.mlp_added, (at.mlp, at.mlp_proj), acts @ rows + b_out)
    whole: Map = lambda y: post(y) * model.residual_scale  # noqa: E731
    zero = torch.zeros(rows.shape[0], dtype=torch.float64)
    pieces = [(precise(weights.W_in), zero if weights.b_in is None else precise(weights.b_in))]
    if weights.W_gate is not None:
        pieces.append((precise(weights.W_gate), zero if weights.b_gate is None else precise(weights.b_gate)))
    values = [normed @ columns + bias for columns, bias in pieces]
    factors: list[Tensor | None] = [None]
    if len(values) == 2:  # half of what it is, act(g) / g held, through the value and half through the gate
        product = values[0] * values[1]
        held = torch.where(product.abs() > 1e-300, acts / product, 0.0) / 2
        factors = [held * values[1], held * values[0]]
    gates = [(columns, bias, factor) for (columns, bias), factor in zip(pieces, factors, strict=True)]
    constant = whole(b_out.expand(len(normed), -1))
    return {
        "through": lambda x: constant,
        "post": _linear(whole),
        "acts": acts,
        "rows": rows,
        "reads": Reads(gates),
        "kind": "neuron",
    }


def _hold(model: Model, what: str, found: Tensor, wanted: Tensor, said: str = "what weights and norms say") -> None:
    """Raise unless a map gives what the model's own run gave."""
    allowed = 1e-3 if torch.finfo(model.dtype).eps < 1e-5 else 5e-2
    if not bool((found - wanted).abs().max() <= allowed * wanted.abs().max().clamp_min(1e-6)):
        raise PatchbayError(
            f"{WHAT}: {what} not {said} in this {model.family.name} model (off by {float((found - wanted).abs().max()):.2g} where the "
            f"largest is {float(wanted.abs().max()):.2g}): it is not affine there once patterns and norms are held; find.direct_logit_attribution works"
        )

"""Cards: what `patchbay show` says of a model, or of one of its parts, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from patchbay.errors import PatchbayError
from patchbay.model.carried import carried, said
from patchbay.model.model import Model
from patchbay.model.weights import norm_parts
from patchbay.signal.port import FEATURES, Part, Port, parse_part, signals_of


def model_card(model: Model) -> dict[str, Any]:
    """What `show MODEL` says, as plain data."""
    layers = [
        {
            "layer": i,
            "heads": model.n_heads(i),
            "groups": model.n_groups(i),
            "d_head": model.d_head(i) if model.n_heads(i) else None,
            "neurons": model.n_neurons(i),
            "experts": model.n_experts(i),
            "signals": model.signals(i),
        }
        for i in range(model.n_layers)
    ]
    check = model.check
    return {
        "source": model.source,
        "family": model.family.name,
        "model_type": model.config.model_type,
        "parameters": sum(p.numel() for p in model.hf.parameters()),
        "d_model": model.d_model,
        "vocab": model.vocab_size,
        "max_positions": model.max_positions,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "fingerprint": model.fingerprint,
        "carried": said(carried(model.hf, model.source)),
        "check": {"stream": check.stream, "logits": check.logits, "heads": check.heads, "tolerance": check.tolerance, "passed": check.passed},
        "layers": layers,
    }  # fmt: skip


def part_card(model: Model, text: str) -> dict[str, Any]:
    """What `show MODEL PART` says, as plain data: a part's ports with their axes, or those of one port."""
    try:
        parse_part(text)
    except PatchbayError:
        port = model.port(text)
        ports, part = [port], port.part
    else:
        part = model.part(text)
        ports = _ports(model, part)
    rows = [{"port": str(port), "axes": port.axes, "editable": port.editable} for port in ports]
    return {
        "model": model.source,
        "part": str(part),
        "kind": part.kind,
        "ports": rows,
        "words": words_of(model, part),
    }


def words_of(model: Model, part: Part) -> list[dict[str, Any]]:
    """What a head or a neuron reads and writes, as the tokens nearest to it in the weights; nothing for other parts, or where the
    weights cannot be read.

    Writing is the row of the down projection, or a singular direction of the head's W_V W_O, through the unembedding with the
    final norm's gain; reading is the column of the up projection, or the direction on the other side, with the gain of the norm
    before it, against the token embedding. A singular direction has no sign: its two ends are paired, + with +. Directions of
    the weights, not what happens on a text.
    """
    try:
        found = _directions(model, part)
    except PatchbayError:
        return []
    return token_rows(
        model,
        [
            (name, does, side)
            for name, *both in found
            for does, side in zip(("reads", "writes"), both, strict=True)
            if side is not None
        ],
    )


def token_rows(model: Model, directions: Sequence[tuple[str, str, Tensor]]) -> list[dict[str, Any]]:
    """Directions of the stream, by name and by whether a part reads or writes them, as the tokens nearest to both ends; none where
    embedding or unembedding have another width."""
    gain, _, centred = norm_parts(model.final_norm_module)
    unembed, embed = model.unembed.weight.detach().float(), model.embed.weight.detach().float()
    rows = []
    for name, does, vector in directions:
        table = embed if does == "reads" else unembed
        if does == "writes":
            vector = (vector - vector.mean() if centred else vector) * gain.detach().float()
        if len(vector) != table.shape[1]:
            return []
        scores = table @ vector.to(table)
        rows.append({"direction": name, "does": does, "most": _tokens(model, scores), "least": _tokens(model, -scores)})
    return rows


def _directions(model: Model, part: Part) -> list[tuple[str, Tensor | None, Tensor]]:
    """Pairs of what is read and what is written, each [d_model]; None where what is read is no direction of the stream."""
    if part.layer is not None and part.index is not None and part.kind in FEATURES:
        return _of_feature(model, part.layer, part.kind, part.index)
    if part.layer is None or part.index is None or part.kind not in ("head", "neuron"):
        return []
    layer, at = model.layers[part.layer], model.modules[part.layer]
    if part.kind == "neuron":
        read, write = layer.mlp.weights(fold_norm=True).W_in, layer.mlp.weights().W_out
        out = _normed(write[part.index].detach().float(), at.mlp_added, (at.mlp, at.mlp_proj))
        return [("neuron", read[:, part.index].detach().float(), out)]
    head = layer.heads[part.index].weights(fold_norm=True)
    left, sizes, right = torch.linalg.svd(
        head["W_V"].detach().float() @ head["W_O"].detach().float(), full_matrices=False
    )
    total = float(sizes.square().sum())
    return [
        (
            f"{i + 1} ({100 * float(sizes[i]) ** 2 / total:.0f} % of W_V W_O)",
            left[:, i],
            _normed(right[i], at.attn_added, (at.attn, at.attn_proj)),
        )
        for i in range(min(3, len(sizes)))
    ]


def _of_feature(model: Model, layer: int, kind: str, index: int) -> list[tuple[str, Tensor | None, Tensor]]:
    """The encoder's column, of a dictionary that reads the stream, and what the decoder's row adds to the stream."""
    dictionary: Any = model.dictionaries[layer, f"{kind}s"]
    own = dictionary.W_enc.unflatten(0, (len(dictionary.sites), -1))[-1]  # of a crosscoder, its last site's
    read, write = own[:, index].detach(), dictionary.W_dec[index].detach()
    if dictionary.writes == "attn.z":
        write = torch.einsum(
            "hd,hdm->m", write.unflatten(0, (model.n_heads(layer), -1)), model.W_O(layer).detach().float()
        )
    if dictionary.writes == "mlp.act":
        write = write @ model.layers[layer].mlp.weights().W_out.detach().float()
    seen = read if dictionary.reads in ("resid_in", "resid_mid", "resid_out") else None
    return [(f"feature of {dictionary.writes}", seen, write)]


def _normed(write: Tensor, added: nn.Module | None, own: tuple[nn.Module | None, ...]) -> Tensor:
    """What is written, with the gain of the norm that the family has between the part and the stream, where it has one."""
    if added is None or any(added is module for module in own):
        return write
    gain, _, centred = norm_parts(added)
    return (write - write.mean() if centred else write) * gain.detach().float()


def _tokens(model: Model, scores: Tensor, n: int = 6) -> list[str]:
    ids = scores.topk(min(n, len(scores))).indices.tolist()
    return [model.decode([i]) if model.tokenizer is not None else str(i) for i in ids]


def _ports(model: Model, part: Part) -> list[Port]:
    """The ports of a part that this model offers; keys and values of a head are those of its group."""
    if part.kind == "layer":
        return [port for port in model.ports if port.layer == part.layer]
    return [
        model.port(f"{part}.{signal}") if part.layer is not None else part.port(signal)
        for signal in signals_of(part.kind)
        if part.layer is None or part.port(signal).signal in model.signals(part.layer)
    ]

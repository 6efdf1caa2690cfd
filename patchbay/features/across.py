"""Dictionaries of several layers: a cross-layer transcoder out of its layers, what it rebuilds, and the files of both kinds.

A cross-layer transcoder lies as circuit-tracer writes it: `W_enc_0.safetensors` (W_enc_0 [feature, d], b_enc_0, b_dec_0, threshold_0) and
`W_dec_0.safetensors` (W_dec_0 [feature, layers from this one on, d]) for each layer, and `config.yaml` with the hooks; ours also says which
layers these are, and the k of topk. A crosscoder lies in a folder as a dictionary of SAELens does, with architecture "crosscoder", W_enc
[site, d, feature], W_dec [site, feature, d], b_dec [site, d]; nobody else has a form for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from patchbay.features.dictionary import Dictionary
from patchbay.features.files import Files
from patchbay.features.hooks import from_hook
from patchbay.signal.port import PatchbayError, Port


def cross_layer(pieces: Sequence[Dictionary]) -> Dictionary:
    """A cross-layer transcoder of the dictionaries of its layers, each of which writes at all layers after it: the first, with the others."""
    layers = [piece.layer for piece in pieces]
    for i, piece in enumerate(pieces):
        if list(piece.later) != layers[i + 1 :] or (piece.reads, piece.writes) != (pieces[0].reads, pieces[0].writes):
            raise PatchbayError(
                f"a cross-layer transcoder of layers {layers}: layer {piece.layer} reads {piece.reads} and writes {piece.writes} of layers "
                f"{[piece.layer, *piece.later]}; each reads and writes the same signals, and writes at all layers after it"
            )
    told = hashlib.sha256("".join(piece.digest for piece in pieces).encode()).hexdigest()[:16]
    own = [replace(piece, family=f"{told}/{len(pieces)}", rest=()) for piece in pieces]
    return replace(own[0], rest=tuple(own[1:]))


def pieces_of(it: Dictionary) -> tuple[Dictionary, ...]:
    """The dictionaries of its layers: itself, but for a cross-layer transcoder."""
    return (replace(it, rest=()), *it.rest) if it.rest else (it,)


def reads_of(it: Dictionary) -> list[Port]:
    """The signals that it reads, of all its layers, in order."""
    return [Port(piece.reads, layer) for piece in pieces_of(it) for layer in piece.sites]


def writes_of(it: Dictionary) -> list[Port]:
    """The signals that it rebuilds, of all its layers, in order."""
    return [Port(piece.writes, layer) for piece in pieces_of(it) for layer in piece.sites]


def said(it: Dictionary, read: Tensor) -> tuple[Tensor, Tensor]:
    """What it rebuilds of what it reads, [token, sites x d] both, and the activations of all its features, [token, feature]."""
    if not it.rest:
        z = it.encode(read)
        return it.rebuilt(z, read), z
    pieces = pieces_of(it)
    reads = read.chunk(len(pieces), dim=-1)
    zs = [piece.encode(x) for piece, x in zip(pieces, reads, strict=True)]
    found: dict[int, Tensor] = {}
    for piece, x, z in zip(pieces, reads, zs, strict=True):
        own = piece.decode(z, x)
        found[piece.layer] = found.get(piece.layer, torch.zeros_like(own)) + own
        for i, layer in enumerate(piece.later):
            assert piece.onward is not None
            further = z @ piece.onward[i].to(z)
            found[layer] = found.get(layer, torch.zeros_like(further)) + further
    return torch.cat([found[piece.layer] for piece in pieces], -1), torch.cat(zs, -1)


def by_site(it: Dictionary, x: Tensor) -> Tensor:
    """[token, sites x d] as [token, site, d]."""
    return x.unflatten(1, (len(writes_of(it)), -1))


# --- files ---------------------------------------------------------------------------------------------------


def read_layers(files: Files, at: str | None) -> Dictionary:
    """The cross-layer transcoder of circuit-tracer's files."""
    said = files.settings
    n = sum(name.startswith("W_enc_") for name in files.tensors)
    hooks = (said.get("feature_input_hook"), said.get("feature_output_hook"))
    if at is None and None in hooks:
        raise PatchbayError(
            f"{files.folder}: config.yaml does not say the hooks of this cross-layer transcoder; say where its first layer sits: "
            "at='L0.resid_mid to L0.mlp.out'"
        )
    (_, reads), (_, writes) = ((0, "resid_mid"), (0, "mlp.out")) if at else (from_hook(f"blocks.0.{h}") for h in hooks)
    layers = [int(layer) for layer in said.get("layers") or range(n)]
    form = "jumprelu" if "threshold_0" in files.tensors else "topk" if said.get("k") else "relu"
    pieces = []
    for i, layer in enumerate(layers):
        W_enc, W_dec, b_enc, b_dec = _of(files, i)
        if W_dec.shape[1:] != (n - i, len(b_dec)) or W_enc.shape != (len(b_enc), len(b_dec)):
            raise PatchbayError(
                f"{files.folder}: W_enc_{i} {list(W_enc.shape)} and W_dec_{i} {list(W_dec.shape)} are not [feature, d] and "
                f"[feature, {n - i}, d] with d {len(b_dec)}"
            )
        threshold = files.tensors.get(f"threshold_{i}")
        own: dict[str, Any] = {"threshold": None if threshold is None else threshold.flatten(), "layer": layer}
        own |= {"later": tuple(layers[i + 1 :]), "onward": W_dec[:, 1:].transpose(0, 1) if i + 1 < n else None}
        own |= {
            "k": int(said["k"]) if form == "topk" else None,
            "source": str(files.folder),
            "reads": reads,
            "writes": writes,
        }
        trained = {"trained_on": {"model_name": said["model_name"]} if said.get("model_name") else {}}
        pieces.append(Dictionary(W_enc.T, W_dec[:, 0], b_enc, b_dec, form=form, **own, **trained))  # type: ignore[arg-type]
    return cross_layer(pieces)


def _of(files: Files, i: int) -> list[Tensor]:
    names = [f"W_enc_{i}", f"W_dec_{i}", f"b_enc_{i}", f"b_dec_{i}"]
    lacking = [name for name in names if name not in files.tensors]
    if lacking:
        raise PatchbayError(f"{files.folder}: a cross-layer transcoder that lacks {', '.join(lacking)}")
    return [files.tensors[name] for name in names]


def read_sites(files: Files) -> Dictionary:
    """The crosscoder of our own files."""
    cfg, tensors = files.settings, files.tensors
    lacking = [name for name in ("W_enc", "W_dec", "b_enc", "b_dec") if name not in tensors]
    places = [from_hook(str(name)) for name in cfg.get("metadata", {}).get("hook_names") or ()]
    if lacking or len(places) < 2 or len({signal for _, signal in places}) > 1:
        raise PatchbayError(
            f"{files.folder}: a crosscoder that lacks {', '.join(lacking) or 'the hooks of two layers or more, of one signal'}"
        )
    W_enc, W_dec, b_dec = (tensors[name] for name in ("W_enc", "W_dec", "b_dec"))
    if W_enc.ndim != 3 or not len(W_enc) == len(W_dec) == len(b_dec) == len(places):
        raise PatchbayError(
            f"{files.folder}: a crosscoder of {len(places)} layers with W_enc {list(W_enc.shape)} and W_dec {list(W_dec.shape)}, not "
            "[site, d, feature] and [site, feature, d]"
        )
    threshold = tensors.get("threshold")
    form: dict[str, Any] = {"form": "relu"} if threshold is None else {"form": "jumprelu", "threshold": threshold}
    form = {"form": "topk", "k": int(cfg["k"])} if cfg.get("k") else form
    place: dict[str, Any] = {"layer": places[-1][0], "reads": places[-1][1], "before": tuple(i for i, _ in places[:-1])}
    trained = {name: value for name, value in cfg["metadata"].items() if name not in ("hook_names", "sae_lens_version")}
    return Dictionary(
        W_enc.flatten(0, 1), W_dec[-1], tensors["b_enc"], b_dec[-1], **form, **place, decoders=W_dec[:-1],
        biases=b_dec[:-1], source=str(files.folder), trained_on=trained,
    )  # fmt: skip

"""Dictionaries as SAELens 6 writes them, so that others read them: `cfg.json` and `sae_weights.safetensors`, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as write_tensors
from torch import Tensor

from patchbay.features.hooks import HOOKS
from patchbay.files import write_folder
from patchbay.signal.port import PatchbayError

NAMES = {signal: hook for hook, signal in reversed(HOOKS.items())}  # the first hook of a signal
ARCHITECTURE = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu"}
SAELENS = "6.54.12"  # whose form is written; SAELens takes a file that names none for one of before 6, and drops where it sits


def write(it: Any, folder: str | Path, *, overwrite: bool = False) -> Path:
    """What `Dictionary.save` documents."""
    target = Path(folder)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        ours = (target / "cfg.json").is_file() and (target / "sae_weights.safetensors").is_file()
        ours = ours or (target / "W_enc_0.safetensors").is_file()
        if not ours:
            raise PatchbayError(f"{target} is there and holds no dictionary: choose another folder")
        if not overwrite:
            raise PatchbayError(f"{target} holds a dictionary already; overwrite=True replaces it")
    return write_folder(target, files_of(it))


def files_of(it: Any) -> dict[str, bytes]:
    """The files of a dictionary by name. Raises PatchbayError where no program has a form for it."""
    if it.rest:
        return packed_layers(it)
    if it.family:
        raise PatchbayError(
            "a layer of a cross-layer transcoder is saved with its others: save the first, which carries them"
        )
    tensors, cfg = packed(it)
    own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    contents = {"cfg.json": json.dumps(cfg, indent=2).encode(), "sae_weights.safetensors": write_tensors(own)}
    if it.density is not None:
        log = it.density.float().clamp_min(1e-10).log10().cpu()
        contents["sparsity.safetensors"] = write_tensors({"sparsity": log})
    return contents


def packed(it: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and settings, as SAELens 6 has them. Raises PatchbayError for what it has no form for."""
    if it.form not in ARCHITECTURE:
        raise PatchbayError(f"a {it.form} dictionary: SAELens has no form for it, so that none of its files is written")
    kind = ARCHITECTURE[it.form]
    tensors = {"W_enc": it.W_enc, "W_dec": it.W_dec, "b_enc": it.b_enc, "b_dec": it.b_dec}
    if it.before:
        kind, tensors = "crosscoder", packed_sites(it)
    elif it.transcodes:
        if it.form == "topk" or it.normalise != "none":
            raise PatchbayError(
                f"a {it.form} transcoder with normalise={it.normalise!r}: SAELens has no form for it (one that was trained by form='batchtopk' "
                "is saved as jumprelu)"
            )
        kind = ("" if it.form == "relu" else "jumprelu_") + (
            "skip_transcoder" if it.W_skip is not None else "transcoder"
        )
    elif it.W_skip is not None:
        raise PatchbayError(
            "a dictionary that passes on what it reads, and is no transcoder: SAELens has no form for it"
        )
    if it.W_skip is not None:
        tensors["W_skip"] = it.W_skip.T  # [d_out, d_in] there
    if it.threshold is not None:
        tensors["threshold"] = it.threshold.expand(it.n_features)
    cfg: dict[str, Any] = {
        "architecture": kind,
        "d_in": it.d_in // len(it.sites),
        "d_sae": it.n_features,
        "dtype": str(it.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": it.subtract,
        "normalize_activations": it.normalise,
        "reshape_activations": "hook_z" if it.reads == "attn.z" else "none",
        "metadata": {"sae_lens_version": SAELENS, "hook_name": hook_name(it.layer, it.reads), **it.trained_on},
    }
    if it.k is not None:
        cfg |= {"k": it.k, "rescale_acts_by_decoder_norm": False}
    if it.before:
        cfg["metadata"]["hook_names"] = [hook_name(layer, it.reads) for layer in it.sites]
    if it.transcodes:
        cfg |= {"d_out": it.d_out}
        cfg["metadata"]["hook_name_out"] = hook_name(it.layer, it.writes)
    return tensors, cfg


def hook_name(layer: int, signal: str) -> str:
    return f"blocks.{layer}.{NAMES[signal]}"


def packed_sites(it: Any) -> dict[str, Tensor]:
    """The tensors of a crosscoder, site by site."""
    return {
        "W_enc": it.W_enc.unflatten(0, (len(it.sites), -1)),
        "W_dec": torch.cat([it.decoders, it.W_dec[None]]),
        "b_enc": it.b_enc,
        "b_dec": torch.cat([it.biases, it.b_dec[None]]),
    }


def packed_layers(it: Any) -> dict[str, bytes]:
    """The files of a cross-layer transcoder, as circuit-tracer has them."""
    pieces = (it, *it.rest)
    if it.form == "groupmax":
        raise PatchbayError("a groupmax cross-layer transcoder: circuit-tracer has no form for it")
    files: dict[str, bytes] = {}
    for i, piece in enumerate(pieces):
        encoder = {f"W_enc_{i}": piece.W_enc.T, f"b_enc_{i}": piece.b_enc, f"b_dec_{i}": piece.b_dec}
        if piece.threshold is not None:
            encoder[f"threshold_{i}"] = piece.threshold.expand(piece.n_features)
        if piece.W_skip is not None:
            raise PatchbayError("a cross-layer transcoder that passes on what it reads: no form is written for it")
        own = [piece.W_dec[:, None]] + ([] if piece.onward is None else [piece.onward.transpose(0, 1)])
        for name, tensors in (("enc", encoder), ("dec", {f"W_dec_{i}": torch.cat(own, 1)})):
            held = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
            files[f"W_{name}_{i}.safetensors"] = write_tensors(held)
    said = {
        "model_kind": "cross_layer_transcoder",
        "model_name": it.trained_on.get("model_name", ""),
        "feature_input_hook": hook_name(0, it.reads).removeprefix("blocks.0."),
        "feature_output_hook": hook_name(0, it.writes).removeprefix("blocks.0."),
        "layers": [piece.layer for piece in pieces],
        **({"k": it.k} if it.k is not None else {}),
    }
    return {"config.yaml": json.dumps(said, indent=2).encode(), **files}

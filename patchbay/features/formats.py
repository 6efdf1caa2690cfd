"""What other programs' settings and tensors mean, program by program: each makes a Dictionary of what `files.read` found.

As their readers read them: SAELens 6.54 and its flat settings of before 6, sparsify 1.3, Gemma Scope 1 and 2, Llama Scope. Matrices are
turned by the signal's width, never by name; where they are square, by what the program means.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from patchbay.features import across, folds
from patchbay.features.dictionary import Dictionary, gated
from patchbay.features.files import Files
from patchbay.features.hooks import from_folder, from_hook, from_module, from_point
from patchbay.signal.port import PatchbayError

ARCHITECTURES = ("standard", "gated", "topk", "jumprelu", "batchtopk", "transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")  # fmt: skip
SCALED = "expected_average_only_in"  # trained on x sqrt(d) / mean |x|, which the file does not hold


def made(files: Files, at: str | None) -> tuple[Dictionary, str | None]:
    """The dictionary, and what is left to find out about it on text: "scale" (of its input), "subtract" (whether b_dec is), None.

    Without `at` the files have to say where it sits. Settings that are not what the program writes are refused, whatever reading them leads to."""
    reader = {
        "saelens": _saelens,
        "sparsify": _sparsify,
        "llama_scope": _llama_scope,
        "gemma_scope": _gemma_scope,
        "gemma_scope_2": _gemma_scope_2,
        "circuit_tracer": lambda files, at: (across.read_layers(files, at), None),
    }[files.program]
    try:
        return reader(files, at)
    except PatchbayError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise PatchbayError(
            f"{files.folder}: its settings or tensors are not as {files.program} writes them ({type(error).__name__}: {error})"
        ) from error


def _whole(files: Files, name: str, value: Any) -> int:
    """A number of features. Raises PatchbayError where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise PatchbayError(f"{files.folder}: {name}={value!r} is no whole number")
    return int(value)


def _place(at: str | None, reads: Any, writes: Any = None) -> dict[str, Any]:
    """layer, reads, writes: by `at`, which `load_dictionary` then sets, or by what the files say."""
    if at is not None:
        return {}
    layer, read = reads()
    written_at, write = (layer, read) if writes is None else writes()
    if written_at != layer:
        raise PatchbayError(
            f"a transcoder that reads in layer {layer} and writes in layer {written_at}: across layers none is attached; those of one layer are"
        )
    return {"layer": layer, "reads": read, "writes": write}


def _need(files: Files, *names: str) -> list[Tensor]:
    lacking = [name for name in names if name not in files.tensors]
    if lacking:
        raise PatchbayError(
            f"{files.folder} ({files.program}) lacks {', '.join(lacking)}; it has {', '.join(files.tensors) or 'no tensors'}"
        )
    return [files.tensors[name] for name in names]


def _common(files: Files, encoder: str, decoder: str, b_dec: Tensor, d_in: int, **turn: bool) -> dict[str, Any]:
    """W_enc [d, feature] and W_dec [feature, d] of the files, whichever way they lie there."""
    W_enc, W_dec = _need(files, encoder, decoder)
    return {
        "W_enc": folds.oriented(W_enc, d_in, encoder, d_first=True, square=turn["encoder_turned"]),
        "W_dec": folds.oriented(W_dec, len(b_dec), decoder, d_first=False, square=turn["decoder_turned"]),
        "b_dec": b_dec,
        "source": str(files.folder),
    }


# ---- SAELens ------------------------------------------------------------------------------------------


def _saelens(files: Files, at: str | None) -> tuple[Dictionary, str | None]:
    cfg, tensors = files.settings, files.tensors
    if cfg.get("architecture") == "crosscoder":
        return across.read_sites(files), None
    old = "metadata" not in cfg
    meta = cfg if old else cfg["metadata"]
    architecture = cfg.get("architecture", "standard")
    activation = cfg.get("activation_fn_str") or cfg.get("activation_fn") or "relu"
    if (
        architecture not in ARCHITECTURES
        or activation not in ("relu", "topk")
        or meta.get("hook_head_index") is not None
    ):
        what = f"architecture {architecture!r}" if architecture not in ARCHITECTURES else f"activation {activation!r}"
        raise PatchbayError(
            f"{files.folder}: {what if meta.get('hook_head_index') is None else 'one head of several'} is not read; known are "
            f"{', '.join(ARCHITECTURES)}, of relu and topk, of whole signals"
        )
    (b_dec,) = _need(files, "b_dec")
    d_in = int(cfg.get("d_in") or len(b_dec))
    parts = _common(files, "W_enc", "W_dec", b_dec, d_in, encoder_turned=False, decoder_turned=False)
    parts |= _form(files, architecture, activation, cfg, parts["W_enc"])
    if "W_skip" in tensors:
        parts["W_skip"] = folds.oriented(tensors["W_skip"], d_in, "W_skip", d_first=True, square=True)
    scaling = tensors.get("scaling_factor")
    if scaling is not None and bool((scaling != 1).any()):
        parts["W_dec"] = parts["W_dec"] * scaling[:, None]
    read = meta.get("hook_name") or meta.get("hook_point")
    write = meta.get("hook_name_out") if "transcoder" in architecture else None
    parts |= _place(at, lambda: from_hook(str(read)), (lambda: from_hook(str(write))) if write else None)
    kind = cfg.get("normalize_activations", "none")
    kind = SCALED if kind is True else "none" if kind in (False, None) else kind
    per_token = {"layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm_rescale"}.get(kind, "none")
    if kind not in ("none", SCALED, "layer_norm", "constant_norm_rescale"):
        raise PatchbayError(
            f"{files.folder}: normalize_activations {kind!r} is not read: its matrices are not in the file"
        )
    default = old and "transcoder" not in architecture
    subtract = bool(cfg.get("apply_b_dec_to_input", default)) and d_in == len(b_dec)
    trained = {
        name: meta[name] for name in ("model_name", "prepend_bos", "context_size", "neuronpedia_id") if name in meta
    }
    found = Dictionary(**parts, subtract=subtract, normalise=per_token, trained_on=trained)  # type: ignore[arg-type]
    if cfg.get("rescale_acts_by_decoder_norm") and found.form == "topk":
        found = folds.selected_by_norm(found)
    return found, "scale" if kind == SCALED else None


def _form(files: Files, architecture: str, activation: str, cfg: dict[str, Any], W_enc: Tensor) -> dict[str, Any]:
    """Form, thresholds and the encoder's bias of a SAELens dictionary."""
    if architecture == "gated":
        b_gate, b_mag, r_mag = _need(files, "b_gate", "b_mag", "r_mag")
        return gated(b_gate, b_mag, r_mag, W_enc)
    (b_enc,) = _need(files, "b_enc")
    if architecture.startswith("jumprelu") or "threshold" in files.tensors:
        return {"form": "jumprelu", "threshold": _need(files, "threshold")[0], "b_enc": b_enc}
    if architecture == "batchtopk":
        raise PatchbayError(
            f"{files.folder}: a batch-topk dictionary without a threshold, whose activations depend on the other tokens of a batch; save it with a "
            "fixed one (SAELens saves it as jumprelu)"
        )
    if architecture == "topk" or activation == "topk":
        k = cfg.get("k") or (cfg.get("activation_fn_kwargs") or {}).get("k")
        if not k:
            raise PatchbayError(f"{files.folder}: a topk dictionary that does not say its k")
        return {"form": "topk", "k": _whole(files, "k", k), "b_enc": b_enc}
    return {"form": "relu", "b_enc": b_enc}


# ---- sparsify -----------------------------------------------------------------------------------------


def _sparsify(files: Files, at: str | None) -> tuple[Dictionary, str | None]:
    cfg, tensors = files.settings, files.tensors
    b_dec, b_enc = _need(files, "b_dec", "encoder.bias")
    d_in = int(cfg.get("d_in") or tensors["encoder.weight"].shape[1])
    parts = _common(files, "encoder.weight", "W_dec", b_dec, d_in, encoder_turned=True, decoder_turned=False)
    n, k = len(b_enc), _whole(files, "k", cfg.get("k") or 0)
    activation = cfg.get("activation", "topk")
    if activation not in ("topk", "groupmax") or not k:
        raise PatchbayError(
            f"{files.folder}: sparsify's activation {activation!r} with k={k}; known are topk and groupmax"
        )
    wanted = int(cfg.get("num_latents") or 0) or d_in * int(cfg.get("expansion_factor") or 0)
    if wanted and wanted != n:
        raise PatchbayError(f"{files.folder}: its settings say {wanted} features, its tensors have {n}")
    transcode, name = bool(cfg.get("transcode")), files.folder.name
    if "W_skip" in tensors:
        parts["W_skip"] = folds.oriented(tensors["W_skip"], d_in, "W_skip", d_first=True, square=True)
    parts |= _place(
        at,
        lambda: from_module(name, side="input" if transcode else "output"),
        (lambda: from_module(name)) if transcode else None,
    )
    found = Dictionary(**parts, b_enc=b_enc, form=activation, k=k, subtract=not transcode)
    return found, "subtract" if transcode and d_in == len(b_dec) and bool(b_dec.any()) else None


# ---- Gemma Scope, Llama Scope -------------------------------------------------------------------------


def _gemma_scope(files: Files, at: str | None) -> tuple[Dictionary, str | None]:
    tensors = {name.lower(): value for name, value in files.tensors.items()}
    files = replace(files, tensors=tensors)
    b_dec, b_enc, threshold = _need(files, "b_dec", "b_enc", "threshold")
    d_in = prod(tensors["w_enc"].shape) // len(b_enc) if "w_enc" in tensors else len(b_dec)
    parts = _common(files, "w_enc", "w_dec", b_dec, d_in, encoder_turned=False, decoder_turned=False)
    parts |= _place(at, lambda: from_folder(str(files.folder.resolve())))
    return Dictionary(**parts, b_enc=b_enc, form="jumprelu", threshold=threshold), None


def _gemma_scope_2(files: Files, at: str | None) -> tuple[Dictionary, str | None]:
    cfg, tensors = files.settings, {name.lower(): value for name, value in files.tensors.items()}
    kind = str(cfg.get("type", "sae"))
    if kind in ("crosscoder", "clt"):
        raise PatchbayError(
            f"{files.folder}: a {kind} spans layers; dictionaries and transcoders of one layer are attached"
        )
    files = replace(files, tensors=tensors)
    b_dec, b_enc, threshold = _need(files, "b_dec", "b_enc", "threshold")
    d_in = prod(tensors["w_enc"].shape) // len(b_enc) if "w_enc" in tensors else len(b_dec)
    parts = _common(files, "w_enc", "w_dec", b_dec, d_in, encoder_turned=False, decoder_turned=False)
    if "affine_skip_connection" in tensors:
        parts["W_skip"] = tensors["affine_skip_connection"]  # [d_in, d_out], as it stands
    read, write = str(cfg.get("hf_hook_point_in")), cfg.get("hf_hook_point_out")
    parts |= _place(at, lambda: from_point(read), (lambda: from_point(str(write))) if write and write != read else None)
    return Dictionary(**parts, b_enc=b_enc, form="jumprelu", threshold=threshold), None


def _llama_scope(files: Files, at: str | None) -> tuple[Dictionary, str | None]:
    cfg = files.settings
    b_dec, b_enc = _need(files, "decoder.bias", "encoder.bias")
    d_in = int(cfg.get("d_model") or len(b_dec))
    parts = _common(files, "encoder.weight", "decoder.weight", b_dec, d_in, encoder_turned=True, decoder_turned=True)
    s = d_in**0.5 / float((cfg.get("dataset_average_activation_norm") or {}).get("in") or d_in**0.5)
    act = str(cfg.get("act_fn", "jumprelu")).lower()
    if act not in ("jumprelu", "relu", "topk"):
        raise PatchbayError(f"{files.folder}: Llama Scope's act_fn {act!r}; known are jumprelu, relu and topk")
    form: dict[str, Any] = {"form": act}
    if act == "jumprelu":
        theta = float(cfg["jump_relu_threshold"]) * s * torch.ones(len(b_enc))
        form["threshold"] = (
            theta / parts["W_dec"].float().norm(dim=1) if cfg.get("sparsity_include_decoder_norm") else theta
        )
    if act == "topk":
        form["k"] = _whole(files, "top_k", cfg["top_k"])
    read, write = str(cfg.get("hook_point_in") or cfg.get("hook_point")), cfg.get("hook_point_out")
    parts |= _place(at, lambda: from_hook(read), (lambda: from_hook(str(write))) if write and write != read else None)
    found = Dictionary(**parts, b_enc=b_enc, **form, subtract=bool(cfg.get("apply_decoder_bias_to_pre_encoder")))
    return folds.scaled_input(found, s), None

"""Files as each program lays them out give the features that the program computes, whichever way its matrices lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patchbay as pb
from tests.features.given import random, write
from tests.tolerance import close

X = torch.randn(30, 6, generator=torch.Generator().manual_seed(4))
NEW = {"d_in": 6, "d_sae": 10, "apply_b_dec_to_input": False, "normalize_activations": "none"}
HOOK = {"hook_name": "blocks.1.hook_resid_post"}


def saelens(folder: Path, cfg: dict[str, Any], **tensors: torch.Tensor) -> Path:
    return write(folder, "cfg.json", cfg, "sae_weights.safetensors", tensors)


def held(it: pb.Dictionary, *names: str) -> dict[str, torch.Tensor]:
    return {name: getattr(it, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec", *names)}


def test_saelens_standard_of_now_and_of_before_6(tmp_path: Path) -> None:
    it = random()
    new = pb.load_dictionary(saelens(tmp_path / "a", {"architecture": "standard", **NEW, "metadata": HOOK}, **held(it)))
    assert (new.layer, new.reads, new.form, new.subtract) == (1, "resid_out", "relu", False)
    assert torch.equal(new.encode(X), it.encode(X))
    flat = {
        "d_in": 6,
        "d_sae": 10,
        "hook_point": "blocks.2.hook_mlp_out",
        "activation_fn_str": "relu",
        "prepend_bos": True,
    }
    old = pb.load_dictionary(saelens(tmp_path / "b", flat, **held(it)))
    assert (old.layer, old.reads, old.subtract) == (2, "mlp.out", True), (
        "before 6 the bias was taken from the input unless said"
    )
    assert close(old.encode(X), torch.relu((X - it.b_dec) @ it.W_enc + it.b_enc))
    scaled = saelens(
        tmp_path / "c", flat | {"apply_b_dec_to_input": False}, **held(it), scaling_factor=torch.full((10,), 2.0)
    )
    found = pb.load_dictionary(scaled)
    assert close(found.decode(found.encode(X), X), 2 * it.encode(X) @ it.W_dec + it.b_dec)


def test_saelens_topk_by_decoder_norm_and_the_old_way_of_saying_k(tmp_path: Path) -> None:
    it = random(form="topk", k=3)
    cfg = {"architecture": "topk", **NEW, "k": 3, "rescale_acts_by_decoder_norm": True, "metadata": HOOK}
    found = pb.load_dictionary(saelens(tmp_path / "a", cfg, **held(it)))
    n = it.W_dec.norm(dim=1)
    top = (it.pre(X) * n).topk(3, dim=-1)
    z = torch.zeros(30, 10).scatter(-1, top.indices, top.values.relu())
    assert close(found.encode(X), z)
    assert close(found.decode(z, X), (z / n) @ it.W_dec + it.b_dec)
    flat = {
        "d_in": 6,
        "hook_name": "blocks.0.hook_resid_pre",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 3},
    }
    assert pb.load_dictionary(saelens(tmp_path / "b", flat, **held(it))).k == 3


def test_saelens_jumprelu_gated_and_transcoders(tmp_path: Path) -> None:
    jump = random(form="jumprelu")
    cfg = {"architecture": "jumprelu", **NEW, "metadata": {"hook_name": "blocks.1.attn.hook_z"}}
    found = pb.load_dictionary(saelens(tmp_path / "a", cfg, **held(jump, "threshold")))
    assert (found.reads, found.form) == ("attn.z", "jumprelu")
    assert torch.equal(found.encode(X), jump.encode(X))
    it = random()
    b_gate, b_mag, r_mag = torch.randn(3, 10, generator=torch.Generator().manual_seed(8))
    cfg = {"architecture": "gated", **NEW, "metadata": HOOK}
    gated = {"W_enc": it.W_enc, "W_dec": it.W_dec, "b_dec": it.b_dec, "b_gate": b_gate, "b_mag": b_mag, "r_mag": r_mag}
    u = X @ it.W_enc
    expected = torch.where(u + b_gate > 0, torch.relu(u * r_mag.exp() + b_mag), 0.0)
    assert close(pb.load_dictionary(saelens(tmp_path / "b", cfg, **gated)).encode(X), expected)
    code = random(6, 4)
    skip = torch.randn(4, 6, generator=torch.Generator().manual_seed(8))  # [d_out, d_in], as SAELens has it
    meta = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    cfg = {"architecture": "skip_transcoder", **NEW, "d_out": 4, "metadata": meta}
    found = pb.load_dictionary(saelens(tmp_path / "c", cfg, **held(code), W_skip=skip))
    assert (found.reads, found.writes, found.transcodes) == ("mlp.in", "mlp.out", True)
    assert close(found.decode(found.encode(X), X), code.encode(X) @ code.W_dec + code.b_dec + X @ skip.T)


@pytest.mark.parametrize(
    ("cfg", "said"),
    [
        ({"architecture": "temporal"}, "architecture 'temporal' is not read; known are standard"),
        ({"architecture": "batchtopk"}, "depend on the other tokens of a batch"),
        ({"architecture": "topk"}, "does not say its k"),
        ({"normalize_activations": "covariance_whitening"}, "covariance_whitening"),
        ({"normalize_activations": "expected_average_only_in"}, "give model= and texts="),
        ({"metadata": {"hook_name": "blocks.1.hook_q"}}, "sits at 'blocks.1.hook_q', which is none of"),
        ({"metadata": {"hook_name": "blocks.1.hook_resid_post", "hook_head_index": 2}}, "one head of several"),
        ({"activation_fn_str": "tanh-relu"}, "activation 'tanh-relu'"),
    ],
)
def test_saelens_files_that_cannot_be_right_are_refused(tmp_path: Path, cfg: dict[str, Any], said: str) -> None:
    folder = saelens(tmp_path, {"architecture": "standard", **NEW, "metadata": HOOK} | cfg, **held(random()))
    with pytest.raises(pb.PatchbayError, match=said):
        pb.load_dictionary(folder)


def test_matrices_may_lie_either_way(tmp_path: Path) -> None:
    it = random()
    turned = held(it) | {"W_enc": it.W_enc.T, "W_dec": it.W_dec.T}
    cfg = {"architecture": "standard", **NEW, "metadata": HOOK}
    found = pb.load_dictionary(saelens(tmp_path, cfg, **turned))
    assert torch.equal(found.encode(X), it.encode(X))
    assert torch.equal(found.W_dec, it.W_dec)
    with pytest.raises(pb.PatchbayError, match="none of its sides"):
        pb.load_dictionary(saelens(tmp_path, cfg | {"d_in": 7}, **turned))


@pytest.mark.parametrize("n", [10, 6])  # 6: square, where the program's own orientation counts
def test_sparsify(tmp_path: Path, n: int) -> None:
    it = random(n=n, form="topk", k=3, subtract=True)
    tensors = {"encoder.weight": it.W_enc.T, "encoder.bias": it.b_enc, "W_dec": it.W_dec, "b_dec": it.b_dec}
    cfg = {"expansion_factor": 32, "num_latents": n, "k": 3, "d_in": 6, "activation": "topk"}
    found = pb.load_dictionary(write(tmp_path / "layers.3", "cfg.json", cfg, "sae.safetensors", tensors))
    assert (found.layer, found.reads, found.subtract) == (3, "resid_out", True)
    assert torch.equal(found.encode(X), it.encode(X))
    assert torch.equal(found.W_dec, it.W_dec)
    cfg |= {"transcode": True, "skip_connection": True}
    skip = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    folder = write(tmp_path / "model.layers.2.mlp", "cfg.json", cfg, "sae.safetensors", tensors | {"W_skip": skip})
    code = pb.load_dictionary(folder)
    assert (code.layer, code.reads, code.writes, code.subtract) == (2, "mlp.in", "mlp.out", False)
    assert close(code.decode(code.encode(X), X) - code.encode(X) @ it.W_dec - it.b_dec, X @ skip.T)
    with pytest.raises(pb.PatchbayError, match=f"say 5 features, its tensors have {n}"):
        pb.load_dictionary(
            write(tmp_path / "layers.4", "cfg.json", cfg | {"num_latents": 5}, "sae.safetensors", tensors)
        )


def test_gemma_scope_1_and_2(tmp_path: Path) -> None:
    it = random(form="jumprelu")
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: value.numpy() for name, value in held(it, "threshold").items()})
    found = pb.load_dictionary(folder / "params.npz")
    assert (found.layer, found.reads, found.subtract) == (20, "resid_out", False)
    assert torch.equal(found.encode(X), it.encode(X))
    tensors = {name.lower(): value for name, value in held(it, "threshold").items()}
    skip = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))  # [d_in, d_out], as Gemma Scope 2 has it
    points = {"hf_hook_point_in": "model.layers.9.pre_feedforward_layernorm.output", "hf_hook_point_out": "model.layers.9.post_feedforward_layernorm.output"}  # fmt: skip
    second = write(tmp_path / "two", "config.json", {"type": "transcoder", **points}, "params.safetensors", tensors | {"affine_skip_connection": skip})  # fmt: skip
    code = pb.load_dictionary(second)
    assert (code.layer, code.reads, code.writes) == (9, "mlp.in", "mlp.out")
    assert close(code.decode(code.encode(X), X), it.encode(X) @ it.W_dec + it.b_dec + X @ skip)
    clt = write(tmp_path / "clt", "config.json", {"type": "clt", **points}, "params.safetensors", tensors)
    with pytest.raises(pb.PatchbayError, match="a clt spans layers"):
        pb.load_dictionary(clt)


def test_llama_scope_puts_its_scale_into_the_weights(tmp_path: Path) -> None:
    it = random()
    tensors = {
        "encoder.weight": it.W_enc.T,
        "encoder.bias": it.b_enc,
        "decoder.weight": it.W_dec.T,
        "decoder.bias": it.b_dec,
    }
    cfg = {"d_model": 6, "hook_point_in": "blocks.4.hook_resid_post", "hook_point_out": "blocks.4.hook_resid_post", "act_fn": "jumprelu",
           "jump_relu_threshold": 0.3, "dataset_average_activation_norm": {"in": 4.0, "out": 4.0}}  # fmt: skip
    found = pb.load_dictionary(write(tmp_path, "hyperparams.json", cfg, "checkpoints/final.safetensors", tensors))
    s = 6**0.5 / 4.0
    pre = (s * X) @ it.W_enc + it.b_enc
    z = torch.where(pre > 0.3 * s, pre.relu(), 0.0)
    assert close(found.encode(X), z)
    assert close(found.decode(z, X), (z @ it.W_dec + it.b_dec) / s)
    assert (found.layer, found.reads) == (4, "resid_out")


def folder_of(program: str, folder: Path, changed: dict[str, Any], **tensors: torch.Tensor) -> Path:
    """A small dictionary as a program lays it out, with other settings or tensors."""
    it = random(form="jumprelu")
    encoder = {"encoder.weight": it.W_enc.T, "encoder.bias": it.b_enc}
    decoder = {"decoder.weight": it.W_dec.T, "decoder.bias": it.b_dec}
    rows = {"W_dec": it.W_dec, "b_dec": it.b_dec}
    lower = {name.lower(): value for name, value in held(it, "threshold").items()}
    point = {"type": "sae", "hf_hook_point_in": "model.layers.9.output"}
    hook = {"hook_point_in": "blocks.4.hook_resid_post"}
    norm = {"dataset_average_activation_norm": {"in": 4.0}}
    files: dict[str, tuple[str, dict[str, Any], str, dict[str, torch.Tensor]]] = {
        "saelens": ("cfg.json", {"architecture": "topk", "k": 3, **NEW, "metadata": HOOK}, "sae_weights.safetensors", held(it)),
        "sparsify": ("cfg.json", {"d_in": 6, "k": 3}, "sae.safetensors", encoder | rows),
        "gemma_scope_2": ("config.json", point, "params.safetensors", lower),
        "llama_scope": ("hyperparams.json", {"d_model": 6, "jump_relu_threshold": 0.3, **hook, **norm}, "checkpoints/final.safetensors", encoder | decoder),
    }  # fmt: skip
    settings, cfg, weights, own = files[program]
    return write(folder / "layers.3", settings, cfg | changed, weights, own | tensors)


ENCODERS = {
    "saelens": "W_enc",
    "sparsify": "encoder.weight",
    "gemma_scope_2": "w_enc",
    "llama_scope": "encoder.weight",
}


@pytest.mark.parametrize("program", ENCODERS)
def test_a_number_that_is_none_is_refused_in_every_programs_files(program: str, tmp_path: Path) -> None:
    name = ENCODERS[program]
    whole = folder_of(program, tmp_path / "whole", {})
    assert pb.load_dictionary(whole).n_features == 10
    spoiled = torch.zeros(6, 10) if name.lower() == "w_enc" else torch.zeros(10, 6)
    spoiled[2, 3] = torch.inf
    with pytest.raises(pb.PatchbayError, match="W_enc holds 1 numbers that are NaN or infinite"):
        pb.load_dictionary(folder_of(program, tmp_path / "spoiled", {}, **{name: spoiled}))


@pytest.mark.parametrize(
    ("program", "changed", "said"),
    [
        ("saelens", {"k": 2.5}, "k=2.5 is no whole number"),
        ("saelens", {"k": "many"}, "k='many' is no whole number"),
        ("saelens", {"metadata": None}, "are not as saelens writes them"),
        ("saelens", {"d_in": [6]}, "are not as saelens writes them"),
        ("sparsify", {"k": True}, "k=True is no whole number"),
        ("sparsify", {"num_latents": "all"}, "are not as sparsify writes them"),
        ("llama_scope", {"dataset_average_activation_norm": 4.0}, "are not as llama_scope writes them"),
        ("llama_scope", {"jump_relu_threshold": None}, "are not as llama_scope writes them"),
        ("llama_scope", {"dataset_average_activation_norm": {"in": float("nan")}}, "that are NaN or infinite"),
    ],
)
def test_settings_that_no_program_writes_are_refused(
    program: str, changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(pb.PatchbayError, match=said):
        pb.load_dictionary(folder_of(program, tmp_path, changed))

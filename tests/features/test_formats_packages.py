"""Dictionaries that SAELens and sparsify themselves wrote give the features that they compute, and SAELens opens ours.

Needs the packages: the extras `saelens` and `sparsify`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import patchbay as pb
from tests.features.given import random

pytestmark = pytest.mark.slow
D, OUT, N = 12, 8, 40
X = torch.randn(50, D, generator=torch.Generator().manual_seed(4)) * 2
WITHIN = 1e-6  # of the largest value
ARCHITECTURES = ("standard", "gated", "topk", "jumprelu", "transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")  # fmt: skip
TRAINED = ("standard", "gated", "topk", "jumprelu", "batchtopk", "matryoshka_batchtopk")
NORMALISED = ("none", "layer_norm", "constant_norm_rescale")


def saelens() -> Any:
    return pytest.importorskip("sae_lens", reason="SAELens is not installed: pip install 'patchbay-lm[saelens]'")


def sparsify() -> Any:
    return pytest.importorskip("sparsify", reason="sparsify is not installed: pip install 'patchbay-lm[sparsify]'")


def near(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    assert bool((theirs != 0).any())
    return bool((ours - theirs.detach()).abs().max() <= WITHIN * theirs.abs().max().clamp_min(1.0))


def drawn(module: torch.nn.Module, seed: int = 0) -> Any:
    """The module with all its tensors random, rows of unequal norms, thresholds above 0."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(torch.randn(value.shape, generator=draw) * (0.3 if value.ndim > 1 else 0.1))
            if name == "threshold":
                value.abs_()
    return module


def settings(more: dict[str, Any]) -> dict[str, Any]:
    return {"d_in": D, "d_sae": N, "dtype": "float32", "device": "cpu", **more}


def theirs(package: Any, architecture: str, **more: Any) -> Any:
    """One of SAELens's dictionaries with random tensors."""
    from sae_lens.registry import get_sae_class

    kind, config = get_sae_class(architecture)
    transcodes = "transcoder" in architecture
    more |= {"d_out": OUT if "skip" not in architecture else D} if transcodes else {}
    more |= {"apply_b_dec_to_input": False} if transcodes else {}
    more |= {"k": 5} if architecture == "topk" else {}
    hooks = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    cfg = config(**settings(more))
    cfg.metadata = package.saes.sae.SAEMetadata(**(hooks if transcodes else {"hook_name": "blocks.1.hook_resid_post"}))
    return drawn(kind(cfg))


def same(found: pb.Dictionary, real: Any, x: torch.Tensor = X) -> None:
    z = real.encode(x).detach()
    assert near(found.encode(x), z)
    assert near(found.decode(z, x), real(x))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saelens(architecture: str, tmp_path: Path) -> None:
    real = theirs(saelens(), architecture)
    real.save_model(tmp_path / "a")
    found = pb.load_dictionary(tmp_path / "a")
    same(found, real)
    assert (found.layer, found.transcodes) == (1, "transcoder" in architecture)


@pytest.mark.parametrize("normalise", NORMALISED)
@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("architecture", ["standard", "gated", "topk", "jumprelu"])
def test_saelens_settings(architecture: str, subtract: bool, normalise: str, tmp_path: Path) -> None:
    more = {"apply_b_dec_to_input": subtract, "normalize_activations": normalise}
    rescaled = {"rescale_acts_by_decoder_norm": True} if architecture == "topk" else {}
    real = theirs(saelens(), architecture, **more, **rescaled)
    real.save_model(tmp_path / "a")
    found = pb.load_dictionary(tmp_path / "a")
    z = real.encode(X).detach()
    x_hat = real(X)
    assert near(found.encode(X), z)
    assert near(found.decode(found.encode(X), X), x_hat)


@pytest.mark.parametrize("architecture", TRAINED)
def test_saelens_after_training(architecture: str, tmp_path: Path) -> None:
    """What its training classes save for use: batch-topk and matryoshka ones as jumprelu, with the running threshold."""
    package = saelens()
    from sae_lens.registry import get_sae_training_class

    kind, config = get_sae_training_class(architecture)
    more: dict[str, Any] = {"k": 5} if "topk" in architecture else {}
    more |= {"matryoshka_widths": [10, N]} if "matryoshka" in architecture else {}
    cfg = config(**settings(more))
    cfg.metadata = package.saes.sae.SAEMetadata(hook_name="blocks.1.hook_resid_post")
    real = drawn(kind(cfg))
    if hasattr(real, "topk_threshold"):
        real.topk_threshold.fill_(0.4)
    real.save_inference_model(tmp_path / "a")
    used = package.SAE.load_from_disk(tmp_path / "a")
    same(pb.load_dictionary(tmp_path / "a"), used)


OLD: tuple[dict[str, Any], ...] = (
    {"hook_point": "blocks.1.hook_resid_post"},
    {"hook_name": "blocks.1.hook_resid_post", "apply_b_dec_to_input": False, "normalize_activations": False},
    {"hook_name": "blocks.1.hook_resid_post", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}},
    {"hook_name": "blocks.1.hook_resid_post", "architecture": "jumprelu", "normalize_activations": "layer_norm"},
)


@pytest.mark.parametrize("cfg", OLD)
def test_saelens_of_before_6_is_read_as_it_reads_it(cfg: dict[str, Any], tmp_path: Path) -> None:
    package = saelens()
    from tests.features.given import write

    it = random(D, n=N, form="jumprelu")
    names = ("W_enc", "W_dec", "b_enc", "b_dec", *(["threshold"] if "architecture" in cfg else []))
    tensors = {name: getattr(it, name) for name in names}
    folder = write(
        tmp_path, "cfg.json", {"d_in": D, "d_sae": N, "dtype": "float32", **cfg}, "sae_weights.safetensors", tensors
    )
    same(pb.load_dictionary(folder), package.SAE.load_from_disk(folder))


@pytest.mark.parametrize("architecture", ["abstopk", "temporal", "matching_pursuit"])
def test_saelens_forms_that_are_not_read_are_refused_by_name(architecture: str, tmp_path: Path) -> None:
    saelens()
    from tests.features.given import write

    cfg = settings({"architecture": architecture, "k": 5, "metadata": {"hook_name": "blocks.1.hook_resid_post"}})
    it = random(D, n=N)
    tensors = {name: getattr(it, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    with pytest.raises(pb.PatchbayError, match=f"architecture '{architecture}' is not read"):
        pb.load_dictionary(write(tmp_path, "cfg.json", cfg, "sae_weights.safetensors", tensors))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"subtract": True},
        {"form": "topk", "k": 5},
        {"form": "jumprelu"},
        {"normalise": "layer_norm", "subtract": True},
        {"reads": "mlp.in", "writes": "mlp.out"},
        {"reads": "mlp.in", "writes": "mlp.out", "form": "jumprelu", "W_skip": torch.eye(D) * 0.3},
    ],
)
def test_saelens_opens_what_we_save(more: dict[str, Any], tmp_path: Path) -> None:
    package = saelens()
    it = random(D, n=N, **more)
    real = package.SAE.load_from_disk(it.save(tmp_path / "a"))
    assert near(it.encode(X), real.encode(X))
    assert near(it.decode(it.encode(X), X), real(X))
    hook = "blocks.0.mlp.hook_in" if it.transcodes else "blocks.0.hook_resid_post"
    assert real.cfg.metadata.hook_name == hook


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
@pytest.mark.parametrize("more", [{}, {"transcode": True}, {"transcode": True, "skip_connection": True}])
def test_sparsify(more: dict[str, Any], activation: str, tmp_path: Path) -> None:
    package = sparsify()
    cfg = package.SparseCoderConfig(activation=activation, num_latents=N, k=5, **more)
    real = drawn(package.SparseCoder(D, cfg))
    folder = tmp_path / ("model.layers.2.mlp" if more else "layers.2")
    real.save_to_disk(folder)
    found = pb.load_dictionary(folder)
    values, indices, _ = real.encode(X)
    z = torch.zeros(len(X), N).scatter(1, indices.detach(), values.detach())
    assert near(found.encode(X), z)
    assert near(found.decode(found.encode(X), X), real(X).sae_out)
    assert (found.layer, found.transcodes) == (2, bool(more))

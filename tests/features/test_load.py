"""A dictionary is believed after it rebuilds the signal that it is said to be of; what its file leaves open is found on text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import patchbay as pb
from patchbay.features import folds
from patchbay.features.load import fvu, proved, signals, unexplained
from tests import given
from tests.features.given import dictionary, random, write
from tests.tolerance import close


@pytest.fixture(scope="module")
def model() -> pb.Model:
    return pb.load(given.gpt2(0))


@pytest.fixture(scope="module")
def texts() -> torch.Tensor:
    return torch.randint(3, 40, (6, 12), generator=torch.Generator().manual_seed(1))


def exact(model: pb.Model, texts: torch.Tensor, at: str = "L1.resid_out", worse: float = 0.0) -> pb.Dictionary:
    """Every coordinate's two signs as features: the signal is rebuilt whole."""
    it = dictionary(model, at)
    read, _ = signals(it, model, texts)
    eye = torch.eye(read.shape[1])
    return pb.Dictionary(torch.cat([eye, -eye], 1), torch.cat([eye, -eye]) * (1 - worse), torch.zeros(64), torch.zeros(32),
                         layer=it.layer, reads=it.reads)  # fmt: skip


def test_fvu_is_its_formula(model: pb.Model, texts: torch.Tensor) -> None:
    it = exact(model, texts, worse=0.3)
    trace = pb.run(model, texts, taps=["L1.resid_out"])
    x = trace["L1.resid_out"][:, 1:].flatten(0, 1)
    off = sum(float(((token - 0.7 * token) ** 2).sum()) for token in x)
    spread = sum(float(((token - x.mean(0)) ** 2).sum()) for token in x)
    assert close(fvu(it, model, texts), off / spread)
    assert close(unexplained(x, x.mean(0).expand_as(x)), 1.0)


def test_the_first_token_and_padding_are_left_out(model: pb.Model) -> None:
    it = dictionary(model, "L0.resid_out")
    read, written = signals(it, model, [[3, 4, 5], [6, 7, 8, 9, 10]])
    assert read.shape == written.shape == (2 + 4, 32)
    alone = pb.run(model, [[3, 4, 5]], taps=["L0.resid_out"])["L0.resid_out"][0, 1:]
    assert close(read[:2], alone)
    with pytest.raises(pb.PatchbayError, match="texts of two tokens or more"):
        signals(it, model, [[3]])


def test_proved_or_refused_with_the_number(model: pb.Model, texts: torch.Tensor, tmp_path: Path) -> None:
    folder = exact(model, texts, worse=0.3).save(tmp_path / "a")
    found = pb.load_dictionary(folder, model=model, texts=texts)
    assert any(note.startswith("FVU 0.") and "on 6 texts" in note for note in found.notes)
    assert any("not proved" in note for note in pb.load_dictionary(folder).notes)
    replace(exact(model, texts, worse=1.0), reads="resid_in", writes="resid_in", layer=0).save(tmp_path / "b")
    with pytest.raises(
        pb.PatchbayError, match=r"leaves 1\S* of the variance of L0.resid_in unexplained(?s:.)*0.5 is the most"
    ):
        pb.load_dictionary(tmp_path / "b", model=model, texts=texts)
    with pytest.raises(pb.PatchbayError, match="give model= and texts= together"):
        pb.load_dictionary(folder, model=model)
    with pytest.raises(pb.PatchbayError, match="made for 6 numbers, L0.resid_out of GPT2LMHeadModel has 32"):
        pb.load_dictionary(random().save(tmp_path / "c"), model=model, texts=texts)


def test_the_scale_of_the_input_is_found_on_text(model: pb.Model, texts: torch.Tensor, tmp_path: Path) -> None:
    it = exact(model, texts)
    read, _ = signals(it, model, texts)
    s = 32**0.5 / float(read.double().norm(dim=1).mean())
    trained = replace(folds.scaled_input(it, 1 / s), b_enc=torch.full((64,), -0.01))  # what was trained on s x
    cfg = {"architecture": "standard", "d_in": 32, "d_sae": 64, "apply_b_dec_to_input": False, "normalize_activations": "expected_average_only_in",
           "metadata": {"hook_name": "blocks.1.hook_resid_post"}}  # fmt: skip
    tensors = {name: getattr(trained, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    folder = write(tmp_path, "cfg.json", cfg, "sae_weights.safetensors", tensors)
    found = pb.load_dictionary(folder, model=model, texts=texts)
    assert close(found.encode(read), trained.encode(s * read))
    assert "sqrt(d) over the mean norm" in found.notes[0]


@pytest.mark.parametrize("subtract", [True, False])
def test_whether_a_transcoders_bias_is_subtracted_is_what_rebuilds(
    texts: torch.Tensor, tmp_path: Path, subtract: bool
) -> None:
    hf = given.gpt2(0)
    hf.transformer.h[0].mlp.c_proj.weight.data *= 100  # an MLP that writes as much as it reads
    model = pb.load(hf)
    it = dictionary(model, "L0.mlp.in to L0.mlp.out", n=64)
    read, written = signals(it, model, texts)
    b_dec = written.mean(0) + 1.0
    seen = read - b_dec if subtract else read
    z = (seen @ it.W_enc + it.b_enc).relu().topk(30)
    held = torch.zeros(len(seen), 64).scatter(1, z.indices, z.values)
    W_dec = torch.linalg.solve(
        held.T @ held + 0.1 * torch.eye(64), held.T @ (written - b_dec)
    )  # a good decoder for this way of reading
    tensors = {"encoder.weight": it.W_enc.T, "encoder.bias": it.b_enc, "W_dec": W_dec, "b_dec": b_dec}
    cfg = {"num_latents": 64, "k": 30, "d_in": 32, "activation": "topk", "transcode": True}
    folder = write(tmp_path / "transformer.h.0.mlp", "cfg.json", cfg, "sae.safetensors", tensors)
    found = pb.load_dictionary(folder, model=model, texts=texts)
    assert found.subtract is subtract
    assert f"b_dec {'is' if subtract else 'is not'} taken from what it reads" in found.notes[0]


def test_a_name_on_the_hub_is_refused_offline() -> None:
    with pytest.raises(pb.PatchbayError, match="could not be had from the Hugging Face hub"):
        pb.load_dictionary("nobody/nothing-of-this-name/layer_3")


def test_dictionaries_that_are_wrong_on_text_are_refused_or_said(
    model: pb.Model, texts: torch.Tensor, tmp_path: Path
) -> None:
    """Another model, layer, orientation or scale shows in the number; features that are silent are counted."""
    it = exact(model, texts, worse=0.3)
    assert not any("length" in note for note in proved(exact(model, texts), model, texts).notes)
    half = replace(it, W_dec=it.W_dec / 0.7 * 0.6)
    assert any("nearest to the signal at 1.67 times its length" in note for note in proved(half, model, texts).notes)
    loud = replace(it, W_enc=it.W_enc * 4)
    square = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    signed = pb.Dictionary(square, square.T, torch.full((32,), 20.0), -20.0 * square.sum(1), layer=1)
    proved(signed, model, texts)
    crossed = replace(signed, W_enc=signed.W_enc.T)
    for wrong in (loud, crossed):
        with pytest.raises(pb.PatchbayError, match=r"of the variance of L1.resid_out unexplained(?s:.)*another scale"):
            proved(wrong, model, texts)
    dead = replace(it, b_enc=torch.full((64,), -1e3))
    with pytest.raises(
        pb.PatchbayError, match="no feature that is active at L1.resid_out on these texts: all 64 are dead"
    ):
        proved(dead, model, texts)
    some = replace(
        it,
        W_enc=torch.cat([it.W_enc, torch.zeros(32, 16)], 1),
        W_dec=torch.cat([it.W_dec, torch.ones(16, 32)]),
        b_enc=torch.zeros(80),
    )
    assert any("20% of its features are silent" in note for note in proved(some, model, texts).notes)
    fitted = replace(it, trained_on={"model_name": "another", "patchbay_fingerprint": "0" * 64})
    assert any("trained on other weights (another, 00000000)" in note for note in proved(fitted, model, texts).notes)
    other = pb.load(given.gpt2(7))
    read, _ = signals(it, model, texts)
    mean = read.mean(0)
    basis = torch.linalg.svd(read - mean, full_matrices=False)[2][
        :6
    ]  # most of this model's stream, little of another's
    own = pb.Dictionary(
        torch.cat([basis, -basis]).T,
        torch.cat([basis, -basis]),
        torch.cat([-basis @ mean, basis @ mean]),
        mean,
        layer=1,
    )
    proved(own, model, texts)
    with pytest.raises(pb.PatchbayError, match="another model, layer or signal"):
        proved(own, other, texts)


def test_a_dictionary_of_another_site_is_refused_and_so_are_files_without_numbers(
    model: pb.Model, texts: torch.Tensor, tmp_path: Path
) -> None:
    """The most of one signal in few features: little of what attention or an MLP adds. NaN weights are refused before any run."""
    read, _ = signals(exact(model, texts), model, texts)
    mean = read.mean(0)
    basis = torch.linalg.svd(read - mean, full_matrices=False)[2][:6]
    both = torch.cat([basis, -basis])
    folder = pb.Dictionary(both.T, both, -both @ mean, mean, layer=1).save(tmp_path / "own")
    assert "FVU" in pb.load_dictionary(folder, model=model, texts=texts).notes[0]
    for at in ("L1.mlp.out", "L1.attn.out"):
        with pytest.raises(pb.PatchbayError, match=rf"of the variance of {at} unexplained"):
            pb.load_dictionary(folder, at=at, model=model, texts=texts)
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["W_enc"][0, 0] = torch.nan
    save_file(tensors, folder / "sae_weights.safetensors")
    with pytest.raises(pb.PatchbayError, match="W_enc holds 1 numbers that are NaN or infinite"):
        pb.load_dictionary(folder)

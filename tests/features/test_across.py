"""Dictionaries of several layers: what they rebuild is their formula, their files come back, what is not whole is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import patchbay as pb
from patchbay.features.across import by_site, cross_layer, pieces_of, said
from patchbay.features.load import fvu, signals
from tests import given
from tests.features.given import crosscoder, layers, random
from tests.tolerance import close

X = torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(6))  # [layer, token, d]


@pytest.mark.parametrize("more", [{}, {"form": "topk", "k": 3}, {"form": "jumprelu"}])
def test_a_crosscoder_is_its_formula_and_comes_back(more: dict[str, Any], tmp_path: Path) -> None:
    it = crosscoder(6, (0, 1, 3), **more)
    x = torch.cat(list(X), -1)
    pre = sum(X[s] @ it.W_enc[6 * s : 6 * s + 6] for s in range(3)) + it.b_enc
    z = it.encode(x)
    assert close(z, it.select(pre))
    assert it.decoders is not None
    assert it.biases is not None
    by_site = [*(z @ it.decoders[s] + it.biases[s] for s in range(2)), z @ it.W_dec + it.b_dec]
    assert close(it.rebuilt(z, x), torch.cat(by_site, -1))
    assert close(it.decode(z, x), by_site[-1])
    back = pb.load_dictionary(it.save(tmp_path / "a"))
    assert torch.equal(back.rebuilt(back.encode(x), x), it.rebuilt(z, x))
    assert (back.sites, back.layer, back.reads, back.place) == ((0, 1, 3), 3, "resid_out", it.place)
    moved = pb.load_dictionary(tmp_path / "a", at="L0.resid_in, L1.resid_in, L2.resid_in")
    assert (moved.sites, moved.reads, moved.writes) == ((0, 1, 2), "resid_in", "resid_in")
    with pytest.raises(pb.PatchbayError, match="3 signals of one kind with commas"):
        pb.load_dictionary(tmp_path / "a", at="L0.resid_in")


@pytest.mark.parametrize("more", [{}, {"form": "topk", "k": 3}, {"form": "jumprelu"}])
def test_a_cross_layer_transcoder_is_its_formula_and_comes_back(more: dict[str, Any], tmp_path: Path) -> None:
    it = layers(6, (0, 1, 2), **more)
    pieces = pieces_of(it)
    found = by_site(it, said(it, torch.cat(list(X), -1))[0]).transpose(0, 1)
    zs = [piece.encode(x) for piece, x in zip(pieces, X, strict=True)]
    for m in range(3):
        y = zs[m] @ pieces[m].W_dec + pieces[m].b_dec
        for earlier in range(m):
            rows = pieces[earlier].onward
            assert rows is not None
            y = y + zs[earlier] @ rows[m - earlier - 1]
        assert close(found[m], y)
    back = pb.load_dictionary(it.save(tmp_path / "a"))
    assert torch.equal(by_site(back, said(back, torch.cat(list(X), -1))[0]).transpose(0, 1), found)
    assert [one.place for one in pieces_of(back)] == [
        "L0.mlp.in to L0.mlp.out, L1.mlp.out, L2.mlp.out", "L1.mlp.in to L1.mlp.out, L2.mlp.out", "L2.mlp.in to L2.mlp.out",
    ]  # fmt: skip
    assert "and of layers 1, 2" in repr(back)
    with pytest.raises(pb.PatchbayError, match="is saved with its others"):
        it.rest[0].save(tmp_path / "b")


def test_circuit_tracers_own_layout(tmp_path: Path) -> None:
    """As its `to_safetensors` writes it: [feature, d] and [feature, layers from this one on, d], and a YAML of hooks."""
    it = layers(6, (0, 1), form="jumprelu")
    draw = [piece.onward for piece in pieces_of(it)]
    for i, piece in enumerate(pieces_of(it)):
        assert piece.threshold is not None
        later = [] if draw[i] is None else list(draw[i])  # type: ignore[arg-type]
        encoder = {f"W_enc_{i}": piece.W_enc.T.contiguous(), f"b_enc_{i}": piece.b_enc, f"b_dec_{i}": piece.b_dec, f"threshold_{i}": piece.threshold[None]}  # fmt: skip
        save_file(encoder, tmp_path / f"W_enc_{i}.safetensors")
        save_file({f"W_dec_{i}": torch.stack([piece.W_dec, *later], 1)}, tmp_path / f"W_dec_{i}.safetensors")
    with pytest.raises(pb.PatchbayError, match="does not say the hooks"):
        pb.load_dictionary(tmp_path)
    (tmp_path / "config.yaml").write_text(
        "model_name: gpt2  # whose\nfeature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n"
    )
    found = pb.load_dictionary(tmp_path / "W_enc_0.safetensors")
    assert [(one.layer, one.reads, one.writes) for one in pieces_of(found)] == [(0, "resid_mid", "mlp.out"), (1, "resid_mid", "mlp.out")]  # fmt: skip
    assert found.trained_on == {"model_name": "gpt2"}
    x = torch.cat([X[0], X[1]], -1)
    assert torch.equal(said(found, x)[0], said(it, x)[0])
    save_file({"W_dec_1": torch.zeros(10, 2, 6)}, tmp_path / "W_dec_1.safetensors")
    with pytest.raises(pb.PatchbayError, match=r"W_dec_1 \[10, 2, 6\] are not \[feature, d\] and \[feature, 1, d\]"):
        pb.load_dictionary(tmp_path)
    (tmp_path / "W_dec_1.safetensors").unlink()
    with pytest.raises(pb.PatchbayError, match="lacks W_dec_1"):
        pb.load_dictionary(tmp_path)


def test_they_are_proved_on_text() -> None:
    model, texts = pb.load(given.gpt2(0)), torch.randint(3, 40, (6, 12), generator=torch.Generator().manual_seed(1))
    sites = crosscoder(32, (0, 1), n=128)
    x, y = signals(sites, model, texts)
    assert torch.equal(x, y)
    trace = pb.run(model, texts, taps=["L0.resid_out", "L1.resid_out"])
    assert torch.equal(x, torch.cat([trace[port][:, 1:].flatten(0, 1) for port in trace.ports], -1))
    eye = torch.eye(64)
    whole = torch.cat([eye, -eye]).unflatten(1, (2, 32)).transpose(0, 1)
    exact = pb.Dictionary(torch.cat([eye, -eye], 1), whole[1], torch.zeros(128), torch.zeros(32), layer=1, before=(0,),
                          decoders=whole[:1] * 0.7, biases=torch.zeros(1, 32))  # fmt: skip
    first = x[:, :32].double()
    wrong = (first * 0.3).pow(2).sum() / (first - first.mean(0)).pow(2).sum()
    assert close(fvu(exact, model, texts), wrong / 2), "the mean over its sites, of which the last is whole"
    across = layers(32, (0, 1))
    taps = [f"L{i}.mlp.{side}" for i in range(2) for side in ("in", "out")]
    trace = pb.run(model, texts, taps=taps)
    (x0, y0), (x1, y1) = (
        tuple(trace[f"L{i}.mlp.{side}"][:, 1:].flatten(0, 1) for side in ("in", "out")) for i in (0, 1)
    )
    found = by_site(across, said(across, torch.cat([x0, x1], 1))[0]).transpose(0, 1)
    by_layer = [float((y - s).double().pow(2).sum() / (y - y.mean(0)).double().pow(2).sum()) for y, s in zip((y0, y1), found, strict=True)]  # fmt: skip
    assert close(fvu(across, model, texts), sum(by_layer) / 2)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"before": (1, 3), "layer": 0}, "layers stand in order, each once"),
        ({"decoders": None}, "needs W_enc"),
        ({"biases": torch.zeros(2, 5)}, r"biases has shape \[2, 5\]"),
        ({"decoders": torch.full((2, 10, 6), torch.nan)}, "decoders holds 120 numbers that are NaN"),
        ({"normalise": "layer_norm"}, "normalises no token"),
        ({"later": (5,)}, "needs onward"),
    ],
)
def test_what_does_not_fit_is_refused(more: dict[str, Any], said: str) -> None:
    with pytest.raises(pb.PatchbayError, match=said):
        crosscoder(6, (0, 1, 3), **more)


def test_a_cross_layer_transcoder_is_whole_or_refused(tmp_path: Path) -> None:
    model = pb.load(given.gpt2(0))
    it = layers(32, (0, 1))
    with pytest.raises(pb.PatchbayError, match=r"layers \[1\] of a cross-layer transcoder of 2 were given"):
        model.with_dictionaries(it.rest[0])
    with pytest.raises(pb.PatchbayError, match="writes at all layers after it"):
        cross_layer([random(layer=0, reads="mlp.in", writes="mlp.out"), random(layer=1, reads="mlp.in", writes="mlp.out")])  # fmt: skip
    with pytest.raises(pb.PatchbayError, match=r"L2.mlp.out: the model has layers 0..1"):
        model.with_dictionaries(layers(32, (0, 1, 2)))
    with pytest.raises(pb.PatchbayError, match="made for 6 numbers, L0.resid_out of GPT2LMHeadModel has 32"):
        model.with_dictionaries(crosscoder(6, (0, 1)))
    folder = crosscoder(6, (0, 1)).save(tmp_path / "a")
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg["metadata"]["hook_names"] = cfg["metadata"]["hook_names"][:1]
    (folder / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(pb.PatchbayError, match="a crosscoder that lacks the hooks of two layers or more"):
        pb.load_dictionary(folder)
    assert set(load_file(folder / "sae_weights.safetensors")) == {"W_enc", "W_dec", "b_enc", "b_dec"}

"""Spectrum: a circuit built of two directions is found, numbers are those of whole products by loops, random weights have lost nothing."""

from __future__ import annotations

import math

import pytest
import torch

import patchbay as pb
from patchbay.find.spectrum import effective
from patchbay.tiny import twins
from tests.given import lent
from tests.tolerance import close


def test_planted() -> None:
    """One head's values pass through two equal directions: an effective rank of 2, the lowest p, and no other head moved."""
    hf = twins.twin("gpt2")
    plain = pb.find.spectrum(pb.load(hf), draws=19)
    d, r = hf.config.n_embd, hf.config.n_embd // hf.config.n_head
    with torch.no_grad():
        basis = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(0))).Q
        c_attn, c_proj = hf.transformer.h[1].attn.c_attn.weight, hf.transformer.h[1].attn.c_proj.weight
        norm = hf.transformer.h[1].ln_1.weight
        c_attn[:, 2 * d + r : 2 * d + 2 * r] = 0.0
        c_attn[:, 2 * d + r : 2 * d + r + 2] = (
            basis[:, :2] / norm[:, None]
        )  # whether or not the norm's gain is folded in, two directions
        c_proj[r : r + 2] = basis[2:4]
    found = pb.find.spectrum(pb.load(hf), draws=19)
    assert 1.0 < float(found["effective"][1, 1]) < 2.0 + 1e-6
    assert found.values.argmax() == 1 * hf.config.n_head + 1
    assert float(found["p"][1, 1]) == pytest.approx(1 / 20)
    same = torch.ones_like(found.values, dtype=torch.bool)
    same[1, 1] = False
    assert close(found["effective"][same], plain["effective"][same])


@pytest.mark.parametrize("circuit", ["ov", "qk"])
def test_reference(circuit: str) -> None:
    """The whole d x d product, its singular values and their entropy, head by head; grouped keys and values are shared."""
    model = lent("llama")
    found = pb.find.spectrum(model, circuit=circuit, draws=7, seed=3)
    draw = torch.Generator().manual_seed(3)
    d, r = model.d_model, model.layers[0].attn.weights().W_Q.shape[2]
    null = []
    for _ in range(7):
        left, right = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((d, r), (r, d)))
        null.append(rank(left @ right))
    for i in range(model.n_layers):
        weights = model.layers[i].attn.weights()
        for h in range(model.n_heads(i)):
            whole = (weights.W_OV(h) if circuit == "ov" else weights.W_QK(h)).detach().double()
            own = rank(whole)
            assert close(float(found["effective"][i, h]), own, of=float(r), dtype=torch.float32)
            assert close(float(found["lost"][i, h]), 1 - own / (sum(null) / 7), of=1.0, dtype=torch.float32)
            s = torch.linalg.svdvals(whole)
            assert close(float(found["first"][i, h]), float(s[0] ** 2 / (s**2).sum()), of=1.0, dtype=torch.float32)
            assert float(found["p"][i, h]) == (1 + sum(one <= own for one in null)) / 8
    rows = found.tables["matrices"]
    assert [row["matrix"] for row in rows if row["layer"] == 0] == ["q", "k", "v", "o", "gate", "up", "down"]
    s = torch.linalg.svdvals(model.layers[1].mlp.weights().W_out.detach().double())
    down = next(row for row in rows if row["layer"] == 1 and row["matrix"] == "down")
    assert down["kept"] == pytest.approx(float((s >= s[0] / 10).double().mean()))


def rank(whole: torch.Tensor) -> float:
    shares = [float(one) ** 2 for one in torch.linalg.svdvals(whole) if float(one) > 1e-9]
    total = sum(shares)
    return math.exp(-sum(one / total * math.log(one / total) for one in shares))


def test_null() -> None:
    """Heads of a network of random weights are within what random circuits give."""
    found = pb.find.spectrum(lent("gpt2"), draws=39)
    assert float(found.values.abs().max()) < 0.1
    assert float((found["p"] <= 0.05).double().mean()) <= 0.3
    assert float(found["null_low"].max()) < float(found["null_mean"].min())


def test_effective_rank_by_hand() -> None:
    assert float(effective(torch.ones(4, dtype=torch.float64))) == pytest.approx(4.0)
    assert float(effective(torch.tensor([2.0, 0.0, 0.0]).double())) == pytest.approx(1.0)
    assert float(effective(torch.zeros(3).double())) == 0.0


def test_refusals() -> None:
    with pytest.raises(pb.PatchbayError, match="no circuit 'vo'; circuits are ov, qk"):
        pb.find.spectrum(lent("gpt2"), circuit="vo")
    with pytest.raises(pb.PatchbayError, match="at least 1 random circuit"):
        pb.find.spectrum(lent("gpt2"), draws=0)
    with pytest.raises(pb.PatchbayError, match="spectrum needs heads .* offers z"):
        pb.find.spectrum(lent("mamba2"))

"""Gated residuals: the formula by hand, zero weights, gates that stay shut, and what a model of them offers."""

from __future__ import annotations

import pytest
import torch

import patchbay as pb
from patchbay.blocks.gate import ResidualGate, openness
from patchbay.signal.port import PatchbayError
from tests.blocks.given import IDS, built
from tests.tolerance import close


def test_reference() -> None:
    gate, x, block = (
        ResidualGate(6).double(),
        torch.randn(3, 6, dtype=torch.float64),
        torch.randn(3, 6, dtype=torch.float64),
    )
    W_r, W_z, W_g = gate.of_block.weight.split(6)
    U_r, U_z = gate.of_stream.weight.split(6)
    U_g = gate.of_reset.weight
    for i in range(3):
        y = torch.stack([v if v > 0 else v * 0 for v in block[i]])
        r = 1 / (1 + torch.exp(-(W_r @ y + U_r @ x[i])))
        z = 1 / (1 + torch.exp(-(W_z @ y + U_z @ x[i] - 2.0)))
        h = torch.tanh(W_g @ y + U_g @ (r * x[i]))
        assert close(x[i] + gate(x, block)[i], (1 - z) * x[i] + z * h, dtype=torch.float64)


def test_zero_weights_and_gates_that_stay_shut() -> None:
    gate, x = ResidualGate(6), torch.randn(3, 6)
    with torch.no_grad():
        for weight in gate.parameters():
            weight.zero_()
        z, _ = gate.parts(x, x)
        assert close(z, torch.full_like(z, 0.11920292))
        assert close(x + gate(x, x), 0.88079708 * x)
        gate.bias = 1e4
        assert torch.equal(x + gate(x, x), x)


def test_a_model_of_gates_offers_its_streams(tmp_path: object) -> None:
    """What gates add sums to the stream; heads and neurons, which do not, are not offered; it saves, loads and sweeps."""
    hf = built(gate=True)
    model = pb.load(hf)
    assert model.family.name == "gated"
    assert set(model.signals(0)) == {"resid_in", "attn.out", "resid_mid", "mlp.in", "mlp.out", "resid_out"}
    ports = [model.port(f"L1.{name}") for name in ("resid_in", "attn.out", "mlp.out", "resid_out")]
    trace = pb.run(model, IDS, taps=ports)
    assert close(trace[ports[0]] + trace[ports[1]] + trace[ports[2]], trace[ports[3]])
    opened = openness(hf, IDS)
    assert opened.shape == (2, 2)
    assert bool(((opened > 0) & (opened < 1)).all())
    edits = [pb.zero(f"L{i}.{part}") for i in range(2) for part in ("attn.out", "mlp.out")]
    table = pb.sweep(model, IDS, edits, metric=lambda logits, _: logits[:, 7])
    brute = torch.stack([pb.run(model, IDS, edits=[edit]).last_logits[:, 7] for edit in edits])
    assert close(table["value"], brute)
    hf.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(pb.load(str(tmp_path)).hf(IDS).logits, hf(IDS).logits)


def test_shut_gates_leave_the_embedding() -> None:
    hf = built(gate=1e4)
    with torch.no_grad():
        assert torch.equal(hf(IDS).logits, hf.lm_head(hf.model.norm(hf.model.embed_tokens(IDS))))
        assert float(openness(hf, IDS).max()) == 0.0


def test_what_has_no_such_layers_is_refused() -> None:
    with pytest.raises(PatchbayError, match="gate cannot be put into gpt2, which builds its layers in another way"):
        built("gpt2", gate=True)
    with pytest.raises(PatchbayError, match="gate='yes': True, or the number"):
        built(gate="yes")

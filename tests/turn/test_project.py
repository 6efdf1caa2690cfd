"""turn.project: a subspace goes, or nothing else stays; done twice is done once; without the planted direction no effect."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.tiny import planted, twins
from tests.tolerance import close


def ids(n: int = 3, length: int = 7) -> Tensor:
    return torch.randint(3, 60, (n, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_planted(form: Any) -> None:
    """Without the planted direction the word that reads it has no logit left; other words keep theirs."""
    built = planted.steering(form=form, seed=1)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    tokens, word = torch.tensor(truth["positive_ids"])[:, None], truth["token_id"]
    knob = pb.turn.project("L1.resid_out", truth["direction"], model=model)  # type: ignore[arg-type]
    before, after = (pb.run(model, tokens, edits=edits).last_logits for edits in ([], [knob]))
    assert before[:, word].mean() > 1.3
    assert after[:, word].abs().max() < 0.2
    others = [i for i in range(before.shape[1]) if i != word]
    assert (after - before)[:, others].abs().max() < 0.15
    random = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    control = pb.run(model, tokens, edits=[pb.turn.project("L1.resid_out", random)]).last_logits  # type: ignore[arg-type]
    assert (control - before)[:, word].mean().abs() < before[:, word].mean() / 2


def test_reference() -> None:
    """h - sum of (h . q) q over an orthonormal basis made by hand, and what it leaves out with keep."""
    model = pb.load(twins.twin("llama"))
    port, tokens = model.layers[0].resid_out, ids()
    basis = torch.randn(2, model.d_model, generator=torch.Generator().manual_seed(1))
    q1 = basis[0] / basis[0].norm()
    q2 = basis[1] - (basis[1] @ q1) * q1
    q2 = q2 / q2.norm()
    before = pb.run(model, tokens, taps=[port])[port]
    inside = (before @ q1)[..., None] * q1 + (before @ q2)[..., None] * q2
    for keep, expected in ((False, before - inside), (True, inside)):
        knob = pb.turn.project([port], basis, keep=keep, model=model)
        after = pb.run(model, tokens, taps=[port], edits=[knob])[port]
        assert close(after, expected)
        twice = pb.run(model, tokens, taps=[port], edits=[*knob.edits, *knob.edits])[port]
        assert close(twice, after)
        half = pb.run(model, tokens, taps=[port], edits=[knob.at(0.25)])[port]
        assert close(half, 0.75 * before + 0.25 * expected)


def test_several_ports_at_some_positions() -> None:
    """Every port that was named, and those positions alone."""
    model = pb.load(twins.twin("llama"))
    ports, tokens = [model.layers[0].attn.out, model.layers[0].mlp.out], ids()
    q = torch.nn.functional.normalize(torch.randn(model.d_model, generator=torch.Generator().manual_seed(1)), dim=0)
    knob = pb.turn.project(ports, q, positions=[1, 3], model=model)
    plain, turned = (pb.run(model, tokens, taps=ports, edits=edits) for edits in ([], [knob]))
    for port in ports:
        assert close(turned[port][:, [1, 3]] @ q, 0.0, of=plain[port])
        assert bool((turned[port][:, [0, 2]] @ q).abs().min() > 1e-4)
    assert torch.equal(turned[ports[0]][:, [0, 2]], plain[ports[0]][:, [0, 2]])


def test_a_steering_knob_names_its_own_direction() -> None:
    model = pb.load(twins.twin("gpt2"))
    port = model.layers[1].resid_in
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(2))
    steer = pb.Knob("steer", [pb.add(port, vector)], 1.0)
    knob = pb.turn.project([port], steer)
    after = pb.run(model, ids(), taps=[port], edits=[knob])[port]
    assert close(after @ (vector / vector.norm()), 0.0, of=after)
    with pytest.raises(pb.PatchbayError, match="widths none"):
        pb.turn.project([port], pb.turn.scale("L0.H1", 2.0))  # type: ignore[arg-type]


def test_null() -> None:
    """At 0 nothing is edited, bit for bit; a direction that the stream does not have changes nothing."""
    built = planted.steering(seed=0)
    model = pb.load(built.model, built.tokenizer)
    plain = pb.run(model, ids())
    ones = torch.ones(model.d_model)  # GPT-2 form: every planted direction is mean-free
    knob = pb.turn.project("L0.resid_out,L1.resid_out", ones)  # type: ignore[arg-type]
    assert knob.at(0.0).edits_at() == []
    assert torch.equal(pb.run(model, ids(), edits=[knob.at(0.0)]).logits, plain.logits)
    assert close(pb.run(model, ids(), edits=[knob]).logits, plain.logits)


def test_errors() -> None:
    model = pb.load(twins.twin("llama"))
    for directions, message in (
        (torch.ones(2, 32), "not linearly independent"),
        (torch.full((32,), torch.nan), "NaN"),
    ):
        with pytest.raises(pb.PatchbayError, match=message):
            pb.turn.project("L0.resid_out", directions)  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="no directions"):
        pb.turn.project("L0.N3.act", torch.ones(1))  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match=r"0\.\.1"):
        pb.turn.project("L7.resid_out", torch.ones(32), model=model)  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="no ports"):
        pb.turn.project([], torch.ones(32))
    with pytest.raises(pb.PatchbayError, match="31 features"):
        pb.run(model, ids(), edits=[pb.turn.project("L0.resid_out", torch.ones(31))])  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="finite number"):
        pb.turn.project("L0.resid_out", torch.ones(32), strength=float("nan"))  # type: ignore[arg-type]

"""turn.clamp: the signal holds the value and nothing else moves; in the last block the logits move as the algebra says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.model import weights
from patchbay.tiny import planted, twins
from tests.tolerance import close


def ids(n: int = 3, length: int = 7) -> Tensor:
    return torch.randint(3, 60, (n, length), generator=torch.Generator().manual_seed(0))


def scale_of(model: pb.Model, stream: Tensor) -> Tensor:
    """What the final norm divides by, [prompt, position, 1]: the standard deviation, or the root mean square."""
    _, _, centred = weights.norm_parts(model.final_norm_module)
    norm: Any = model.final_norm_module
    eps = float(getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", 0.0))
    x = stream - stream.mean(-1, keepdim=True) if centred else stream
    return (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_planted(name: Any) -> None:
    """Clamping the planted relation neuron on makes the other relation's answers level with the asked one's."""
    built = planted.relation_neuron(form=name, seed=1)
    model = pb.load(built.model, built.tokenizer)
    neuron = built.truth["neurons"][" has"]
    right, wrong = (torch.tensor([model.token_id(word) for word in built.truth[key]]) for key in ("answers", "wrong"))

    def margin(*knobs: Any) -> Tensor:
        logits = pb.run(model, built.truth["prompts"], edits=list(knobs)).last_logits
        return (logits.gather(1, right[:, None]) - logits.gather(1, wrong[:, None]))[:, 0]

    asks_is = torch.tensor([prompt.endswith(" is") for prompt in built.truth["prompts"]])
    on = pb.turn.clamp(model, neuron, built.truth["activation"], texts=built.truth["prompts"])  # type: ignore[arg-type]
    assert margin()[asks_is].min() > 3
    assert margin(on)[asks_is].abs().max() < 0.9  # both neurons on: both answers written
    assert (margin(on) - margin())[~asks_is].abs().max() < 0.8  # it was on already
    off = pb.turn.clamp(model, neuron, 0.0)  # type: ignore[arg-type]
    assert margin(off)[~asks_is].abs().max() < 0.9
    last = pb.turn.clamp(model, neuron, 8.0, texts=built.truth["prompts"], positions="last")  # type: ignore[arg-type]
    assert close(margin(last), margin(on))
    change = on.evidence["change"]
    assert change["low"][0] < change["change"][0] < change["high"][0] <= 8.001


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_reference(form: Any) -> None:
    """Last block: scale' x logits' - scale x logits = (value - act) x unembedding of gain x write direction."""
    built = planted.null(form=form, seed=1)
    model = pb.load(built.model, built.tokenizer)
    layer, tokens = model.n_layers - 1, ids()
    act, stream = pb.Port("mlp.act", layer, 5), pb.Port("resid_out", layer)
    plain = pb.run(model, tokens, taps=[act, stream])
    knob = pb.turn.clamp(model, f"L{layer}.N5", 2.5)  # type: ignore[arg-type]
    turned = pb.run(model, tokens, taps=[act, stream], edits=[knob])
    assert (turned[act] == 2.5).all()
    told = pb.turn.clamp(model, f"L{layer}.N5", 2.5, texts=tokens.tolist()).evidence["change"]  # type: ignore[arg-type]
    assert close(told["change"], (2.5 - plain[act]).mean(), of=2.5)
    gain, bias, centred = weights.norm_parts(model.final_norm_module)
    write = model.layers[layer].mlp.weights().W_out[5]
    write = gain * (write - write.mean() if centred else write)
    constant = 0.0 if bias is None else model.unembed.weight @ bias
    moved = (turned.logits - constant) * scale_of(model, turned[stream])
    moved = moved - (plain.logits - constant) * scale_of(model, plain[stream])
    expected = (2.5 - plain[act])[..., None] * (model.unembed.weight @ write)  # [prompt, position, vocab]
    assert (moved - expected).abs().max() < 1e-4 * expected.abs().max()
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mixtral", "mamba2", "granite"])
def test_a_direction_holds_its_value_and_the_rest_stays(name: str) -> None:
    model = pb.load(twins.twin(name))
    w = torch.randn(model.d_model, generator=torch.Generator().manual_seed(3))
    port, tokens = pb.Port("resid_out", 0), ids()
    before = pb.run(model, tokens, taps=[port])[port]
    knob = pb.turn.clamp(model, "L0", 1.7, direction=w)  # type: ignore[arg-type]
    unit = w / w.norm()
    after = pb.run(model, tokens, taps=[port], edits=[knob])[port]
    assert close(after @ unit, 1.7)
    away = torch.eye(len(unit)) - torch.outer(unit, unit)
    assert close((after - before) @ away, 0.0, of=after)
    half = pb.run(model, tokens, taps=[port], edits=[knob.at(0.5)])[port]
    assert close(half @ unit, (before @ unit + 1.7) / 2)
    at = pb.turn.clamp(model, "L0", -2.0, coordinate=3)  # type: ignore[arg-type]
    after = pb.run(model, tokens, taps=[port], edits=[at])[port]
    assert (after[..., 3] == -2.0).all()
    others = [i for i in range(model.d_model) if i != 3]
    assert torch.equal(after[..., others], before[..., others])


def test_other_signals() -> None:
    model = pb.load(twins.twin("llama"))
    for part, signal, port in (
        ("L1.H2", None, "L1.H2.z"),
        ("L1.mlp", None, "L1.mlp.out"),
        ("L1", "resid_in", "L1.resid_in"),
    ):
        knob = pb.turn.clamp(model, part, 1.0, coordinate=2, signal=signal)  # type: ignore[arg-type]
        assert str(knob.edits[0].port) == port
        seen = pb.run(model, ids(), taps=[model.port(port)], edits=[knob])[model.port(port)]
        assert (seen[..., 2] == 1.0).all()


def test_null() -> None:
    """A neuron clamped where it is, and a knob at 0, change nothing."""
    built = planted.null(form="llama", seed=0)
    model = pb.load(built.model, built.tokenizer)
    port = pb.Port("mlp.act", 1, 3)
    one = ids(1, 1)
    plain = pb.run(model, one, taps=[port])
    knob = pb.turn.clamp(model, "L1.N3", float(plain[port]))  # type: ignore[arg-type]
    assert close(pb.run(model, one, edits=[knob]).logits, plain.logits)
    assert torch.equal(pb.run(model, one, edits=[knob.at(0.0)]).logits, plain.logits)


def test_errors() -> None:
    model = pb.load(twins.twin("llama"))

    def clamp(parts: Any, value: Any = 1.0, **options: Any) -> Any:
        return pb.turn.clamp(model, parts, value, **options)

    for parts, options, message in (
        ("L1.N99", {}, r"L1\.N99.*has 48"),
        ("L1", {}, "give one of direction= and coordinate="),
        ("L1", {"coordinate": 32}, r"it has 32 \(0\.\.31\)"),
        ("L1", {"direction": torch.zeros(32)}, "not 0"),
        ("L1", {"direction": torch.ones(31)}, r"needs \[32\]"),
        ("L1.N3", {"coordinate": 1}, "one number"),
        ([], {}, "no parts"),
        ("L1.N3", {"positions": "first"}, "written"),
    ):
        with pytest.raises(pb.PatchbayError, match=message):
            clamp(parts, **options)
    for value in (float("nan"), float("inf"), "3"):
        with pytest.raises(pb.PatchbayError, match="finite number|takes a number"):
            clamp("L1.N3", value)
    with pytest.raises(pb.PatchbayError, match="mlp"):
        pb.turn.clamp(pb.load(twins.twin("mixtral")), "L1.N3", 1.0)  # type: ignore[arg-type]


def test_a_neuron_is_held_where_that_was_asked() -> None:
    model = pb.load(twins.twin("gpt2"))
    [made] = pb.turn.clamp(model, "L1.N3", 1.0, positions=[1, 2]).edits  # type: ignore[arg-type]
    assert made.positions == (1, 2)

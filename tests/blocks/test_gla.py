"""Gated linear attention: three forms agree in values and gradients, its limits, the overflow of factors apart, and its pattern as a port."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.blocks import gla
from patchbay.signal.port import PatchbayError
from tests.blocks.given import IDS, built
from tests.tolerance import close

Given = tuple[Tensor, Tensor, Tensor, Tensor]


def given(n: int, *, temper: float = 16.0, dtype: torch.dtype = torch.float64, seed: int = 0) -> Given:
    """q, k, v [prompt, head, position, d] and log decays, from sigmoids of normal numbers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    gate = torch.nn.functional.logsigmoid(draw(2, 3, n, 8)) / temper
    return tuple(t.to(dtype) for t in (draw(2, 3, n, 8), draw(2, 3, n, 8), draw(2, 3, n, 6), gate))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("n", "temper"), [(1, 16.0), (16, 1.0), (70, 16.0), (70, 0.1), (150, 16.0)])
def test_reference_three_forms_agree(n: int, temper: float, dtype: torch.dtype) -> None:
    """Values and gradients of all four inputs, relative to the largest; 70 and 150 leave a ragged last chunk. At a temper of 0.1 decay is too strong for
    factors apart, also inside a chunk."""
    inputs = given(n, dtype=dtype, temper=temper)
    found = []
    for form in (gla.recurrent, gla.parallel, gla.chunked, lambda *t: gla.chunked(*t, chunk=32)):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = form(*leaves)
        found.append([out, *torch.autograd.grad((out * out.detach().cos()).sum(), leaves)])
    size = max(
        float(t.detach().abs().max()) for t in found[0]
    )  # gradients of decays are differences of terms of this size
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert close(a.detach(), b.detach(), of=size, dtype=dtype)


def test_decays_of_1_are_linear_attention_and_constant_ones_a_retentive_network() -> None:
    q, k, v, _ = given(40)
    plain = (q @ k.transpose(-1, -2)).tril() @ v
    assert close(gla.chunked(q, k, v, torch.zeros_like(q)), plain, dtype=torch.float64)
    constant = torch.full_like(q, 0.9).log()
    apart = torch.arange(40)[:, None] - torch.arange(40)
    kept = torch.where(apart >= 0, 0.9 ** apart.clamp(min=0).double(), 0.0)
    assert close(gla.chunked(q, k, v, constant), ((q @ k.transpose(-1, -2)) * kept) @ v, dtype=torch.float64)
    assert close(gla.half_life(constant), torch.full((3, 8), 6.5788, dtype=torch.float64), of=1e3)
    assert bool((gla.half_life(torch.zeros_like(q)) == torch.inf).all())


def test_decay_in_factors_apart_is_no_number_where_the_forms_are() -> None:
    """q e^L times k e^(-L) overflows float32 on 256 tokens of strong decay; what is computed here does not."""
    q, k, v, log_a = given(256, temper=1.0, dtype=torch.float32)
    running = log_a.cumsum(2)
    apart = ((q * running.exp()) @ (k * (-running).exp()).transpose(-1, -2)).tril() @ v
    assert bool(apart.isnan().any())
    made, exact = gla.chunked(q, k, v, log_a), gla.recurrent(*(t.double() for t in (q, k, v, log_a)))
    assert close(made, exact)
    assert close(gla.parallel(q, k, v, log_a), exact)


def test_half_lives_of_a_model_are_those_of_each_layers_own_gates() -> None:
    """By hand from the layer's input, channel by channel; a layer of attention between them is none, a model without is refused."""
    hf = built(mixer=["gla", "attention"])
    mixer, x = hf.model.layers[0].self_attn, hf.model.layers[0].input_layernorm(hf.model.embed_tokens(IDS))
    found = gla.half_lives(hf, IDS)
    assert found.shape == (1, 4, 8)
    gate = torch.sigmoid(mixer.decay_up(mixer.decay_down(x))).detach().double() ** (1 / 16)
    for head, channel in ((0, 0), (3, 5)):
        mean = float(gate[..., head * 8 + channel].log().mean())
        assert abs(float(found[0, head, channel]) * -mean / math.log(2) - 1) < 1e-5
    assert mixer.seen is None
    with pytest.raises(PatchbayError, match="no layer of this model is gated linear attention"):
        gla.half_lives(built(attention="sigmoid"), IDS)


def test_a_window_of_the_family_is_none_of_the_recurrence() -> None:
    """Mistral hides what lies further back than its window; a state forgets by its decay alone."""
    hf = built("mistral", mixer="gla")
    assert hf.config.sliding_window < IDS.shape[1]
    mixer, x = hf.model.layers[0].self_attn, hf.model.embed_tokens(IDS)
    with torch.no_grad():
        model = pb.load(hf)
        port = model.layers[0].attn.pattern
        pattern = pb.run(model, IDS, taps=[port])[port]
        assert float(pattern[:, :, -1, 0].abs().min()) > 0.0
        norm = hf.model.layers[0].input_layernorm(x)
        q, k = (getattr(mixer, name)(norm).unflatten(-1, (4, -1)).transpose(1, 2) for name in ("q_proj", "k_proj"))
        assert close(pattern, gla.pattern(q * mixer.scaling, k, mixer.log_decay(norm)))


def model_of(**blocks: Any) -> pb.Model:
    return pb.load(built(**blocks))


def test_a_model_of_it_has_all_ports() -> None:
    """The pattern times the values is what norm and gate read; its edits are made as by hand, sweeps are brute force, tokens see nothing later."""
    hf = built(mixer="gla")
    model = pb.load(hf)
    assert model.causal
    layer, mixer = model.layers[1], hf.model.layers[1].self_attn
    ports = [layer.attn.pattern, layer.attn.v, layer.attn.z, layer.attn.q]
    trace = pb.run(model, IDS, taps=ports)
    with torch.no_grad():
        assert torch.equal(trace.logits, hf(IDS).logits)
        stream = hf.model.layers[0](hf.model.embed_tokens(IDS))
        x = hf.model.layers[1].input_layernorm(stream)
        gate = torch.nn.functional.silu(mixer.read_gate(x)).unflatten(-1, (4, -1))

        def through(pattern: Tensor) -> Tensor:
            return mixer.head_norm((pattern @ trace[layer.attn.v]).transpose(1, 2)) * gate

        pattern = trace[layer.attn.pattern]
        assert close(through(pattern), trace[layer.attn.z])
        assert float(pattern.triu(1).abs().max()) == 0.0
        assert float(pattern.min()) < 0.0
        halved = pb.run(
            model, IDS, edits=[pb.scale(layer.heads[2].pattern, 0.5, positions=slice(4, None))], taps=[layer.attn.z]
        )
        mine = pattern.clone()
        mine[:, 2, 4:] *= 0.5
        assert close(halved[layer.attn.z], through(mine))
        cut = pb.run(model, IDS, edits=[pb.block(layer.attn.pattern, key=3, query=slice(5, None))], taps=[layer.attn.z])
        mine = pattern.clone()
        mine[:, :, 5:, 3] = 0.0
        assert close(cut[layer.attn.z], through(mine))
    edits = [pb.zero(head.z) for one in model.layers for head in one.heads]
    table = pb.sweep(model, IDS, edits, metric=lambda logits, _: logits[:, 7])
    brute = torch.stack([pb.run(model, IDS, edits=[edit]).last_logits[:, 7] for edit in edits])
    assert close(table["value"], brute)
    assert "whole runs, batched" in table.notes[0]


def test_without_decay_it_is_linear_attention() -> None:
    """The pattern of a model is q k^T below the diagonal, with fewer weights; a checkpoint knows it."""
    model = model_of(mixer={"kind": "gla", "decay": False})
    attn = model.layers[0].attn
    trace = pb.run(model, IDS, taps=[attn.q, attn.k, attn.pattern])
    scaled = trace[attn.q] * trace[attn.q].shape[-1] ** -0.5
    assert close(trace[attn.pattern], (scaled @ trace[attn.k].transpose(-1, -2)).tril())
    assert not any("decay" in name for name in model.hf.state_dict())
    with torch.no_grad():
        assert not close(trace.logits, built(mixer="gla")(IDS).logits)


def test_finders_read_absolute_values_and_padding_changes_nothing() -> None:
    model = model_of(mixer=["gla", "attention"])
    found = pb.find.previous_token_heads(model, IDS.tolist())
    assert any("layers 0 have negative weights" in note for note in found.notes)
    trace = pb.run(model, IDS, taps=[model.layers[0].attn.pattern])[model.layers[0].attn.pattern]
    assert close(found["score"][0], trace.abs().diagonal(-1, -2, -1)[..., 1:].mean((0, 2)))
    with torch.no_grad():
        padded = torch.nn.functional.pad(IDS[:1], (0, 3))
        mask = torch.ones_like(padded)
        mask[:, 12:] = 0
        assert close(model.hf(padded, attention_mask=mask).logits[:, :12], model.hf(IDS[:1]).logits)
        out = model.hf.generate(
            IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False, pad_token_id=0
        )
        assert torch.equal(out[:, 12:], model.hf(out[:, :-1]).logits[:, 11:].argmax(-1))


def test_what_it_cannot_stand_in_is_refused() -> None:
    with pytest.raises(
        PatchbayError, match="mixer cannot be put into gpt2, which does not keep queries, keys and values in three maps"
    ):
        built("gpt2", mixer="gla")
    with pytest.raises(PatchbayError, match="no mixer 'glaa'; mixers are attention, gla"):
        built(mixer="glaa")
    for given in (
        {"kind": "gla", "rank": 3},
        {"kind": "h3", "decay": False},
        {"kind": "gla", "decay": 0},
        {"kind": "attention", "decay": True},
    ):
        with pytest.raises(PatchbayError, match="only gla takes more than its kind, which is decay, True or False"):
            built(mixer=given)
    with pytest.raises(PatchbayError, match="attention 'sigmoid' and a mixer are both asked for layer 0"):
        built(mixer="gla", attention="sigmoid")
    with pytest.raises(PatchbayError, match="gla: padding on the left"):
        built(mixer="gla")(IDS[:1], attention_mask=torch.tensor([[0, 0] + [1] * 10]))

"""Turned queries and keys: the dot product is the explicit cosine, D = 1 is the plain model, and the edges of the angle."""

from __future__ import annotations

import math

import pytest
import torch

import patchbay as pb
from patchbay.blocks.turned import Turned, turned
from patchbay.signal.port import PatchbayError
from patchbay.tiny import twins
from tests.blocks.given import IDS
from tests.tolerance import close


def test_reference_the_explicit_cosine() -> None:
    """Scores of two tokens at places m and n, pair by pair as the formula has them."""
    q, k, D, b = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 3, 8), (5, 3, 8), (3, 4), (3, 4)))
    g = torch.rand(4, dtype=torch.float64)
    for m, n in ((0, 0), (4, 1), (3, 2)):
        made = 0.0
        expected = 0.0
        one, other = turned(q, D, b)[m], turned(k, D, None)[n]
        for head in range(3):
            for c in range(4):
                t_q = math.atan2(float(q[m, head, c + 4]), float(q[m, head, c]))
                t_k = math.atan2(float(k[n, head, c + 4]), float(k[n, head, c]))
                size = math.hypot(float(q[m, head, c]), float(q[m, head, c + 4])) * math.hypot(
                    float(k[n, head, c]), float(k[n, head, c + 4])
                )
                expected += size * math.cos(float(D[head, c]) * (t_q - t_k) + float(b[head, c]) + (m - n) * float(g[c]))
                turn_q, turn_k = (torch.polar(torch.tensor(1.0, dtype=torch.float64), place * g[c]) for place in (m, n))
                z_q = torch.complex(one[head, c], one[head, c + 4]) * turn_q
                z_k = torch.complex(other[head, c], other[head, c + 4]) * turn_k
                made += float((z_q * z_k.conj()).real)
        assert close(made, expected, of=30.0, dtype=torch.float64)


def test_angles_as_they_are_make_the_plain_model() -> None:
    with pytest.raises(PatchbayError, match="turned cannot be put into"):
        pb.blocks.build(twins.twin("llama").config, turned=True)  # its heads share keys
    config = twins.twin("llama").config
    config.num_key_value_heads = config.num_attention_heads
    plain = type(twins.twin("llama"))(config).eval()
    hf = pb.blocks.build(plain, turned=True)
    with torch.no_grad():
        assert close(hf(IDS).logits, plain(IDS).logits)
        for module in hf.modules():
            if isinstance(module, Turned):
                module.D.mul_(0.5)
        assert not close(hf(IDS).logits, plain(IDS).logits)
        cached = hf.generate(
            IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False, pad_token_id=0
        )
        assert torch.equal(cached[:, 12:], hf(cached[:, :-1]).logits[:, 11:].argmax(-1))
    model = pb.load(hf)
    edits = [pb.zero(head.z) for layer in model.layers for head in layer.heads]
    table = pb.sweep(model, IDS, edits, metric=lambda logits, _: logits[:, 7])
    brute = torch.stack([pb.run(model, IDS, edits=[edit]).last_logits[:, 7] for edit in edits])
    assert close(table["value"], brute)
    assert table.notes == ()


def test_angles_jump_at_pi_and_a_pair_of_no_length_has_a_gradient() -> None:
    D = torch.full((1, 1), 0.5)
    near = [turned(torch.tensor([[-1.0, side * 1e-4]]), D, None) for side in (1, -1)]
    assert float((near[0] - near[1]).norm()) > 1.9  # half the angle of pi and of -pi: opposite
    whole = [turned(torch.tensor([[-1.0, side * 1e-4]]), 2 * D, None) for side in (1, -1)]
    assert float((whole[0] - whole[1]).norm()) < 1e-3
    x = torch.zeros(1, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(turned(x, D, None).sum(), x)
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_angles_as_they_are_change_nothing_in_half_precision(dtype: torch.dtype) -> None:
    """Within a step of the dtype, also where squares of float16 are no numbers."""
    x = torch.randn(4, 2, 16, generator=torch.Generator().manual_seed(0))
    for size in (1.0, 300.0):
        given = (x * size).to(dtype)
        assert close(turned(given, torch.ones(2, 8, dtype=dtype), None), given, dtype=dtype)


@pytest.mark.slow
def test_D_is_a_knob_of_one_head_that_finders_read() -> None:
    """From 1 to 0 in one head of the first layer: its previous-token score moves, its neighbours' do not by a bit; at 0 lengths and places alone decide."""
    config = twins.twin("llama").config
    config.num_key_value_heads = config.num_attention_heads
    hf = pb.blocks.build(type(twins.twin("llama"))(config).eval(), turned=True)
    with torch.no_grad():
        hf.model.layers[0].self_attn.q_proj.inner.weight.mul_(20)
        hf.model.layers[0].self_attn.k_proj.inner.weight.mul_(20)
    model, scores = pb.load(hf), []
    for D in (1.0, 0.5, 0.0):
        with torch.no_grad():
            hf.model.layers[0].self_attn.q_proj.D[2] = D
        scores.append(pb.find.previous_token_heads(model, IDS.tolist()).values[0])
    assert torch.equal(scores[0][[0, 1, 3]], scores[2][[0, 1, 3]])
    assert len({round(float(one[2]), 4) for one in scores}) == 3
    attn = model.layers[0].attn
    trace = pb.run(model, IDS, taps=[attn.q, attn.k, attn.pattern])
    q, k = ((x[:, 2, :, :4].square() + x[:, 2, :, 4:].square()).sqrt() for x in (trace[attn.q], trace[attn.k]))
    apart = (torch.arange(12)[:, None] - torch.arange(12))[..., None] * 10000.0 ** (-torch.arange(4) / 4)
    expected = (q[:, :, None] * k[:, None] * apart.cos()).sum(-1) / 8**0.5
    expected = expected.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf).softmax(-1)
    assert close(trace[attn.pattern][:, 2], expected, noise=100.0)


def test_saved_with_one_D_for_queries_and_keys(tmp_path: object) -> None:
    config = twins.twin("llama").config
    config.num_key_value_heads = config.num_attention_heads
    torch.manual_seed(0)
    hf = pb.blocks.build(config, turned=True)
    with torch.no_grad():
        for module in hf.modules():
            if isinstance(module, Turned):
                module.D.normal_(1.0, 0.3)
                module.b.normal_()
    hf.save_pretrained(tmp_path)
    again = pb.load(str(tmp_path)).hf
    assert sum(name.endswith(".D") for name in again.state_dict()) == 2
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, hf(IDS).logits)


def test_keys_have_no_phase() -> None:
    """b moves the scores, so it may stand on one side alone: on both it would be nothing."""
    config = twins.twin("llama").config
    config.num_key_value_heads = config.num_attention_heads
    hf = pb.blocks.build(type(twins.twin("llama"))(config).eval(), turned=True)
    with torch.no_grad():
        before = hf(IDS).logits
        for module in hf.modules():
            if isinstance(module, Turned):
                module.b.fill_(1.5)
        assert not close(hf(IDS).logits, before)


def test_phases_alone_keep_the_angles_for_good(tmp_path: object) -> None:
    """D is 1, is trained by nothing and saved nonetheless; b is trained, and the start is the plain model."""
    config = twins.twin("llama").config
    config.num_key_value_heads = config.num_attention_heads
    plain = type(twins.twin("llama"))(config).eval()
    hf = pb.blocks.build(plain, turned={"bend": False})
    names = {name.rpartition(".")[2] for name, _ in hf.named_parameters()}
    assert "b" in names
    assert "D" not in names
    hf.model.layers[0].self_attn.q_proj.b.data.fill_(0.5)
    hf.save_pretrained(tmp_path)
    again = pb.load(str(tmp_path)).hf
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, hf(IDS).logits)
        assert not close(hf(IDS).logits, plain(IDS).logits)
        hf.model.layers[0].self_attn.q_proj.b.data.zero_()
        assert close(hf(IDS).logits, plain(IDS).logits)
    for wrong in ({"bend": 1}, {"D": False}, "phases"):
        with pytest.raises(PatchbayError, match="True, or .*bend.* for phases b alone"):
            pb.blocks.build(config, turned=wrong)

"""Convolved queries, keys and values: the formula as loops, taps that are none, causality, and text in pieces refused."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import patchbay as pb
from patchbay.blocks.convolved import Convolved, convolve, cut, relative_shift
from patchbay.signal.port import PatchbayError
from patchbay.tiny import twins
from tests.blocks.given import IDS, built
from tests.tolerance import close


@pytest.mark.parametrize("n", [1, 2, 9])
def test_reference(n: int) -> None:
    """Tap j reads j places back, 0 before the text; texts shorter than the kernel too."""
    x, taps = torch.randn(2, n, 5), torch.randn(3, 5)
    expected = torch.zeros_like(x)
    for t in range(n):
        for back in range(3):
            if t >= back:
                expected[:, t] += taps[back] * x[:, t - back]
    assert close(convolve(x, taps), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_taps_that_are_none_are_the_plain_model(family: str) -> None:
    """Put into a model that was given, a convolution starts as none, exactly; and where maps of q, k and v lie in one, all are convolved."""
    plain = twins.twin(family)
    hf = pb.blocks.build(plain, convolution=3)
    with torch.no_grad():
        assert torch.equal(hf(IDS).logits, plain(IDS).logits)
        maps = [module for module in hf.modules() if isinstance(module, Convolved)]
        assert len(maps) == {"llama": 6, "gpt2": 2}[family]
        maps[0].taps[1] = 0.5
        assert not close(hf(IDS).logits, plain(IDS).logits)


def test_no_token_sees_a_later_one_and_the_ports_are_convolved() -> None:
    hf = built(convolution=3)
    model = pb.load(hf)
    assert model.causal
    other = IDS.clone()
    other[:, -1] = 5
    with torch.no_grad():
        assert torch.equal(hf(IDS).logits[:, :-1], hf(other).logits[:, :-1])
    value, attn = model.layers[0].attn.v, hf.model.layers[0].self_attn
    trace = pb.run(model, IDS, taps=[value, model.layers[0].attn.pattern, model.layers[0].attn.z])
    x = hf.model.layers[0].input_layernorm(hf.model.embed_tokens(IDS))
    made = convolve(attn.v_proj.inner(x), attn.v_proj.taps).unflatten(-1, (2, -1)).transpose(1, 2)
    assert close(trace[value], made)
    mixed = torch.einsum("bhqk,bhkd->bqhd", trace[model.layers[0].attn.pattern], made.repeat_interleave(2, 1))
    assert close(trace[model.layers[0].attn.z], mixed)
    with pytest.raises(PatchbayError, match="Convolved is no linear map"):
        model.layers[0].heads[1].weights()


def test_sweeps_run_whole_and_are_brute_force() -> None:
    model = pb.load(built(convolution=3))
    edits = [pb.zero(head.z) for layer in model.layers for head in layer.heads]
    edits.append(pb.scale(model.layers[0].attn.k, 0.0, positions=4))
    table = pb.sweep(model, IDS, edits, metric=lambda logits, _: logits[:, 7])
    brute = torch.stack([pb.run(model, IDS, edits=[edit]).last_logits[:, 7] for edit in edits])
    assert close(table["value"], brute)
    assert "whole runs, batched" in table.notes[0]


def test_text_in_pieces_is_refused_or_run_whole() -> None:
    hf = built(convolution=3)
    ids = IDS[:1, :6]
    with torch.no_grad():
        out = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(out[:, 6:], hf(out[:, :-1]).logits[:, 5:].argmax(-1))
        cache = DynamicCache()
        cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
        with pytest.raises(
            PatchbayError, match="convolution: a token depends on earlier ones in more than keys and values"
        ):
            hf(ids, past_key_values=cache)
        left = torch.tensor([[0, 0, 1, 1, 1, 1]])
        with pytest.raises(PatchbayError, match="convolution: padding on the left would be read"):
            hf(ids, attention_mask=left)
        right = torch.tensor([[1, 1, 1, 1, 0, 0]])
        assert close(hf(ids, attention_mask=right).logits[:, :4], hf(ids[:, :4]).logits)


def test_a_cut_tap_brings_nothing() -> None:
    hf = built(convolution=3)
    cut(hf, (1, 2))
    maps = [module for module in hf.modules() if isinstance(module, Convolved)]
    assert all(not module.taps[1:].any() and module.taps[0].all() for module in maps)


def test_relative_shift_is_brute_force() -> None:
    """Row i holds products by distance, T - 1 first; key j stands at distance i - j."""
    products = torch.randn(2, 3, 6, 6)
    shifted = relative_shift(products)
    for i in range(6):
        for j in range(i + 1):
            assert torch.equal(shifted[:, :, i, j], products[:, :, i, 5 - (i - j)])


def test_what_no_convolution_can_be() -> None:
    for width in (1, True, 2.5, "3"):
        with pytest.raises(PatchbayError, match="the width, 2 tokens or more"):
            built(convolution=width)
    with pytest.raises(
        PatchbayError, match="convolution cannot be put into deepseek_v3, which makes keys and values of a latent"
    ):
        built("deepseek_v3", convolution=3)

"""patterns: attention that is registered under another name has the pattern that makes its z, or is refused by that name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import patchbay as pb
from patchbay.jacks import attention
from patchbay.signal.port import PatchbayError, Port
from patchbay.tiny.twins import twin
from tests.tolerance import close

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(2))
NAME = "of_a_test"


def fused(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
    """SDPA under another name: it returns no weights."""
    return sdpa_attention_forward(module, q, k, v, mask, **options)


def hotter(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """A softmax at twice the family's temperature, with its weights."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * options["scaling"] / 2
    scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    weights = scores.softmax(-1)
    return (weights @ v).transpose(1, 2), weights


def sigmoid(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Weights that do not sum to 1."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    weights = (q @ k.transpose(-1, -2) * options["scaling"] - 1).sigmoid().tril()
    return (weights @ v).transpose(1, 2), weights


def silent(module: nn.Module, *given: Any, **options: Any) -> tuple[Tensor, None]:
    return hotter(module, *given, **options)[0], None


@pytest.fixture
def register() -> Iterator[Callable[..., pb.Model]]:
    def make(function: Callable[..., Any], *, masked: bool = False, family: str = "llama") -> pb.Model:
        AttentionInterface.register(NAME, function)
        if masked:
            AttentionMaskInterface.register(NAME, sdpa_mask)
        hf = twin(family)
        hf.config._attn_implementation = NAME
        return pb.load(hf)

    yield make
    for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        for name in (NAME, attention.PREFIX + NAME):
            type(table)._global_mapping.pop(name, None)


def plain(model: pb.Model) -> Tensor:
    with torch.no_grad():
        return model.hf(IDS, use_cache=False).logits


@pytest.mark.parametrize(("function", "masked"), [(fused, True), (fused, False), (hotter, False), (sigmoid, False)])
def test_the_pattern_is_the_one_that_makes_z(function: Any, masked: bool, register: Any) -> None:
    model = register(function, masked=masked)
    layer = model.layers[1]
    ports = [layer.attn.pattern, layer.attn.v, layer.attn.z, layer.heads[2].pattern.rows(-1, 3)]
    trace = pb.run(model, IDS, taps=ports)
    assert torch.equal(trace.logits, plain(model))
    pattern = trace[layer.attn.pattern]
    assert close(torch.einsum("bhqk,bhkd->bqhd", pattern, trace[layer.attn.v].repeat_interleave(2, 1)), trace[ports[2]])
    assert torch.equal(trace[ports[3]], pattern[:, 2][:, [-1, 3]])
    rows = pattern.sum(-1)
    assert (function is sigmoid) != bool(close(rows, torch.ones_like(rows)))


def by_hand(model: pb.Model, change: Callable[[Tensor], Tensor], inner: Callable[..., Any]) -> Tensor:
    """Logits with layer 1's weights changed inside the registered function."""

    def changed(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
        z, weights = inner(module, q, k, v, mask, **options)
        if module is not model.modules[1].attn:
            return z, weights
        weights = change(weights)
        return (weights @ v.repeat_interleave(2, 1)).transpose(1, 2), weights

    AttentionInterface.register(NAME, changed)
    try:
        return plain(model)
    finally:
        AttentionInterface.register(NAME, inner)


@pytest.mark.parametrize("function", [hotter, sigmoid])
def test_edits_of_the_pattern_are_made_as_by_hand(function: Any, register: Any) -> None:
    model = register(function)
    head = model.layers[1].heads[1].pattern

    def halved(weights: Tensor) -> Tensor:
        weights = weights.clone()
        weights[:, 1] *= 0.5
        return weights

    found = pb.run(model, IDS, edits=[pb.scale(head, 0.5)]).logits
    assert close(found, by_hand(model, halved, function))
    assert not close(found, plain(model))
    filled = pb.run(model, IDS, edits=[pb.replace(head, 0.1)], taps=[head])[head]
    assert float(filled.triu(1).abs().max()) == 0.0  # no edit reaches a key that is hidden
    assert float(filled.tril().sum(-1).min()) > 0.09


def test_a_block_gives_the_share_of_a_key_to_the_others(register: Any) -> None:
    model = register(hotter)
    edit = pb.block(model.layers[1].attn.pattern, key=2, query=slice(3, None))

    def without(weights: Tensor) -> Tensor:
        weights = weights.clone()
        weights[:, :, 3:, 2] = 0
        return weights / weights.sum(-1, keepdim=True)

    assert close(pb.run(model, IDS, edits=[edit]).logits, by_hand(model, without, hotter))
    with pytest.raises(PatchbayError, match="left with no key"):
        pb.run(model, IDS, edits=[pb.block(model.layers[1].attn.pattern, key=0, query=0)])
    with pytest.raises(PatchbayError, match=r"of_a_test.*do not sum to 1.*pb\.zero\(pattern\)"):
        pb.run(register(sigmoid), IDS, edits=[edit])


def test_a_pattern_that_does_not_make_z_is_refused_and_all_else_is_offered(register: Any) -> None:
    model = register(silent)
    layer = model.layers[1]
    for call in (dict(taps=[layer.attn.pattern]), dict(edits=[pb.scale(layer.heads[0].pattern, 0.5)])):
        with pytest.raises(PatchbayError, match=r"attention 'of_a_test': neither .* is the z that it makes"):
            pb.run(model, IDS, **call)
    trace = pb.run(model, IDS, taps=[layer.attn.q, layer.attn.v, layer.attn.z])
    assert torch.equal(trace.logits, plain(model))
    edited = pb.run(model, IDS, edits=[pb.zero(layer.heads[1].z)]).logits
    assert not close(edited, trace.logits)


def test_gradients_and_caches_under_another_implementation(register: Any) -> None:
    """The same as under SDPA, whose mathematics it is: gradients at patterns, the last row beside a cache, and sweeps."""
    model = register(fused, masked=True)
    usual = pb.load(twin("llama"))
    port = Port("attn.pattern", 0)
    traces = [pb.run(m, IDS, taps=[port], grad=True) for m in (model, usual)]
    found = [torch.autograd.grad(trace.last_logits[:, 5].sum(), trace[port])[0] for trace in traces]
    assert close(*found)
    edits = [pb.zero(head.z) for head in model.layers[0].heads]
    tables = [pb.sweep(m, IDS, edits, metric=lambda logits, _: logits[:, 7])["value"] for m in (model, usual)]
    assert close(*tables)
    edit = pb.scale(model.layers[1].heads[0].pattern, 0.2, positions=slice(3, None))
    assert model.generate(IDS.tolist(), 4, edits=[edit]) == usual.generate(IDS.tolist(), 4, edits=[edit])


def test_a_row_of_the_table_shows_an_implementation(register: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention.SHOWN, NAME, lambda module: hotter)
    model = register(silent)
    port = model.layers[1].attn.pattern
    rows = pb.run(model, IDS, taps=[port])[port]
    assert close(rows, pb.run(register(hotter), IDS, taps=[port])[port])

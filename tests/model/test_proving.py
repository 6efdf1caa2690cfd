"""proving: attention written out in custom code is read at its operators, or refused with what would be read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

import patchbay as pb
from patchbay.errors import PatchbayError
from patchbay.knobs.knob import Knob
from patchbay.tiny.twins import twin
from tests.tolerance import close

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(2))


class Inline(nn.Module):
    """Llama's attention with no config and no interface; `mix` multiplies and takes the softmax."""

    def __init__(self, own: LlamaAttention) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = own.q_proj, own.k_proj, own.v_proj, own.o_proj
        self.head_dim, self.layer_idx = own.head_dim, own.layer_idx

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any,
        past_key_values: Any = None,
        cache: Any = None,
        **given: Any,
    ) -> Any:
        cache = past_key_values if cache is None else cache  # as releases of transformers call it
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (m(hidden_states).view(shape).transpose(1, 2) for m in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1 + k.shape[2] - q.shape[2])
        z = self.mix(q, k, v, future)
        return self.o_proj(z.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)), None

    def mix(self, q: Tensor, k: Tensor, v: Tensor, future: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5
        weights = scores.masked_fill(future, torch.finfo(scores.dtype).min).softmax(-1)
        return weights @ v


class Fused(Inline):
    def mix(self, q: Tensor, k: Tensor, v: Tensor, future: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, ~future)


class Summed(Inline):
    """Einsums and a softmax by hand: none of the operators that are read."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, future: Tensor) -> Tensor:
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * self.head_dim**-0.5
        weights = scores.masked_fill(future, -torch.inf).exp()
        return torch.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdim=True), v)


def custom(kind: type[Inline]) -> Any:
    hf = twin("llama")
    for layer in hf.model.layers:
        layer.self_attn = kind(layer.self_attn)
    return hf


@pytest.mark.parametrize("kind", [Inline, Fused])
def test_attention_that_is_written_out_is_read_at_its_operators(kind: type[Inline], tmp_path: Path) -> None:
    hf, usual = custom(kind), pb.load(twin("llama"))
    model = pb.load(hf)
    assert model.family.attention == "operators"
    port = model.layers[1].attn.pattern
    edits = [pb.zero(model.layers[1].heads[2].z), pb.scale(model.layers[0].heads[1].pattern, 0.5)]
    found, expected = (pb.run(m, IDS, taps=[port], edits=edits) for m in (model, usual))
    assert close(found.logits, expected.logits)
    assert close(found[port], expected[port])
    assert not close(found.logits, pb.run(usual, IDS).logits)
    w, known = model.layers[1].attn.weights(), usual.layers[1].attn.weights()
    assert torch.equal(w.W_Q, known.W_Q)
    assert torch.equal(w.W_K, known.W_K.repeat_interleave(2, 0))  # each head has a copy of its group's
    assert torch.equal(w.W_V, known.W_V.repeat_interleave(2, 0))
    with pytest.raises(PatchbayError, match="4 value heads share 2 stored ones"):
        Knob("k", [pb.scale(model.layers[0].groups[0].v, 2.0)], 1.5).export(model, tmp_path / "out")


def test_attention_by_other_operators_is_refused_with_the_cure() -> None:
    with pytest.raises(PatchbayError) as refused:
        pb.load(custom(Summed))
    said = str(refused.value)
    assert (
        'neither asks transformers\' attention interface nor, as attention="operators" of a family row reads it' in said
    )
    assert "multiplies queries with keys, takes a softmax and multiplies with values" in said

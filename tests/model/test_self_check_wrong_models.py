"""self_check on models made to deceive it: small Llamas with transformers' names and code of their own. Each is refused, refused for
its weights alone, known for what it is, or right."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

import patchbay as pb
from patchbay.errors import PatchbayError
from patchbay.model.proving import as_published
from patchbay.signal.port import Port
from patchbay.tiny.twins import twin
from tests.tolerance import close

IDS = [[5, 9, 20, 33, 41, 7, 60, 11, 3], [7, 60, 11, 5, 8, 9, 30, 31, 32]]


def changed(**classes: Any) -> Any:
    """The Llama twin with other classes in place of its own, on the same weights: `layer`, `attn`, `mlp`, `norm`, `whole`."""
    hf = twin("llama biased" if classes.pop("biased", False) else "llama")
    for layer in hf.model.layers:
        named = dict(layer=layer, attn=layer.self_attn, mlp=layer.mlp, norm=layer.input_layernorm)
        for name, module in named.items():
            if name in classes:
                module.__class__ = classes[name]
    if "whole" in classes:
        hf.__class__ = classes["whole"]
    return hf


def why(hf: Any, **options: Any) -> str:
    with pytest.raises(PatchbayError) as refused:
        pb.load(hf, **options)
    return str(refused.value)


def weights_of(model: pb.Model, part: str) -> str:
    with pytest.raises(PatchbayError) as refused:
        getattr(model.layers[1], part).weights()
    return str(refused.value)


@torch.no_grad()
def plain(hf: Any) -> Tensor:
    found: Tensor = hf(torch.tensor(IDS), use_cache=False).logits
    return found


# ---- blocks -----------------------------------------------------------------------------------------------------------


class Layer(LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:
        return self.joined(hidden_states, lambda x: self.self_attn(hidden_states=x, **given)[0])


class NormedTwice(Layer):
    def joined(self, x: Tensor, attend: Any) -> Tensor:
        x = x + attend(self.input_layernorm(self.input_layernorm(x)))
        return x + self.mlp(self.post_attention_layernorm(x))


class SideBySide(Layer):
    def joined(self, x: Tensor, attend: Any) -> Tensor:
        return x + attend(self.input_layernorm(x)) + self.mlp(self.post_attention_layernorm(x))


class PostNorm(Layer):
    def joined(self, x: Tensor, attend: Any) -> Tensor:
        x = self.input_layernorm(x + attend(x))
        return self.post_attention_layernorm(x + self.mlp(x))


class HalfAdded(Layer):
    def joined(self, x: Tensor, attend: Any) -> Tensor:
        x = x + 0.5 * attend(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class StreamShrinks(Layer):
    def joined(self, x: Tensor, attend: Any) -> Tensor:
        x = 0.9 * x + attend(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class AddsUnseen(Layer):
    def joined(self, x: Tensor, attend: Any) -> Tensor:
        x = x + attend(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x)) + 0.1 * x.mean(-1, keepdim=True)


class ReadsUnnormed(Layer):
    def joined(self, x: Tensor, attend: Any) -> Tensor:
        x = x + attend(x)
        return x + self.mlp(self.post_attention_layernorm(x))


class MlpTwice(Layer):
    def joined(self, x: Tensor, attend: Any) -> Tensor:
        x = x + attend(self.input_layernorm(x))
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (NormedTwice, "read the norms of the streams before them within"),
        (SideBySide, "parts sum to the final stream within"),
        (PostNorm, "goes on from the norm of its stream"),
        (HalfAdded, "parts sum to the final stream within"),
        (StreamShrinks, "parts sum to the final stream within"),
        (AddsUnseen, "parts sum to the final stream within"),
        (ReadsUnnormed, "read the norms of the streams before them within"),
        (MlpTwice, "the MLP of layer 0 is called 2 times in one run"),
    ],
)
def test_blocks_that_are_joined_otherwise_are_refused(layer: type, says: str) -> None:
    hf = changed(layer=layer)
    assert not torch.allclose(plain(hf), plain(twin("llama")), atol=1e-3)
    assert says in why(hf)
    if layer in (SideBySide, HalfAdded):
        hf.config.model_type = "brand_new"  # no row reads them either
        why(hf)


def test_layers_that_are_one_module_are_refused() -> None:
    hf = twin("llama")
    hf.model.layers[1] = hf.model.layers[0]
    assert "of layer 1 is the same module as" in why(hf)


# ---- what looks ahead, back, or at others ----------------------------------------------------------------------------------


def shifted(by: int) -> type:
    class Shifted(LlamaMLP):
        """Reads the token `by` places on (negative: back); beyond the ends 0."""

        def forward(self, x: Tensor) -> Tensor:
            n = x.shape[1]
            moved = F.pad(x, (0, 0, 0, by))[:, by:] if by > 0 else F.pad(x, (0, 0, -by, 0))[:, :n]
            return super().forward(moved)

    return Shifted


@pytest.mark.parametrize("by", [1, 4, 7])
def test_a_block_that_reads_later_tokens_is_known_not_to_be_causal(by: int) -> None:
    """By more tokens than the self-check runs, too: then its prompts run apart, and sweeps are whole runs."""
    model = pb.load(changed(mlp=shifted(by)))
    assert not model.causal
    short = IDS[0][:6]
    together = pb.run(model, [IDS[0], short])
    for i, ids in enumerate((IDS[0], short)):
        with torch.no_grad():
            alone = model.hf(torch.tensor([ids]), use_cache=False).logits[0]
        assert close(together.logits[i, : len(ids)], alone)
    if by == 1:
        assert "W_in and W_gate do not give the activation" in weights_of(model, "mlp")


def test_a_block_that_reads_the_token_before_sweeps_as_it_runs() -> None:
    model = pb.load(changed(mlp=shifted(-1)))
    assert model.causal
    assert "W_in and W_gate do not give the activation" in weights_of(model, "mlp")
    edits = [pb.zero(head.z, positions=p) for head in model.layers[0].heads for p in (3, 6)]
    table = pb.sweep(model, IDS, edits, metric=lambda logits, _: logits[:, 7])["value"]
    for e, edit in enumerate(edits):
        logits = pb.run(model, IDS, edits=[edit]).last_logits
        assert close(table[e], logits[:, 7], of=logits)


class Crowded(LlamaMLP):
    """Knows of the tokens at its place in other prompts."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.3 * x.mean(0, keepdim=True) - 0.3 * x)


class LengthScaled(LlamaMLP):
    """Knows how long its prompt is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + x.shape[1] / 64)


class Chance(LlamaMLP):
    """Drops out in evaluation too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.3, training=True)


def test_prompts_that_know_of_one_another_or_of_chance_are_refused() -> None:
    assert "a prompt is not the same alone and beside another" in why(changed(mlp=Crowded))
    assert "two equal runs differ" in why(changed(mlp=Chance))


def test_a_prompt_that_knows_its_length_runs_alone() -> None:
    model = pb.load(changed(mlp=LengthScaled))
    assert not model.causal  # a token is not what it is without those after it
    assert "mlp.act" not in model.signals(0)
    prompts = [IDS[0], IDS[1][:4]]
    found = pb.run(model, prompts)
    with torch.no_grad():
        assert close(found.logits[1, :4], model.hf(torch.tensor([prompts[1]]), use_cache=False).logits[0])


# ---- attention ---------------------------------------------------------------------------------------------------------------


class Attention(LlamaAttention):
    """Llama's attention, written out; a subclass changes one step of it."""

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def turned(self, q: Tensor) -> Tensor:
        return q

    def cached(self, cache: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = cache.update(k, v, self.layer_idx)
        return found

    def projected(self, z: Tensor) -> Tensor:
        return self.o_proj(z)

    def forward(
        self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any = None, past_key_values: Any = None, cache: Any = None, **given: Any
    ) -> Any:  # fmt: skip
        cache = past_key_values if cache is None else cache  # as releases of transformers call it
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (x.view(shape).transpose(1, 2) for x in self.maps(hidden_states))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if cache is not None:
            k, v = self.cached(cache, k, v)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        z, weights = attend(self, self.turned(q), k, v, attention_mask, scaling=self.scaling, **given)
        return self.projected(z.reshape(*hidden_states.shape[:-1], -1)), weights


class ValueBiasLeftOut(Attention):
    def maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(x), self.k_proj(x), F.linear(x, self.v_proj.weight)


class ValuesOfKeys(Attention):
    def maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k = self.k_proj(x)
        return self.q_proj(x), k, self.v_proj(x) + 0.3 * k


class QueriesAsKeys(Attention):
    """Queries and keys of the wrong maps: what is called q_proj makes keys."""

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        width = self.k_proj.out_features
        return torch.cat([self.k_proj(x), self.q_proj(x)[..., width:]], -1), self.q_proj(x)[..., :width], self.v_proj(x)


class HeadsOfOtherHeat(Attention):
    def turned(self, q: Tensor) -> Tensor:
        return q * torch.tensor([1.0, 2.0, 1.0, 1.0])[:, None, None]


class TokensOfOtherHeat(Attention):
    def turned(self, q: Tensor) -> Tensor:
        return q * (1 + torch.arange(q.shape[2]) / 10)[:, None]


class Hotter(Attention):
    def turned(self, q: Tensor) -> Tensor:
        return 3 * q


class Gated(Attention):
    def projected(self, z: Tensor) -> Tensor:
        return self.o_proj(z * torch.sigmoid(z.mean(-1, keepdim=True)))


class OutBiasLeftOut(Attention):
    def projected(self, z: Tensor) -> Tensor:
        return self.o_proj(z) - self.o_proj.bias


class ProjectionNotCalled(Attention):
    def projected(self, z: Tensor) -> Tensor:
        return F.linear(z, self.o_proj.weight)


class CacheNotRead(Attention):
    def cached(self, cache: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        super().cached(cache, k, v)
        return k, v


class CacheNotWritten(Attention):
    def cached(self, cache: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v


def assert_right(model: pb.Model) -> None:
    """An edited head and a sweep against the module's own slice cut by a hook of plain torch."""
    edit = pb.zero(model.layers[1].heads[2].z)

    def cut(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = args[0].clone()
        z[..., 16:24] = 0
        return (z, *args[1:])

    handle = model.modules[1].attn_proj.register_forward_pre_hook(cut)  # type: ignore[union-attr]
    expected = plain(model.hf)
    handle.remove()
    assert not close(expected, plain(model.hf))
    assert close(pb.run(model, IDS, edits=[edit]).logits, expected)
    table = pb.sweep(model, IDS, [edit], metric=lambda logits, _: logits[:, 7])["value"]
    assert close(table[0], expected[:, -1, 7], of=expected)


@pytest.mark.parametrize("attn", [Attention, Hotter, CacheNotRead, CacheNotWritten])
def test_attention_of_its_own_that_is_right_is_right(attn: type) -> None:
    """One heat for all heads is a scale of the scores; a cache that is not used makes sweeps whole runs."""
    model = pb.load(changed(attn=attn))
    assert not as_published(model)
    assert model.family.name == "llama"
    assert not model.check.weights
    assert_right(model)
    edits = [pb.zero(head.z, positions=4) for head in model.layers[0].heads]
    table = pb.sweep(model, IDS, edits, metric=lambda logits, _: logits[:, 7])
    for e, edit in enumerate(edits):
        logits = pb.run(model, IDS, edits=[edit]).last_logits
        assert close(table["value"][e], logits[:, 7], of=logits)
    assert (attn is CacheNotWritten) == any("writes no keys and values" in note for note in table.notes)


@pytest.mark.parametrize(
    ("attn", "says"),
    [
        (ValueBiasLeftOut, "the stream times W_V is not v"),
        (ValuesOfKeys, "the stream times W_V is not v"),
        (QueriesAsKeys, "the stream times W_Q has not the direction of q"),
        (HeadsOfOtherHeat, "q is the stream times W_Q times a factor that differs by token or head"),
        (TokensOfOtherHeat, "q is the stream times W_Q times a factor that differs by token or head"),
    ],
)
def test_weights_that_are_not_what_attention_computes_with_are_refused(attn: type, says: str) -> None:
    hf = changed(attn=attn, biased=attn is ValueBiasLeftOut)
    assert says in weights_of(pb.load(hf), "attn")
    row = replace(pb.load(twin("llama")).family, name="mine")
    assert says in weights_of(pb.load(hf, family=row), "attn")


@pytest.mark.parametrize(
    ("attn", "biased", "says"),
    [
        (Gated, False, "gradients contradict it"),
        (OutBiasLeftOut, True, "heads sum to attention out within"),
        (ProjectionNotCalled, True, "self-check failed"),
    ],
)
def test_attention_whose_heads_do_not_give_what_it_adds_is_refused(attn: type, biased: bool, says: str) -> None:
    assert says in why(changed(attn=attn, biased=biased))


def test_queries_and_keys_that_a_row_mixes_up_are_refused() -> None:
    row = replace(pb.load(twin("llama")).family, name="mine", qkv_modules=("q_proj", "v_proj", "k_proj"))
    assert "cannot be read: the stream times W_V is not v" in weights_of(pb.load(twin("llama"), family=row), "attn")
    hf = twin("llama", num_key_value_heads=4)
    row = replace(row, qkv_modules=("k_proj", "q_proj", "v_proj"))
    assert "W_Q has not the direction of q" in weights_of(pb.load(hf, family=row), "attn")


# ---- MLP, head -------------------------------------------------------------------------------------------------------------


class UpBiasLeftOut(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * F.linear(x, self.up_proj.weight))


class DownScaled(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return 0.7 * super().forward(x)


class DownBiasLeftOut(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - self.down_proj.bias


class DownNotCalled(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.act_fn(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)


def test_an_mlp_whose_last_map_does_not_give_what_it_adds_has_no_neurons() -> None:
    """All else is offered, and right."""
    for mlp in (DownScaled, DownBiasLeftOut, DownNotCalled):
        model = pb.load(changed(mlp=mlp, biased=True))
        assert "no neurons in layers [0, 1]" in str(model.check)
        assert model.n_neurons(0) == 0
        with pytest.raises(
            PatchbayError, match=r"L0\.mlp\.act: .*what its MLP adds is not what its last map makes of neurons"
        ):
            pb.run(model, IDS, taps=["L0.mlp.act"])
        with pytest.raises(PatchbayError, match="mlp.act"):
            model.layers[0].mlp.weights()
        trace = pb.run(model, IDS, taps=[Port("mlp.out", 0)], edits=[pb.scale(Port("mlp.out", 0), 0.5)])
        assert not close(trace.logits, plain(model.hf))
        assert len(pb.find.direct_logit_attribution(model, pb.Task("t", IDS, [3, 4], [[5], [6]])).table()) > 0


def test_a_bias_that_is_not_added_before_the_activation_is_noticed() -> None:
    assert "W_in and W_gate do not give the activation" in weights_of(
        pb.load(changed(mlp=UpBiasLeftOut, biased=True)), "mlp"
    )


class Louder(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out


def test_a_head_that_does_not_give_the_logits_is_refused() -> None:
    assert "norm and unembedding give the logits within" in why(changed(whole=Louder))


class Flat(LlamaRMSNorm):
    """No norm that gains could be read of."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) * self.weight


def test_a_norm_that_is_none_is_not_folded() -> None:
    model = pb.load(changed(norm=Flat))
    assert_right(model)
    with pytest.raises(PatchbayError, match="Flat is neither LayerNorm nor RMSNorm"):
        model.layers[0].attn.weights(fold_norm=True)


def test_whose_code_a_model_is() -> None:
    """A class, a block or a forward of somebody else has to pass the proofs of structure, whatever the model calls itself."""
    assert as_published(pb.load(twin("llama")))
    assert as_published(pb.load(twin("opt")))
    assert not as_published(pb.load(changed(mlp=UpBiasLeftOut)))
    hf = twin("llama")
    own: Callable[..., Tensor] = hf.model.layers[0].mlp.forward
    hf.model.layers[0].mlp.forward = lambda x: own(x)
    assert not as_published(pb.load(hf))
    hf.model.layers[0].mlp.forward = lambda x: own(x.flip(0))
    assert "alone and beside another" in why(hf)

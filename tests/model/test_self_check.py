"""self_check: what it proves, and that what is not so is refused, set apart or said. Right values are plain Hugging Face."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ApertusConfig, ApertusForCausalLM, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import patchbay as pb
from patchbay.model.proofs import graph_error
from patchbay.signal.port import PatchbayError, Port
from patchbay.sweeps.restart import base_run
from patchbay.tiny.twins import FAMILY_CONFIGS, _draw, twin
from tests.given import lent
from tests.tolerance import close

IDS = [[5, 9, 20, 33, 41], [7, 60, 11], [3, 4, 5, 6, 7, 8]]
SMALL: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SMALL |= dict(intermediate_size=48, vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def drawn(hf: nn.Module) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _draw(hf)
    return hf.eval()


def looking_ahead() -> Any:
    hf = drawn(LlamaForCausalLM(LlamaConfig(**SMALL)))
    for layer in hf.model.layers:
        layer.self_attn.is_causal = False
    return hf


@torch.no_grad()
def plain(hf: Any, ids: list[int]) -> Tensor:
    out: Tensor = hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return out


# ---- causality -------------------------------------------------------------------------------------------------------


def test_a_model_whose_tokens_see_later_ones_is_known_and_its_prompts_run_apart() -> None:
    hf = looking_ahead()
    model = pb.load(hf)
    assert not model.causal
    assert "not causal" in repr(model)
    assert pb.load(twin("llama")).causal
    edit = pb.scale(model.layers[0].mlp.out, 0.5, positions=-1)
    together = pb.run(model, IDS, edits=[edit], taps=[Port("resid_out", 1)])
    for i, ids in enumerate(IDS):
        assert close(pb.run(model, [ids]).logits[0], plain(hf, ids))
        alone = pb.run(model, [ids], edits=[edit], taps=[Port("resid_out", 1)])
        assert close(together.logits[i, : len(ids)], alone.logits[0])
        assert close(together[Port("resid_out", 1)][i, : len(ids)], alone[Port("resid_out", 1)][0])
    with pytest.raises(PatchbayError, match="run apart; give prompts of one length"):
        pb.run(model, IDS, grad=True)


def test_a_pattern_that_looks_ahead_is_shown_and_edited_as_it_is() -> None:
    hf = looking_ahead()
    model = pb.load(hf)
    port = Port("attn.pattern", 0)
    trace = pb.run(model, [IDS[0]], taps=[port])
    assert close(trace.logits[0], plain(hf, IDS[0]))
    assert float(trace[port][0, :, 0, 1:].sum()) > 0.1  # the first token sees later ones
    same = pb.run(model, [IDS[0]], edits=[pb.scale(port, 1.0)])
    assert close(same.logits[0], plain(hf, IDS[0]))


def test_sweeps_of_a_model_that_looks_ahead_are_whole_runs() -> None:
    model = pb.load(looking_ahead())
    edits = [pb.zero(head.z) for layer in model.layers for head in layer.heads]
    result = pb.sweep(model, IDS, edits, metric=lambda logits, _: logits[:, 3] - logits[:, 4])
    assert any("tokens see those after them" in note for note in result.notes)
    for e, edit in enumerate(edits):
        for i, ids in enumerate(IDS):
            logits = pb.run(model, [ids], edits=[edit]).last_logits[0]
            assert close(result["value"][e, i], logits[3] - logits[4], of=logits)


def test_gemma_with_attention_both_ways() -> None:
    hf = twin("gemma3_text", use_bidirectional_attention=True)
    model = pb.load(hf)
    assert not model.causal
    trace = pb.run(model, IDS, taps=[Port("attn.pattern", 1)])
    for i, ids in enumerate(IDS):
        assert close(trace.logits[i, : len(ids)], plain(hf, ids))


# ---- what depends on the batch ---------------------------------------------------------------------------------------


def longrope() -> Any:
    scaling = {"rope_type": "longrope", "long_factor": [4.0] * 4, "short_factor": [1.0] * 4, "rope_theta": 10000.0}
    config = Phi3Config(
        **SMALL, max_position_embeddings=128, original_max_position_embeddings=32, rope_parameters=scaling
    )
    return drawn(Phi3ForCausalLM(config))


def dynamic() -> Any:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    return drawn(LlamaForCausalLM(LlamaConfig(**SMALL, max_position_embeddings=32, rope_parameters=scaling)))


@pytest.mark.parametrize("make", [longrope, dynamic])
def test_a_prompt_does_not_depend_on_the_longest_of_its_batch(make: Any) -> None:
    lengths = (20, 48) if make is longrope else (12, 28)
    prompts = [[3 + (7 * i + n) % 90 for i in range(n)] for n in lengths]
    hf = make()
    model = pb.load(hf)
    trace = pb.run(model, prompts, taps=[Port("resid_out", 0)])
    fresh = make()
    for i, ids in enumerate(prompts):
        assert close(trace.logits[i, : len(ids)], plain(fresh, ids))
    swapped = pb.run(model, prompts[::-1], batch_size=1)
    assert close(swapped.logits[1, : lengths[0]], trace.logits[0, : lengths[0]])


def test_regimes_are_told_by_length() -> None:
    model = pb.load(longrope())
    assert model.regime(20) == model.regime(32) != model.regime(33) == model.regime(100)
    model = pb.load(dynamic())
    assert model.regime(20) == model.regime(32)
    assert len({model.regime(n) for n in (32, 33, 34)}) == 3
    model = pb.load(twin("llama"))
    assert model.regime(3) == model.regime(60)


class Mixing(nn.Embedding):
    """Tokens that know of those at their place in the other prompts."""

    def forward(self, ids: Tensor) -> Tensor:
        x = super().forward(ids)
        return x + 0.5 * x.mean(0, keepdim=True)


def test_a_model_whose_prompts_know_of_one_another_is_refused() -> None:
    hf = twin("llama")
    hf.config.model_type = "brand_new"
    mixing = Mixing(96, 32)
    mixing.weight = hf.model.embed_tokens.weight
    hf.model.embed_tokens = mixing
    with pytest.raises(PatchbayError, match="a prompt is not the same alone and beside another"):
        pb.load(hf)


# ---- the graph -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gemma2",
        "falcon",
        "gpt_neo",
        "mixtral",
        "lfm2",
        "qwen3_next",
        "bloom",
        "falcon_h1",
        "nemotron_h",
        "granite_swa",
    ],
)
def test_gradients_agree_with_the_view_of_a_family(name: str) -> None:
    assert graph_error(pb.load(twin(name))) is None


def test_blocks_one_after_the_other_are_not_taken_for_blocks_side_by_side() -> None:
    hf = drawn(ApertusForCausalLM(ApertusConfig(**SMALL)))
    hf.config.model_type = "brand_new"
    try:
        model = pb.load(hf)
    except PatchbayError as error:
        assert "self-check failed" in str(error)  # noqa: PT017
    else:
        assert "resid_mid" in model.signals(0)
    row = pb.Family("side by side", norm_attn="attention_layernorm", norm_mlp="feedforward_layernorm", parallel=True)
    with pytest.raises(PatchbayError, match=r"read the norms of the streams before them within [\d.]+e[+-]0[01]"):
        pb.load(hf, family=row)


class Gated(nn.Module):
    """A projection behind a gate that no port shows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.gate = inner, nn.Parameter(torch.linspace(0.5, 1.5, 32))


def test_a_gate_inside_attention_is_noticed_by_gradients() -> None:
    hf = twin("llama")
    attend = hf.config._attn_implementation
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    def gated(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
        z, pattern = sdpa_attention_forward(module, q, k, v, mask, **options)
        return z * torch.sigmoid(q.transpose(1, 2)), pattern

    AttentionInterface.register("gated_for_a_test", gated)
    AttentionMaskInterface.register("gated_for_a_test", ALL_MASK_ATTENTION_FUNCTIONS[attend])
    hf.config._attn_implementation = "gated_for_a_test"
    hf.config.model_type = "brand_new"
    with pytest.raises(PatchbayError, match="self-check failed"):
        pb.load(hf)


# ---- mode, cache, weights --------------------------------------------------------------------------------------------


def test_a_model_that_drops_out_is_refused_until_it_is_in_evaluation() -> None:
    hf = twin("gpt2")
    model = pb.load(hf)
    hf.train()
    for call in (
        lambda: pb.run(model, IDS),
        lambda: model.generate([5, 6], 2),
        lambda: pb.sweep(model, IDS, [pb.zero(model.layers[0].mlp.out)], metric=lambda x, _: x[:, 0]),
    ):
        with pytest.raises(PatchbayError, match=r"changes at random .*Call model\.hf\.eval\(\) first"):
            call()
    assert hf.training
    hf.eval()
    pb.run(model, IDS)
    hf = twin("llama", attention_dropout=0.2)
    model = pb.load(hf.train())
    with pytest.raises(PatchbayError, match=r"attention_dropout of 0\.2"):
        pb.run(model, IDS)
    pb.run(pb.load(twin("llama").train()), IDS)  # nothing in it is random


def test_a_cache_that_is_not_written_is_said_and_sweeps_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = twin("llama")
    inner = hf.model.forward

    def forgetful(
        *args: Any, past_key_values: Any = None, cache: Any = None, use_cache: Any = None, **kwargs: Any
    ) -> Any:
        return inner(*args, use_cache=False, **kwargs)

    monkeypatch.setattr(hf.model, "forward", forgetful)
    model = pb.load(hf)
    base = base_run(model, torch.tensor([IDS[0]]), [])
    assert "its forward writes no keys and values" in str(base.refusal)
    edits = [pb.zero(head.z) for head in model.layers[0].heads]
    result = pb.sweep(model, [IDS[0]], edits, metric=lambda logits, _: logits[:, 3])
    assert any("writes no keys and values" in note for note in result.notes)
    for e, edit in enumerate(edits):
        expected = float(pb.run(model, [IDS[0]], edits=[edit]).last_logits[0, 3])
        assert close(result["value"][e, 0], expected, of=1.0)


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_weights_of_every_family_are_what_the_model_computes_with(name: str) -> None:
    model = lent(name)
    assert not model.check.weights
    assert model.check.inputs <= 1e-6
    assert model.causal != (name == "paligemma")  # whose whole prompt is a prefix


def test_weights_that_lie_otherwise_than_the_row_says_are_refused_where_they_are_asked_for() -> None:
    row = pb.load(twin("gpt_neox")).family
    from dataclasses import replace

    model = pb.load(twin("gpt_neox"), family=replace(row, name="mine", qkv="packed"))
    with pytest.raises(PatchbayError, match=r"weights of L1.attn cannot be read: the stream times W_V is not v"):
        model.layers[1].attn.weights()
    swapped = replace(pb.load(twin("llama")).family, name="mine", mlp_up="gate_proj", mlp_gate="up_proj")
    model = pb.load(twin("llama"), family=swapped)
    with pytest.raises(PatchbayError, match=r"weights of L0.mlp cannot be read: W_in and W_gate"):
        model.layers[0].mlp.weights()
    model.layers[0].attn.weights()

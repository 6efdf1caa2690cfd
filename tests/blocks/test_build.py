"""Build: a model with blocks saves and loads by name, keeps the weights that it was given, and refuses what it does not know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import patchbay as pb
from patchbay.signal.port import PatchbayError
from patchbay.tiny import twins
from tests import forked
from tests.blocks.given import IDS, built
from tests.given import lent
from tests.tolerance import close

ROOT = Path(pb.__file__).parents[1]
FORMS = [{"attention": "k_bias"}, {"convolution": 3, "attention": ["softmax", {"kind": "sigmoid", "bias": -1.0}]}]


@pytest.mark.parametrize("blocks", FORMS, ids=str)
def test_saved_and_loaded_by_name(blocks: dict[str, object], tmp_path: Path) -> None:
    hf = built(**blocks)
    hf.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "blocks_llama"
    assert config["blocks"] == blocks
    assert not list(tmp_path.glob("*.py"))
    again = pb.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(again.hf(IDS).logits, hf(IDS).logits)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, hf(IDS).logits)
    assert again.family.name == "llama"


def test_another_process_knows_it_by_name_or_refuses_it(tmp_path: Path) -> None:
    """pb.load asks for nothing; a program that does not know the name does not read it as a Llama."""
    built(attention="sigmoid").save_pretrained(tmp_path)
    forget = (
        "from transformers.models.auto.configuration_auto import CONFIG_MAPPING; CONFIG_MAPPING._extra_content.clear()"
    )
    load = f"import patchbay as pb; print(type(pb.load({str(tmp_path)!r}).hf).__name__)"
    refuse = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    done = forked.python("-c", f"{forget}; {load}", cwd=ROOT)
    assert done.stdout.strip().endswith("BlocksLlamaForCausalLM"), done.stderr
    done = forked.python("-c", f"{forget}; {refuse}", cwd=ROOT)
    assert done.returncode != 0
    assert "blocks_llama" in done.stderr


def test_a_model_that_is_given_keeps_its_weights() -> None:
    """Also in another dtype; the model itself is as it was."""
    plain = twins.twin("llama").double()
    before = {name: weight.clone() for name, weight in plain.state_dict().items()}
    hf = pb.blocks.build(plain, attention="softmax1")
    assert hf.dtype == torch.float64
    assert all(torch.equal(hf.state_dict()[name], weight) for name, weight in before.items())
    assert type(plain).__name__ == "LlamaForCausalLM"
    assert all(torch.equal(plain.state_dict()[name], weight) for name, weight in before.items())


def test_what_no_checkpoint_holds_is_kept_too(tmp_path: Path) -> None:
    """Numbers in their own dtypes, rotary frequencies that a bfloat16 model keeps in float32, weights finer than float32, how it generates, an attention that was named."""
    twins.twin("llama").save_pretrained(tmp_path)
    ids = torch.randint(3, 90, (1, 60), generator=torch.Generator().manual_seed(0))
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half.generation_config.eos_token_id, half.lm_head.weight.data = [7, 9], half.lm_head.weight.data.bfloat16()
    fine, named = twins.twin("llama").double(), pb.load(tmp_path, attn_implementation="softmax1").hf
    with torch.no_grad():
        for weight in fine.parameters():
            weight.mul_(1 + 1e-10)
        for plain in (half, fine, named, half.bfloat16()):  # the last one rounds its frequencies
            hf = pb.blocks.build(plain, convolution=3)
            assert torch.equal(hf(ids).logits, plain(ids).logits)
            assert {weight.dtype for weight in hf.parameters()} == {plain.dtype}
    assert pb.blocks.build(half, convolution=3).generation_config.eos_token_id == [7, 9]
    with pytest.raises(
        PatchbayError, match="attention 'softmax1' was named for the model, and layers 1 would attend by a softmax"
    ):
        pb.blocks.build(named, attention=["sigmoid", "softmax"])


def test_weights_that_would_have_no_place_are_refused() -> None:
    """A compiled model, one without its unembedding, one with adapters: their names are others, and nothing of them would be kept."""
    plain = twins.twin("llama")
    wrapped = torch.nn.Module()
    wrapped.config, wrapped._orig_mod = plain.config, plain  # as torch.compile has it
    adapted = twins.twin("llama")
    adapted.model.layers[0].mlp.lora_A = torch.nn.Linear(32, 2)
    for model in (wrapped, plain.model, adapted):
        with pytest.raises(PatchbayError, match="build keeps weights by their names, and .* differ .*not compiled"):
            pb.blocks.build(model, convolution=3)
    with pytest.raises(PatchbayError, match="got Model: give its model.hf"):
        pb.blocks.build(lent("llama"), convolution=3)
    elsewhere = twins.twin("llama").to("meta")
    with pytest.raises(PatchbayError, match="of this model lie elsewhere"):
        pb.blocks.build(elsewhere, convolution=3)


WHOLE = ({"convolution": 3}, {"mixer": "gla"}, {"mixer": "h3"}, {"meta_tokens": {"id": 95, "layers": [1]}})


@pytest.mark.parametrize("blocks", WHOLE, ids=str)
def test_texts_that_are_not_whole_are_refused_of_the_inner_model_too(blocks: dict[str, object]) -> None:
    """Two texts in a row, told by their places; masks of four axes, where a mixer would not ask them or a convolution read across them; padding on the left."""
    hf = built(**blocks)
    anew = torch.cat([torch.arange(6), torch.arange(6)])[None]
    for call in (hf, hf.model):
        with torch.no_grad(), pytest.raises(PatchbayError, match="position_ids begin anew inside a row"):
            call(IDS, position_ids=anew)
        with torch.no_grad(), pytest.raises(PatchbayError, match="padding on the left"):
            call(IDS, attention_mask=torch.tensor([[0, *[1] * 11]] * 2))
        with pytest.raises(PatchbayError, match="a mask of four axes"):
            call(IDS, attention_mask=torch.eye(12, dtype=torch.bool).expand(2, 1, -1, -1))
    causal = torch.ones(12, 12, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    with torch.no_grad():
        plain = hf(IDS).logits
        assert torch.equal(hf(IDS, position_ids=torch.arange(12)[None]).logits, plain)
        if "mixer" in blocks:
            with pytest.raises(PatchbayError, match="which a mixer does not ask"):
                hf(IDS, attention_mask=causal)
        else:
            assert close(hf(IDS, attention_mask=causal).logits, plain)


@pytest.mark.parametrize("blocks", WHOLE[1:], ids=str)
def test_in_bfloat16_it_is_the_same_model_rounded(blocks: dict[str, object]) -> None:
    torch.manual_seed(0)
    hf = pb.blocks.build(twins.twin("llama").config, **blocks)
    ids = IDS.clone()
    ids[:, [2, 5, 9]] = 95
    with torch.no_grad():
        exact = hf(ids).logits
        assert float((hf.bfloat16()(ids).logits.float() - exact).abs().max()) < 0.05 * float(exact.abs().max())


def test_layers_of_gates_and_meta_tokens_are_checkpointed() -> None:
    """What a layer made is made again in the backward pass, as of every other layer; the gradients are the same."""
    for blocks in ({"gate": True}, {"meta_tokens": {"id": 95, "layers": [1]}}):
        hf, calls, found = built(**blocks).train(), [], []
        norm = hf.model.layers[1].gated_attn.norm if "gate" in blocks else hf.model.layers[1].input_layernorm
        norm.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        for _ in range(2):
            hf(IDS, labels=IDS, use_cache=False).loss.backward()
            found.append(hf.model.embed_tokens.weight.grad.clone())
            hf.zero_grad()
            getattr(hf, "activation_checkpointing_enable", hf.gradient_checkpointing_enable)()
        assert len(calls) == 1 + 2
        assert close(*found)


def test_a_model_with_blocks_trains() -> None:
    hf = built(attention="k_bias", convolution=3).train()
    hf(IDS, labels=IDS).loss.backward()
    for name, weight in hf.named_parameters():
        assert weight.grad is not None, name
        assert bool(weight.grad.abs().max() > 0), name


def test_what_cannot_be_built_is_refused() -> None:
    config = twins.twin("llama").config
    with pytest.raises(PatchbayError, match=r"no block 'atention'; blocks are .*did you mean 'attention'"):
        pb.blocks.build(config, atention="sigmoid")
    with pytest.raises(PatchbayError, match="build needs a block"):
        pb.blocks.build(config, attention=None)
    with pytest.raises(PatchbayError, match="build takes a Hugging Face config or model, got str"):
        pb.blocks.build("llama", attention="sigmoid")
    with pytest.raises(PatchbayError, match="blocks_llama has blocks already"):
        pb.blocks.build(built(attention="sigmoid"), convolution=3)
    with pytest.raises(PatchbayError, match="no causal language model of type 't5'"):
        pb.blocks.register("t5")

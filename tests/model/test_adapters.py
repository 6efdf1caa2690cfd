"""Adapters and wrappers: what weights are read of a model that carries them is what it multiplies by, and folders of them load."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel, LlamaModel, T5Config, T5ForConditionalGeneration

import patchbay as pb
from patchbay.model.linear import linear_map, rows
from patchbay.signal.port import PatchbayError, Port
from patchbay.sweeps.scorer import Scorer
from patchbay.tiny.twins import twin
from tests.tolerance import Nearness, close

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft asks it
IDS = [[5, 9, 20, 33, 41]]


def adapted(name: str = "llama", seed: int = 0, **more: Any) -> Any:
    """A twin under LoRA whose B is not 0."""
    targets = ["c_attn"] if name == "gpt2" else ["q_proj", "v_proj", "o_proj", "up_proj"]
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": targets} | more
    settings["fan_in_fan_out"] = name == "gpt2"
    model = get_peft_model(twin(name), LoraConfig(**settings)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lora_" in key and "magnitude" not in key:
                weight.normal_(0.0, 0.3)
    return model


def values_right(model: pb.Model) -> Nearness:
    """v by hand, from the weights that are handed out, against what attention received."""
    at, w = model.modules[0], model.layers[0].attn.weights()
    trace = pb.run(model, IDS, taps=[Port("resid_in", 0), Port("attn.v", 0)])
    assert at.norm_attn is not None
    made = torch.einsum("bpm,gmd->bgpd", at.norm_attn(trace[Port("resid_in", 0)]), w.W_V)
    made = made if w.b_V is None else made + w.b_V[:, None]
    return close(made, trace[Port("attn.v", 0)])


def effective(layer: Any) -> Tensor:
    """W + scaling B A, by hand."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return (layer.base_layer.weight + layer.scaling["default"] * b @ a).T


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_a_model_under_lora_is_taken_and_read_as_it_multiplies(name: str) -> None:
    peft = adapted(name)
    model = pb.load(peft)
    assert model.hf is peft.get_base_model()
    assert values_right(model)
    assert torch.equal(pb.run(model, IDS).logits, peft(input_ids=torch.tensor(IDS)).logits.detach())


def test_lora_by_hand_active_off_merged_and_trained_later() -> None:
    peft = adapted()
    model = pb.load(peft)
    layer = peft.get_base_model().model.layers[0].mlp.up_proj
    base = layer.base_layer.weight.detach().clone().T
    assert close(model.layers[0].mlp.weights().W_in, effective(layer))
    with peft.disable_adapter():
        assert torch.equal(model.layers[0].mlp.weights().W_in, base)
        assert values_right(model)
    with torch.no_grad():
        layer.lora_B["default"].weight.add_(0.5)  # trained after it was wrapped and read
    assert close(model.layers[0].mlp.weights().W_in, effective(layer))
    expected = effective(layer)
    peft.merge_adapter()
    assert close(model.layers[0].mlp.weights().W_in, expected)
    peft.unmerge_adapter()
    assert close(model.layers[0].mlp.weights().W_in, expected)


def test_dora_is_asked_what_it_multiplies_by() -> None:
    model = pb.load(adapted(use_dora=True))
    assert values_right(model)
    module = model.modules[0].attn_proj
    x = torch.randn(3, 32)
    assert close(x @ linear_map(module)[0], module(x))  # type: ignore[misc]


def test_an_adapted_head_and_embedding() -> None:
    model = pb.load(adapted(target_modules=["lm_head", "embed_tokens"]))
    trace = pb.run(model, IDS, taps=[Port("final_norm"), Port("embed")])
    assert close(trace[Port("final_norm")] @ model.unembed.weight.T, trace.logits)
    assert close(rows(model.hf.get_input_embeddings())[IDS[0]], trace[Port("embed")][0])
    table = pb.sweep(model, IDS, [pb.zero(model.layers[0].mlp.out)], metric=lambda logits, _: logits[:, 3])
    task_like = Scorer(model, None, lambda logits, _: logits[:, 0])
    task_like.tokens = torch.tensor([3, 7])
    assert close(task_like.logits(trace[Port("final_norm")][0]), trace.logits[0][:, [3, 7]])
    assert close(table["base"][0], trace.logits[0, -1, 3], of=trace.logits)


def test_adapters_of_transformers_and_of_folders(tmp_path: Path) -> None:
    peft = adapted()
    right = peft(input_ids=torch.tensor(IDS)).logits.detach()
    twin("llama").save_pretrained(tmp_path / "base")
    peft.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    for named in (str(tmp_path / "base"), "../base"):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": named}))
        model = pb.load(tmp_path / "adapter")
        assert close(pb.run(model, IDS).logits, right)
        assert values_right(model)
    hf = twin("llama")
    hf.load_adapter(str(tmp_path / "adapter"))
    model = pb.load(hf.eval())
    assert close(pb.run(model, IDS).logits, right)
    assert values_right(model)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "tiny"}))
    with pytest.raises(PatchbayError, match="its adapter does not fit tiny"):
        pb.load(tmp_path / "adapter")


def test_parametrised_and_normed_weights_are_read_as_they_are_used() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    hf = twin("llama")
    parametrize.register_parametrization(hf.model.layers[0].self_attn.v_proj, "weight", Doubled())
    model = pb.load(hf)
    assert values_right(model)
    hf = twin("llama")
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(hf.model.layers[0].self_attn.v_proj)
    model = pb.load(hf)
    with torch.no_grad():
        hf.model.layers[0].self_attn.v_proj.weight_g.mul_(3.0)
    assert values_right(model)


def test_what_is_no_causal_language_model_is_refused_in_one_sentence() -> None:
    small: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    bert = BertConfig(vocab_size=96, **small)
    t5 = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    for model, says in (
        (T5ForConditionalGeneration(t5), "T5ForConditionalGeneration is an encoder-decoder"),
        (BertForMaskedLM(bert), "BertForMaskedLM is an encoder"),
        (BertLMHeadModel(bert), "BertLMHeadModel is an encoder"),
        (LlamaModel(twin("llama").config), "LlamaModel gives no logits"),
        (nn.Linear(3, 3), "expected a Hugging Face causal language model, got Linear"),
    ):
        with pytest.raises(PatchbayError, match=says):
            pb.load(model)  # type: ignore[arg-type]
    prompts = get_peft_model(twin("llama"), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    assert isinstance(prompts, PeftModel)
    with pytest.raises(PatchbayError, match="puts learned tokens before each prompt"):
        pb.load(prompts)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi"])
def test_adapters_that_are_put_on_later_are_noticed(name: str) -> None:
    """The modules that were found are inside others now: what a hook sees there is not what the layer adds or multiplies by."""
    hf = twin(name)
    model = pb.load(hf)
    plain = pb.run(model, IDS).logits
    projection = model.modules[0].attn_proj
    child = next(key for key, module in model.modules[0].attn.named_children() if module is projection)  # type: ignore[union-attr]
    peft = get_peft_model(hf, LoraConfig(r=2, target_modules=[child], fan_in_fan_out=name == "gpt2")).eval()
    with torch.no_grad():
        for key, weight in peft.named_parameters():
            if "lora_B" in key:
                weight.normal_(0.0, 0.5)
    for use in (
        lambda: pb.run(model, IDS, taps=[Port("attn.head_out", 0)]),
        lambda: model.W_O(0),
        lambda: model.generate(IDS, 2),
        lambda: pb.sweep(model, IDS, [pb.zero(Port("attn.z", 0))], metric=lambda logits, _: logits[:, 3]),
    ):
        with pytest.raises(
            PatchbayError,
            match=f"{child} of .* was a .* when the model was loaded and is a .*: pb.load the model again",
        ):
            use()
    again = pb.load(peft)
    trace = pb.run(again, IDS, taps=[Port("attn.head_out", 0), Port("attn.out", 0)])
    bias = 0 if projection.bias is None else projection.bias  # type: ignore[union-attr]
    assert close(trace[Port("attn.head_out", 0)].sum(2) + bias, trace[Port("attn.out", 0)])
    assert not close(trace.logits, plain)
    peft.unload()
    assert torch.equal(pb.run(model, IDS).logits, plain)  # what was found is where it was
    with pytest.raises(PatchbayError, match="when the model was loaded"):
        pb.run(again, IDS)

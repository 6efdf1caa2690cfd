"""flags: a steering vector becomes a checkpoint through biases that the architecture can have; where it cannot, it says what to do."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import patchbay as pb
from patchbay.knobs.flags import give_bias
from patchbay.knobs.knob import Knob
from patchbay.signal.port import Port
from patchbay.tiny.twins import twin
from tests.tolerance import NOISE, close

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# family -> where a vector is added, and the switch that carries it there
CARRIED = {
    "llama": {
        "resid_out": "mlp_bias",
        "mlp.out": "mlp_bias",
        "resid_mid": "attention_bias",
        "attn.out": "attention_bias",
    },
    "granite": {"resid_out": "mlp_bias", "resid_mid": "attention_bias"},
    "cohere": {"resid_out": "attention_bias"},
    "gemma": {"resid_mid": "attention_bias"},
    "qwen3": {"attn.out": "attention_bias"},
    "nemotron": {"resid_out": "mlp_bias"},
    "smollm3": {"resid_out": "mlp_bias"},
    "olmo": {"resid_mid": "attention_bias"},
}


@pytest.mark.parametrize(("name", "signal"), [(name, signal) for name, found in CARRIED.items() for signal in found])
def test_a_vector_becomes_a_bias_through_the_switch_of_the_config(name: str, signal: str, tmp_path: Path) -> None:
    model = pb.load(twin(name))
    config = copy.deepcopy(model.hf.config.to_dict())
    before = copy.deepcopy(model.hf.state_dict())
    knob = Knob("steer", [pb.add(Port(signal, 1), noise(32))], 1.5)
    written = knob.export(model, tmp_path / "out")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = pb.run(model, IDS, edits=[knob]).logits
    with torch.no_grad():
        assert close(hf(IDS).logits, expected, noise=4 * NOISE)
    assert not close(expected, pb.run(model, IDS).logits)
    switch = CARRIED[name][signal]
    assert getattr(hf.config, switch) is True
    assert json.loads((tmp_path / "out" / "patchbay.json").read_text())["switched"] == [switch]
    new = {
        key: weight for key, weight in load_file(tmp_path / "out" / "model.safetensors").items() if key not in before
    }
    assert all(key.endswith(".bias") for key in new)
    assert sum(bool(bias.any()) for bias in new.values()) == 1  # the others are 0
    assert len(written.changed) == 1
    assert model.hf.config.to_dict() == config  # the lent one stays as it was
    assert all(torch.equal(before[key], value) for key, value in model.hf.state_dict().items())
    assert set(before) == set(model.hf.state_dict())


def test_heads_set_to_their_mean_and_neurons_to_a_number(tmp_path: Path) -> None:
    """Two switches at once, one of them asked twice."""
    model = pb.load(twin("llama"))
    edits = [pb.mean(model.layers[0].heads[1].z, noise(8)), pb.replace(model.layers[1].mlp.neurons[3].act, 1.5)]
    edits.append(pb.mean(model.layers[1].heads[2].z, noise(8, seed=3)))
    knob = Knob("set", edits, 0.5)
    knob.export(model, tmp_path / "out")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert close(hf(IDS).logits, pb.run(model, IDS, edits=[knob]).logits, noise=4 * NOISE)
    assert json.loads((tmp_path / "out" / "patchbay.json").read_text())["switched"] == ["attention_bias", "mlp_bias"]


def test_in_half_precision_the_bias_is_the_vector_rounded(tmp_path: Path) -> None:
    model = pb.load(twin("llama").to(torch.bfloat16))
    vector = noise(32)
    Knob("steer", [pb.add(Port("resid_out", 0), vector)], 1.0).export(model, tmp_path / "out")
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(held["model.layers.0.mlp.down_proj.bias"], vector.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("name", "signal", "module"),
    [
        ("mistral", "resid_out", "mlp.down_proj"),
        ("qwen2", "resid_mid", "self_attn.o_proj"),
        ("qwen3", "resid_out", "mlp.down_proj"),
        ("mixtral", "resid_out", "experts"),
        ("gemma2", "resid_out", "post_feedforward_layernorm"),
    ],
)
def test_where_no_switch_gives_a_bias_it_is_said(name: str, signal: str, module: str, tmp_path: Path) -> None:
    model = pb.load(twin(name))
    knob = Knob("steer", [pb.add(Port(signal, 1), noise(32))], 1.0)
    with pytest.raises(pb.PatchbayError, match=r"not foldable .*add\(L1\.") as refused:
        knob.export(model, tmp_path / "none")
    assert module.split(".")[-1] in str(refused.value)
    if name != "mixtral":
        assert "form='vector' or 'gguf' keeps it a vector" in str(refused.value)
    assert not (tmp_path / "none").exists()
    knob.export(model, tmp_path / "vector", form="vector")
    with pytest.raises(pb.PatchbayError, match="form='checkpoint' can"):
        Knob("steer", [pb.add(Port("resid_out", 1), noise(32))], 1.0).export(
            pb.load(twin("llama")), tmp_path / "l", form="lora"
        )


def test_a_switch_that_changes_anything_else_is_not_turned() -> None:
    hf = twin("llama")
    assert give_bias(hf, "model.layers.0.input_layernorm") is None
    assert give_bias(hf, "lm_head") is None
    assert not [name for name, _ in hf.named_parameters() if name.endswith(".bias")]
    assert give_bias(hf, "model.layers.1.mlp.down_proj") == "mlp_bias"
    assert hf.config.mlp_bias is True
    assert all(not bias.any() for name, bias in hf.named_parameters() if name.endswith(".bias"))

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

"""What a Result records of the model beside its weights: adapters, quantisation, the chat template; and that it prints them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig

import patchbay as pb
from patchbay.draw.screen import model_lines
from patchbay.model.cards import model_card
from patchbay.model.carried import carried, quantisation
from patchbay.tiny.twins import twin
from tests.model.test_adapters import adapted
from tests.model.test_stored import eight
from tests.model.test_text import ASKED, TEMPLATE, model_with, tokenizer_with

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def made(model: pb.Model, prompts: Any = ((5, 6, 7, 5, 6),)) -> pb.Result:
    return pb.find.induction_heads(model, [list(prompt) for prompt in prompts])


def test_adapters_are_recorded_while_they_act_and_told_apart_by_their_numbers() -> None:
    peft = adapted()
    model = pb.load(peft)
    on = made(model)
    (one,) = on.provenance["model"]["adapters"]
    assert (one["name"], one["merged"], len(one["sha256"])) == ("default", False, 16)
    assert f"adapter default ({one['sha256'][:8]})" in str(on)
    with peft.disable_adapter():
        off = made(model)
        assert any("adapters was" in note for note in pb.replay(on, model).notes)
    assert "adapters" not in off.provenance["model"]
    assert any("adapters was None" in note for note in pb.replay(off, model).notes)
    assert off.provenance["model"]["fingerprint"] != on.provenance["model"]["fingerprint"]
    assert made(model).provenance["model"] == on.provenance["model"]
    layer = peft.get_base_model().model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] += 1
    assert carried(model.hf)["adapters"][0]["sha256"] != one["sha256"]
    moved, before = carried(model.hf)["adapters"][0]["sha256"], model.fingerprint
    layer.scaling["default"] *= 2  # a factor is no number of the state
    assert carried(model.hf)["adapters"][0]["sha256"] != moved
    assert model.fingerprint != before
    peft.merge_adapter()
    assert carried(model.hf)["adapters"][0]["merged"]
    assert "merged" in " ".join(map(str, model_lines(model_card(model))))


def test_the_folder_of_an_adapter_is_recorded(tmp_path: Any) -> None:
    twin("llama").save_pretrained(tmp_path / "base")
    peft = adapted()
    peft.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    peft.save_pretrained(tmp_path / "style")
    result = made(pb.load(tmp_path / "style"))
    (one,) = result.provenance["model"]["adapters"]
    assert one["folder"] == str(tmp_path / "style")
    assert f"adapter default of {tmp_path / 'style'}" in result.origin()


@pytest.mark.parametrize(
    ("settings", "right"),
    [
        (BitsAndBytesConfig(load_in_4bit=True), {"method": "bitsandbytes", "bits": 4, "format": "float"}),
        (BitsAndBytesConfig(load_in_8bit=True), {"method": "bitsandbytes", "bits": 8}),
        ({"quant_method": "gptq", "bits": 3}, {"method": "gptq", "bits": 3}),
        ({"quant_method": "mxfp4"}, {"method": "mxfp4", "bits": 4, "format": "float"}),
        ({"quant_method": "gguf"}, {"method": "gguf"}),
    ],
    ids=["nf4", "int8", "gptq", "mxfp4", "gguf"],
)
def test_quantisation_by_the_models_settings(settings: Any, right: dict[str, Any]) -> None:
    assert quantisation(SimpleNamespace(config=SimpleNamespace(quantization_config=settings))) == right  # type: ignore[arg-type]


def test_quantisation_by_what_layers_hold_and_in_print() -> None:
    result = made(pb.load(eight()))
    assert result.provenance["model"]["quantisation"] == {"method": "Eight", "bits": 8}
    assert "Eight, 8 bits" in result.origin()
    assert "quantisation" not in made(pb.load(twin("llama").to(torch.bfloat16))).provenance["model"]


def test_prompts_that_are_chats_record_their_template() -> None:
    model = model_with()
    chat, text = pb.find.induction_heads(model, [ASKED]), pb.find.induction_heads(model, ["the sky is the sky"])
    assert len(chat.provenance["chat_template_sha256"]) == 16
    assert "chat_template_sha256" not in text.provenance
    assert f"chat template {chat.provenance['chat_template_sha256']}" in chat.origin()
    other = pb.load(twin("llama"), tokenizer_with(template=TEMPLATE + "{# another #}"))
    assert any("chat template was" in note for note in pb.replay(chat, other).notes)
    assert not any("chat template" in note for note in pb.replay(chat, model).notes)


def test_edits_in_force_are_printed() -> None:
    model = pb.load(twin("llama"))
    with model.edited(pb.zero(model.layers[0].heads[1].z)):
        assert "under 1 edit: zero" in made(model).origin()

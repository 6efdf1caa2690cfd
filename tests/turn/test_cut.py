"""turn.cut: a smaller checkpoint computes what zeroing computes, family by family or refused by name; random parts cost more than idle ones."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import patchbay as pb
from tests import given
from tests.shares import by_turns
from tests.tolerance import close

TEXTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17, 18]]
FAMILIES = ("mistral", "qwen2", "qwen3", "gemma", "phi3", "phi", "olmo", "starcoder2", "cohere", "granite", "smollm3", "glm", "glm4", "ernie4_5", "nemotron", "mixtral", "gpt_oss")  # fmt: skip
REFUSED = ("gpt_neox", "opt", "gpt2", "gptj", "bloom", "falcon", "stablelm", "olmo2", "deepseek_v3", "mamba2")


def heads_of(model: pb.Model, group: int = 0) -> list[str]:
    """The heads of one key/value group of every layer, and of models without shared keys, or with one key for all, one head."""
    if model.n_groups(0) == 1:
        return [f"L{i}.H0" for i in range(model.n_layers)]
    each = model.n_heads(0) // model.n_groups(0)
    return [f"L{i}.H{group * each + head}" for i in range(model.n_layers) for head in range(each)]


@pytest.mark.parametrize("name", by_turns(FAMILIES, of=6))
def test_what_is_left_is_the_model_with_the_parts_at_0(name: str, tmp_path: Path) -> None:
    model = given.lent(name)
    parts = heads_of(model)
    if "mlp.act" in model.signals(0):
        parts += [f"L{i}.N{n}" for i in range(model.n_layers) for n in (1, 4)]
    found = pb.turn.cut(model, parts, TEXTS, folder=str(tmp_path / "small"), draws=1)  # type: ignore[arg-type]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    zeroed = pb.run(model, TEXTS[:1], edits=[pb.zero(model.part(part).port()) for part in parts])
    with torch.no_grad():
        assert close(loaded(torch.tensor(TEXTS[:1])).logits, zeroed.logits)
    before, after = found["parameters"].tolist()
    assert after < before
    assert after == sum(p.numel() for p in loaded.parameters())


def test_reference() -> None:
    """A Llama whose heads no longer divide its width: the slices by hand, in Hugging Face's Mistral, and the loss by hand."""
    hf: Any = given.llama(0)
    model = pb.load(hf)
    found = pb.turn.cut(model, ["L0.H0", "L0.H2", "L1.H1", "L1.H3", "L0.N3", "L1.N7"], TEXTS, draws=1)  # type: ignore[arg-type]
    with torch.no_grad():
        for layer, heads, neuron in ((0, (0, 2), 3), (1, (1, 3), 7)):
            for head in heads:
                hf.model.layers[layer].self_attn.o_proj.weight[:, head * 8 : head * 8 + 8] = 0.0
            hf.model.layers[layer].mlp.down_proj.weight[:, neuron] = 0.0
        losses = []
        for ids in TEXTS:
            said = hf(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            losses.append(-sum(float(said[i, token]) for i, token in enumerate(ids[1:])) / (len(ids) - 1))
    assert close(float(found["loss"][1]), sum(losses) / 3, of=1.0)
    assert float(found["difference"]) < 1e-4
    size = 2 * (2 * 2 * 8 * 32 + 3 * 32)  # of two layers: q and o of two heads, and three vectors of a neuron
    assert float(found["parameters"][0] - found["parameters"][1]) == size


def idle() -> pb.Model:
    """A Mistral twin whose second group of heads and whose neurons 0 to 9 write nothing."""
    model = given.lent("mistral")
    hf: Any = copy.deepcopy(model.hf)
    each, width = model.n_heads(0) // model.n_groups(0), model.d_head(0)
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.self_attn.o_proj.weight[:, each * width : 2 * each * width] = 0.0
            layer.mlp.down_proj.weight[:, :10] = 0.0
            layer.self_attn.o_proj.weight *= 6.0
            layer.mlp.down_proj.weight *= 6.0
    return pb.load(hf)


def test_planted() -> None:
    """Parts that write nothing are cut for nothing: no loss, below every draw of random ones that differs."""
    model = idle()
    parts = heads_of(model, 1) + [f"L{i}.N{n}" for i in range(model.n_layers) for n in range(10)]
    texts = model.generate(TEXTS, 8)  # what it says itself, so that a change costs
    found = pb.turn.cut(model, parts, texts, draws=20)  # type: ignore[arg-type]
    assert close(float(found["loss"][0]), float(found["loss"][1]), of=1.0)
    assert float(found["p"]) < 0.05
    assert float(found["random"].min()) > float(found["loss"][1])


def test_null() -> None:
    """Parts drawn at random cost what random ones cost."""
    model = given.lent("mistral")
    parts = [f"L{i}.N{n}" for i in range(model.n_layers) for n in (2, 11, 17)]
    assert float(pb.turn.cut(model, parts, TEXTS, draws=20)["p"]) > 0.05  # type: ignore[arg-type]


@pytest.mark.parametrize("name", by_turns(REFUSED, of=3))
def test_an_architecture_without_such_a_size_is_refused_by_name(name: str) -> None:
    model = given.lent(name)
    parts = [f"L{i}.H0" for i in range(model.n_layers)] if name == "mamba2" else heads_of(model)
    with pytest.raises(pb.PatchbayError, match=f"{model.config.model_type}|{model.family.name}|this {name}"):
        pb.turn.cut(model, parts, TEXTS, draws=1)  # type: ignore[arg-type]


def test_a_small_model_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("patchbay.turn.cut")
    made = module._small

    def off(model: pb.Model, plan: Any) -> Any:
        small = made(model, plan)
        with torch.no_grad():
            small.lm_head.weight *= 1.01
        return small

    monkeypatch.setattr(module, "_small", off)
    model = given.lent("mistral")
    with pytest.raises(pb.PatchbayError, match="computes something else than this model .*logits differ by"):
        pb.turn.cut(model, heads_of(model), TEXTS, draws=1)  # type: ignore[arg-type]


def test_what_is_refused(tmp_path: Path) -> None:
    model = given.lent("mistral")
    every = heads_of(model, 0) + heads_of(model, 1)
    for parts, says in (
        (["L0.H0"], "give as many of each"),
        (["L0.mlp"], "cut are heads and neurons"),
        ([], "no parts to cut"),
        (every, "nothing would be left"),
    ):
        with pytest.raises(pb.PatchbayError, match=says):
            pb.turn.cut(model, parts, TEXTS)  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="whole groups, or as many of each"):
        pb.turn.cut(model, ["L0.H0", "L1.H0"], TEXTS)  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="is already there"):
        pb.turn.cut(model, heads_of(model), TEXTS, folder=str(tmp_path))  # type: ignore[arg-type]

"""Neuron importance: AMP's number as loops, its algebra, the true loss of leaving a neuron out, and nothing where nothing fires."""

from __future__ import annotations

import copy

import pytest
import torch

import patchbay as pb
from patchbay.find.neuron_importance import neuron_importance
from patchbay.tiny import planted, twins
from tests.tolerance import close

TEXTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17, 18]]


def test_planted() -> None:
    """The neurons that decide a relation cost most and write most; by activity alone, noise neurons that write little lead."""
    built = planted.relation_neuron(seed=0, d_mlp=32)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    texts = [prompt + answer for prompt, answer in zip(truth["prompts"], truth["answers"], strict=True)]
    result = neuron_importance(model, texts, exact=64)
    rows = result.table()
    for name in ("loss_increase", "output"):
        leading = sorted(rows, key=lambda row: -row[name])[:2]
        assert {str(row["part"]) for row in leading} == set(truth["neurons"].values()), name
    assert result["spearman_output"] != result["spearman"]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_reference(name: str) -> None:
    """AMP: mean |input of the down projection|, and the loss with the neuron's weights zeroed, on Hugging Face's modules."""
    hf = twins.twin(name)
    result = neuron_importance(pb.load(hf), TEXTS, exact=12, batch_size=2)
    blocks = hf.transformer.h if name == "gpt2" else hf.model.layers
    downs = [b.mlp.c_proj if name == "gpt2" else b.mlp.down_proj for b in blocks]
    n = downs[0].weight.shape[0 if name == "gpt2" else 1]
    expected = torch.zeros(2, n)
    for ids in TEXTS:
        seen: list[torch.Tensor] = []
        hooks = [p.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0])) for p in downs]
        with torch.no_grad():
            hf(torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
        for layer, act in enumerate(seen):
            for position in range(len(ids)):
                expected[layer] += act[position].abs() / len(ids) / len(TEXTS)
    assert close(result.values.float(), expected)
    lengths = torch.stack([(d.weight if name == "gpt2" else d.weight.T).detach().norm(dim=1) for d in downs])
    assert close(result["output"].float(), expected * lengths)

    def loss(model: torch.nn.Module) -> float:
        with torch.no_grad():
            return sum(float(model(torch.tensor([x]), labels=torch.tensor([x])).loss) for x in TEXTS) / len(TEXTS)

    base = loss(hf)
    for layer, neuron in result["loss_increase"].isfinite().nonzero().tolist()[::5]:
        cut = copy.deepcopy(hf)
        block = (cut.transformer.h if name == "gpt2" else cut.model.layers)[layer]
        with torch.no_grad():
            if name == "gpt2":
                block.mlp.c_proj.weight[neuron] = 0.0
            else:
                block.mlp.down_proj.weight[:, neuron] = 0.0
        assert close(result["loss_increase"][layer, neuron], loss(cut) - base, of=base)


def test_only_as_many_neurons_are_left_out_as_asked() -> None:
    result = neuron_importance(pb.load(twins.twin("gpt2")), TEXTS, exact=7, seed=3)
    assert int(result["loss_increase"].isfinite().sum()) == 7
    assert "over 7 parts" in result.notes[0]


def test_null() -> None:
    """Neurons that never fire have importance 0, cost nothing, and leave no correlation to print."""
    hf = twins.twin("llama")
    with torch.no_grad():
        for block in hf.model.layers:
            block.mlp.up_proj.weight.zero_()
    result = neuron_importance(pb.load(hf), TEXTS, exact=10)
    assert (result.values == 0.0).all()
    assert close(result["loss_increase"].nan_to_num(0.0), 0.0, of=1.0)
    assert result["spearman"].isnan()


def test_bad_input() -> None:
    with pytest.raises(pb.PatchbayError, match="prompt 0 has one token"):
        neuron_importance(pb.load(twins.twin("gpt2")), [[7]])
    with pytest.raises(pb.PatchbayError, match="moe model has them; its neurons are inside fused experts"):
        neuron_importance(pb.load(twins.twin("mixtral")), TEXTS)

"""Direct logit attribution: sums to the logit difference on every family, equals plain loops, finds the planted writer."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.tiny import planted, twins
from tests.given import lent
from tests.shares import by_turns
from tests.tolerance import close

CONFIGS: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 2.0},
    "vaultgemma": {"final_logit_softcapping": 2.0},
}


@functools.cache
def twin(name: str) -> pb.Model:
    return pb.load(twins.twin(name, **CONFIGS[name])) if name in CONFIGS else lent(name)


def task_for(model: pb.Model, n: int = 5) -> pb.Task:
    return pb.tasks.repeated_tokens(model, n, max_period=6, max_offset=4)


@pytest.mark.parametrize("name", by_turns(twins.FAMILY_CONFIGS, of=4))
def test_the_parts_sum_to_the_models_own_logit_difference(name: str) -> None:
    model = twin(name)
    task = task_for(model)
    result = pb.find.direct_logit_attribution(model, task, part="layer" if "mamba" in name else "head")
    expected = []
    for ids, right, wrong in zip(task.clean, task.right, task.wrong, strict=True):
        with torch.no_grad():
            logits = model.hf(torch.tensor([ids])).logits[0, -1].double()
        expected.append(logits[right] - logits[list(wrong)].mean())
    assert close(result["total"], torch.stack(expected).mean(), of=1.0)
    assert result["sum_error"] < 1e-4
    layers = result["mlp"].sum() + result["attn_bias"].sum()
    layers = result.values.sum() if "mamba" in name else layers + result.values.nansum()
    assert close(layers + result["embed"] + result["bias"], result["total"], of=1.0)
    assert result.values.nan_to_num().abs().max() > 1e-3


def dot(x: Tensor, weight: Tensor, read: Tensor, *, centred: bool, eps: float) -> Tensor:
    """Every write's share, the norm frozen at the stream x: the formula of the paper, written out."""

    def share(write: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        centre, mean = (x.mean(), write.mean()) if centred else (0.0, 0.0)
        scale = ((x - centre) ** 2).mean().add(eps).sqrt()
        for i in range(len(write)):
            total += (write[i] - mean) / scale * weight[i] * read[i]
        return total

    return share


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_reference(name: str) -> None:
    """z = A v by hand from Hugging Face's attentions and hidden states; W_O by slices; the final norm written out."""
    model = twin(name)
    hf = model.hf
    task = task_for(model, 3)
    result = pb.find.direct_logit_attribution(model, task)
    hf.set_attn_implementation("eager")
    blocks, final = (hf.transformer.h, hf.transformer.ln_f) if name == "gpt2" else (hf.model.layers, hf.model.norm)
    expected = torch.zeros(len(blocks), 4, dtype=torch.float64)
    for ids, right, wrong in zip(task.clean, task.right, task.wrong, strict=True):
        seen = []
        hook = final.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0, -1].double()))
        with torch.no_grad():
            out = hf(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
        hook.remove()
        u = (hf.lm_head.weight[right] - hf.lm_head.weight[list(wrong)].mean(0)).double()
        eps = 1e-5 if name == "gpt2" else hf.config.rms_norm_eps
        share = dot(seen[0], final.weight.double(), u, centred=name == "gpt2", eps=eps)
        for i, block in enumerate(blocks):
            with torch.no_grad():
                if name == "gpt2":
                    values = block.attn.c_attn(block.ln_1(out.hidden_states[i]))[0, :, 64:]
                    w_o, d, group = block.attn.c_proj.weight, 8, 1
                else:
                    values = block.self_attn.v_proj(block.input_layernorm(out.hidden_states[i]))[0]
                    w_o, d, group = block.self_attn.o_proj.weight.T, 8, 2
            for head in range(4):
                v = values[:, head // group * d : head // group * d + d].double()
                z = out.attentions[i][0, head, -1].double() @ v
                expected[i, head] += share(z @ w_o[head * d : head * d + d].double()).detach() / len(task)
    hf.set_attn_implementation("sdpa")
    assert close(result.values, expected)


@pytest.mark.parametrize("form", ["gpt2", "llama"])
@pytest.mark.parametrize("seed", [0, 3])
def test_planted(form: Any, seed: int) -> None:
    """The head that writes the answer has its closed-form logit; the head before it writes nothing towards it."""
    built = planted.induction(form=form, seed=seed)
    model = pb.load(built.model, built.tokenizer)
    result = pb.find.direct_logit_attribution(model, pb.tasks.repeated_tokens(model, 10, seed=seed))
    assert str(result.top(1)[0]) == built.truth["induction"]
    best, second = result.table(2)
    assert best["value"] == pytest.approx(built.truth["logit"], rel=0.05)
    assert abs(second["value"]) < 0.05 * best["value"]
    assert result.unit == "logits"


def test_planted_neuron_and_expert() -> None:
    built = planted.relation_neuron(seed=1)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    task = pb.Task.from_prompts(model, truth["prompts"], truth["answers"], truth["wrong"])
    for relation, neuron in truth["neurons"].items():
        some = task[[i for i, prompt in enumerate(truth["prompts"]) if prompt.endswith(relation)]]
        assert str(pb.find.direct_logit_attribution(model, some, part="neuron").top(1)[0]) == neuron
    built = planted.routed_expert(seed=1)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    task = pb.Task.from_prompts(model, truth["prompts"], truth["answers"], metric="log_probability")
    result = pb.find.direct_logit_attribution(model, task, part="expert")
    assert str(result.top(1)[0]) == truth["expert"]
    assert close(result.values.sum(1), result["mlp"])


def test_null() -> None:
    """On a random model no head stands out: every one lies within what prompts differ by."""
    built = planted.null(seed=2)
    model = pb.load(built.model, built.tokenizer)
    result = pb.find.direct_logit_attribution(model, pb.tasks.repeated_tokens(model, 40))
    assert result.values.abs().max() < 0.1
    assert (result.values.abs() > 4 * result["standard_error"]).sum() == 0


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mixtral"])
def test_neurons_and_experts_sum_to_their_mlp(name: str) -> None:
    hf = copy.deepcopy(twin(name).hf)
    with torch.no_grad():
        for parameter_name, parameter in hf.named_parameters():
            if parameter_name.endswith("mlp.c_proj.bias"):  # the bias of the down projection is no neuron's
                parameter.zero_()
    model = pb.load(hf)
    result = pb.find.direct_logit_attribution(model, task_for(model), part="expert" if name == "mixtral" else "neuron")
    assert close(result.values.sum(1), result["mlp"])
    assert result["mlp"].abs().min() > 1e-3


def test_without_wrong_answers_the_vocabularys_mean_stands_in() -> None:
    model = twin("gemma2")
    task = task_for(model)
    bare = pb.Task("own", task.clean, task.right, metric="log_probability")
    result = pb.find.direct_logit_attribution(model, bare)
    logits = pb.run(model, task).last_logits.double()
    others = [torch.cat([row[:r], row[r:]]).mean() for row, r in zip(logits, task.right, strict=True)]
    expected = torch.stack([row[r] - o for row, r, o in zip(logits, task.right, others, strict=True)]).mean()
    assert close(result["total"], float(expected), of=1.0)
    assert result["sum_error"] < 1e-4


def test_errors_name_what_is_possible() -> None:
    with pytest.raises(pb.PatchbayError, match="possible are head, neuron, expert, layer"):
        pb.find.direct_logit_attribution(twin("gpt2"), task_for(twin("gpt2")), part="heads")  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match=r"experts\.out; possible are head, neuron, layer"):
        pb.find.direct_logit_attribution(twin("gpt2"), task_for(twin("gpt2")), part="expert")
    with pytest.raises(pb.PatchbayError, match=r"mamba.*possible are layer"):
        pb.find.direct_logit_attribution(twin("mamba2"), task_for(twin("mamba2")))

"""Observable propagation: equal to autograd of a frozen-attention forward, planted directions and paths, nothing in noise."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import patchbay as pb
from patchbay.find._propagation import Norm
from patchbay.find.observable_propagation import observable_propagation
from patchbay.tiny import planted, twins
from tests.tolerance import close


def task_for(model: pb.Model, n: int = 4) -> pb.Task:
    return pb.tasks.repeated_tokens(model, n, max_period=6, max_offset=4)


def marked(form: Any, seed: int) -> tuple[pb.Model, pb.Task, Any]:
    """The planted copy head, and prompts whose marked word is to be said, against another marked word."""
    built = planted.copy(form=form, seed=seed)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    answers = list(truth["answers"])
    return model, pb.Task.from_prompts(model, truth["prompts"], answers, [*answers[1:], answers[0]]), truth


@pytest.mark.parametrize("form", ["gpt2", "llama"])
@pytest.mark.parametrize("seed", [0, 1])
def test_planted(form: Any, seed: int) -> None:
    """The copy head's feature for "a minus b" is the code of a minus that of b, and its score the closed form."""
    model, task, truth = marked(form, seed)
    result = observable_propagation(model, task, norm="scale")
    best, second = result.table(2)
    assert str(best["part"]) == truth["copy"]
    assert best["value"] == pytest.approx(truth["logit"], rel=0.02)
    assert best["p_adjusted"] <= 0.05
    assert abs(second["value"]) < 0.02 * best["value"]
    a, b = truth["marked_ids"][:2]
    fixed = observable_propagation(model, task[:1], observable={a: 1.0, b: -1.0}, norm="scale")
    part = result.top(1)[0]
    wanted = model.unembed.weight[a] - model.unembed.weight[b]  # the word codes, times one number
    assert torch.nn.functional.cosine_similarity(fixed["vector"][part.layer, part.index], wanted.double(), dim=0) > 0.99


def test_projecting_the_feature_out_takes_the_observable_away() -> None:
    model, task, truth = marked("gpt2", 0)
    a, b = truth["marked_ids"][:2]
    result = observable_propagation(model, task[:1], observable={a: 1.0, b: -1.0}, norm="scale")
    assert result["before"] > 8.0
    assert abs(result["projected"]) < 0.1 * result["before"]
    assert result["projected_random"] > 0.8 * result["before"]
    turned = observable_propagation(model, task[:1], observable={a: -1.0, b: 1.0}, norm="scale")
    assert close(turned["projected"], -result["projected"], of=result["before"])  # the same head, whichever its sign


def test_a_path_through_the_planted_mover_leads_to_no_other_head() -> None:
    """In the inhibition model the mover reads the names themselves: heads before it write nothing that its values read."""
    built = planted.inhibition(seed=0)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    task = pb.Task.from_prompts(model, truth["prompts"][:4], truth["answers"][:4], truth["wrong"][:4])
    direct = observable_propagation(model, task, norm="scale")
    assert str(direct.top(1)[0]) == truth["mover"]
    through = observable_propagation(model, task, path=[truth["mover"]], norm="scale")
    assert through.values[3].isnan().all()
    assert through.values.nan_to_num(0.0).abs().max() < 0.05 * float(direct.values.max())


@pytest.mark.parametrize("d", [8, 32, 128])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_norms_gradient_is_autograds_and_turns_less_than_the_bound(d: int, norm: type[nn.Module]) -> None:
    generator = torch.Generator().manual_seed(0)
    module = norm(d, eps=1e-5, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(1.0 + torch.rand(d, generator=generator, dtype=torch.float64))
    x = torch.randn(200, d, generator=generator, dtype=torch.float64) * 3 + 1
    y = torch.randn(200, d, generator=generator, dtype=torch.float64)
    leaf = x.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad((module(leaf) * y).sum(), leaf)
    exact = Norm(module, x, True).back(y)
    assert close(exact, expected, dtype=torch.float64)
    with torch.no_grad():
        module.weight.fill_(1.0)
    turned = torch.nn.functional.cosine_similarity(Norm(module, x, True).back(y), y, dim=1).clamp(-1, 1).acos().mean()
    assert turned < 2 * math.acos(math.sqrt(1 - 1 / (d - 1)))
    assert turned > 0.5 / math.sqrt(d)


# --- the oracle: the same path as a function, differentiated ----------------------------------------------


def pieces(name: str, hf: Any) -> Any:
    """For GPT-2 and Llama: blocks, final norm, and per block the norms, value map, output map (row vectors) and MLP."""
    if name == "gpt2":
        parts = [
            (b.ln_1, b.attn.c_attn.weight[:, 64:], b.attn.c_attn.bias[64:], b.attn.c_proj.weight, b.ln_2, b.mlp, 1)
            for b in hf.transformer.h
        ]
        return parts, hf.transformer.ln_f
    parts = [
        (
            b.input_layernorm,
            b.self_attn.v_proj.weight.T,
            torch.zeros(16),
            b.self_attn.o_proj.weight.T,
            b.post_attention_layernorm,
            b.mlp,
            2,
        )
        for b in hf.model.layers
    ]
    return parts, hf.model.norm


class Frozen:
    """One prompt's run of a Hugging Face model: attention patterns and all streams, written out by hand."""

    def __init__(self, name: str, hf: Any, ids: list[int]) -> None:
        self.parts, self.final = pieces(name, hf)
        self.head = hf.lm_head
        hf.set_attn_implementation("eager")
        with torch.no_grad():
            out = hf(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
        hf.set_attn_implementation("sdpa")
        self.patterns = [a[0] for a in out.attentions]
        self.streams = [h[0] for h in out.hidden_states[:-1]]
        with torch.no_grad():  # hidden_states ends with the normed stream: make the last one by hand
            self.middles = [x + self.attention(i, x) for i, x in enumerate(self.streams)]
            self.streams.append(self.middles[-1] + self.mlp(len(self.parts) - 1, self.middles[-1]))
        if name == "gpt2":
            bias = [b.attn.c_proj.bias for b in hf.transformer.h]
            with torch.no_grad():
                self.middles = [m + b for m, b in zip(self.middles, bias, strict=True)]
                self.streams[-1] = self.middles[-1] + self.mlp(len(self.parts) - 1, self.middles[-1])

    def z(self, layer: int, head: int, x: Tensor) -> Tensor:
        norm, w_v, b_v, _, _, _, group = self.parts[layer]
        place = slice(head // group * 8, head // group * 8 + 8)
        return self.patterns[layer][head] @ (norm(x) @ w_v[:, place] + b_v[place])

    def out(self, layer: int, head: int, z: Tensor) -> Tensor:
        return z @ self.parts[layer][3][8 * head : 8 * head + 8]

    def attention(self, layer: int, x: Tensor) -> Tensor:
        return sum((self.out(layer, h, self.z(layer, h, x)) for h in range(4)), torch.zeros(()))

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        _, _, _, _, norm, mlp, _ = self.parts[layer]
        return mlp(norm(x)[None])[0]

    def observable(self, path: list[tuple[int, int | None]], change: Tensor, weights: dict[int, float]) -> Tensor:
        """n . logits when the stream that the path's last part reads is changed, the change going on along the path alone."""
        for layer, head in reversed(path):
            if head is None:
                base = self.middles[layer]
                change = self.mlp(layer, base + change) - self.mlp(layer, base)
            else:
                base = self.streams[layer]
                change = self.out(layer, head, self.z(layer, head, base + change) - self.z(layer, head, base))
        logits = self.head(self.final(self.streams[-1][-1] + change[-1]))
        return sum((weight * logits[token] for token, weight in weights.items()), torch.zeros(()))


PATHS: dict[str, list[tuple[int, int | None]]] = {
    "": [],
    "L1.mlp": [(1, None)],
    "L1.H2": [(1, 2)],
    "L1.mlp,L1.H1": [(1, None), (1, 1)],
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_reference(name: str, path: str) -> None:
    """Score, feature vector and exact effect of every head equal autograd and plain recomputation of the frozen forward."""
    hf = twins.twin(name)
    model = pb.load(hf)
    task = task_for(model, 3)
    task = dataclasses.replace(task, wrong=tuple((*ids, 90) for ids in task.wrong))  # two wrong answers of each prompt
    result = observable_propagation(model, task, path=path.split(",") if path else None, batch_size=2)
    score, effect = (torch.zeros(2, 4, dtype=torch.float64) for _ in range(2))
    vector = torch.zeros(2, 4, 32, dtype=torch.float64)
    for ids, right, wrong in zip(task.clean, task.right, task.wrong, strict=True):
        frozen = Frozen(name, hf, list(ids))
        weights = {right: 1.0} | {token: -1.0 / len(wrong) for token in wrong}
        base = frozen.observable(PATHS[path], torch.zeros(len(ids), 32), weights)
        for layer in range(2):
            for head in range(4):
                x = frozen.streams[layer].clone().requires_grad_(True)
                z = frozen.z(layer, head, x)
                write = frozen.out(layer, head, z)
                told = frozen.observable(PATHS[path], write - write.detach(), weights)
                if path and layer == 1 and path != "L1.mlp":
                    continue
                at_z, at_x = torch.autograd.grad(told, (z, x))
                score[layer, head] += float((at_z * z).sum().detach()) / len(task)
                vector[layer, head] += at_x.sum(0) / len(task)
                with torch.no_grad():
                    without = frozen.observable(PATHS[path], -write, weights)
                effect[layer, head] += float((base - without).detach()) / len(task)
    for found, expected in ((result.values, score), (result["effect"], effect), (result["vector"], vector)):
        assert close(found.nan_to_num(0.0), expected, of=1.0)  # differences of observables
    assert score.abs().max() > 1e-3
    assert result.values.isnan().any() == (path not in ("", "L1.mlp"))


def test_coupling_is_what_one_reading_says_of_another() -> None:
    """E[x . y2 | x . y1 = k] = k C for isotropic x: a draw of many x, and the formula."""
    model = pb.load(twins.twin("gpt2"))
    result = observable_propagation(model, task_for(model))
    y = result["vector"].flatten(0, 1)
    top = int(result.values.abs().flatten().argmax())
    x = torch.randn(200_000, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = x @ y[top]
    for other, coupling in enumerate(result["coupling"].flatten()):
        slope = (one * (x @ y[other])).sum() / (one * one).sum()
        assert float(slope) == pytest.approx(float(coupling), abs=0.02)


def test_with_the_scale_frozen_and_no_path_it_is_direct_logit_attribution() -> None:
    for name in ("llama", "phi", "bloom", "olmo2"):
        model = pb.load(twins.twin(name))
        task = task_for(model)
        ours = observable_propagation(model, task, norm="scale").values
        assert close(ours, pb.find.direct_logit_attribution(model, task).values), name


def test_value_biases_can_be_left_out() -> None:
    """What they add, b_V W_O, is the same at every position; it is read by the gradient of the observable by the last stream."""
    hf = twins.twin("gpt2")
    model = pb.load(hf)
    task = task_for(model, 2)
    every, without = (observable_propagation(model, task, include_bias=yes).values for yes in (True, False))
    expected = torch.zeros(2, 4, dtype=torch.float64)
    for ids, right, wrong in zip(task.clean, task.right, task.wrong, strict=True):
        frozen = Frozen("gpt2", hf, list(ids))
        change = torch.zeros(len(ids), 32, requires_grad=True)
        told = frozen.observable([], change, {right: 1.0} | {token: -1.0 / len(wrong) for token in wrong})
        (read,) = torch.autograd.grad(told, change)
        for layer, (_, _, b_v, w_o, *_) in enumerate(frozen.parts):
            for head in range(4):
                place = slice(8 * head, 8 * head + 8)
                expected[layer, head] += float((b_v[place] @ w_o[place]).detach() @ read[-1]) / len(task)
    assert close(every - without, expected)
    assert expected.abs().max() > 1e-4


def test_null() -> None:
    """In a random model no head writes the answer, and projecting a feature out does what a random direction does."""
    built = planted.null(seed=2)
    model = pb.load(built.model, built.tokenizer)
    result = observable_propagation(model, pb.tasks.repeated_tokens(model, 24))
    assert result.values.abs().max() < 0.1
    assert (result["p_adjusted"] > 0.05).all()
    assert abs(result["projected"] - result["before"]) < 0.2


def test_bad_input() -> None:
    model = pb.load(twins.twin("gpt2"))
    task = task_for(model)
    with pytest.raises(pb.PatchbayError, match="norm='identity'; possible are exact, scale"):
        observable_propagation(model, task, norm="identity")  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="L1.mlp does not come before L1.H0"):
        observable_propagation(model, task, path="L1.H0,L1.mlp")  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="no head comes before L0.H0"):
        observable_propagation(model, task, path="L0.H0")  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="a path is made of heads and MLPs"):
        observable_propagation(model, task, path="L0.N3")  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="token id 96; ids are 0..95"):
        observable_propagation(model, task, observable={96: 1.0})
    with pytest.raises(pb.PatchbayError, match="compressed latent"):
        observable_propagation(pb.load(twins.twin("deepseek_v3")), task)
    with pytest.raises(pb.PatchbayError, match=r"MLP of layer 1 of this opt model is no module of its own"):
        observable_propagation(pb.load(twins.twin("opt")), task, path="L1.mlp")  # type: ignore[arg-type]

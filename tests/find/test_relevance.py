"""find.relevance: it conserves in every family, equals the rules written out backwards, finds the circuit, and nothing in a random model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import patchbay as pb
from patchbay.find import _rules
from patchbay.tiny import planted, twins
from tests.given import chain, lent, pairs
from tests.shared import SHARED
from tests.shares import by_turns
from tests.tolerance import close

STORIES = SHARED / "models" / "stories260K"


@pytest.mark.parametrize("form", ["gpt2", "llama"])
@pytest.mark.parametrize("rule", ["relp", "attnlrp"])
def test_planted(form: Any, rule: Any) -> None:
    """The induction head has the most relevance, and of the tokens the one that it copies."""
    model, truth, task = chain(form, 4)
    heads = pb.find.relevance(model, task, rule=rule, site="head")
    assert str(heads.top(1)[0]) == truth["induction"]
    alone = task[:1]
    copied = list(alone.clean[0]).index(alone.right[0]) - len(alone.clean[0])
    tokens = pb.find.relevance(model, alone, rule=rule)
    assert tokens.coords["position"][int(tokens.values.argmax())] == copied


@torch.no_grad()
def written_out(hf: Any, ids: tuple[int, ...], right: int, wrong: tuple[int, ...]) -> tuple[Tensor, Tensor, float]:
    """RelP of a Llama without biases, by its own formulas, layer by layer backwards: relevance of tokens, of heads, and the score."""
    body, n = hf.model, len(ids)
    out = hf(torch.tensor([list(ids)]), output_hidden_states=True, output_attentions=True)
    h, patterns = [x[0] for x in out.hidden_states[:-1]], [x[0] for x in out.attentions]

    def normed(norm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = norm.weight / (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
        return x * scale, scale

    kept = []
    for layer, x, pattern in zip(body.layers, h, patterns, strict=True):
        attn, mlp = layer.self_attn, layer.mlp
        seen, scale = normed(layer.input_layernorm, x)
        v = attn.v_proj(seen).reshape(n, 2, 8).repeat_interleave(2, 1)  # [position, head, d_head]
        z = torch.einsum("hqk,khd->qhd", pattern, v)
        mid = x + attn.o_proj(z.reshape(n, -1))
        seen2, scale2 = normed(layer.post_attention_layernorm, mid)
        gate, up = mlp.gate_proj(seen2), mlp.up_proj(seen2)
        kept.append((scale, z, pattern, scale2, gate, up, mid + mlp.down_proj(nn.functional.silu(gate) * up)))
    last, scale = normed(body.norm, kept[-1][-1])
    row = hf.lm_head.weight[right] - hf.lm_head.weight[list(wrong)].mean(0)
    g = torch.zeros_like(last)
    g[-1] = row * scale[-1]
    heads = torch.zeros(len(kept), 4)
    for i in reversed(range(len(kept))):
        layer, (scale, z, pattern, scale2, gate, up, _) = body.layers[i], kept[i]
        product = g @ layer.mlp.down_proj.weight  # of act * up
        ratio = torch.sigmoid(gate)
        g_gate, g_up = 0.5 * product * up * ratio, 0.5 * product * gate * ratio
        g = g + (g_gate @ layer.mlp.gate_proj.weight + g_up @ layer.mlp.up_proj.weight) * scale2
        g_z = (g @ layer.self_attn.o_proj.weight).reshape(n, 4, 8)
        heads[i] = (g_z * z).sum((0, 2))
        g_v = torch.einsum("hqk,qhd->khd", pattern, g_z).reshape(n, 2, 2, 8).sum(2).reshape(n, -1)
        g = g + g_v @ layer.self_attn.v_proj.weight * scale
    return (g * h[0]).sum(-1), heads, float(last[-1] @ row)


def test_reference() -> None:
    """The same numbers as the rules written out backwards, with and without the twin."""
    hf = twins.twin("llama", attn_implementation="eager")
    assert hf.config.num_key_value_heads == 2
    model, task = pb.load(hf), pairs()
    found, heads = pb.find.relevance(model, task), pb.find.relevance(model, task, site="head")
    tokens, expected, score = torch.zeros(8), torch.zeros(2, 4), 0.0
    for ids, right, wrong in zip(task.clean, task.right, task.wrong, strict=True):
        one, each, told = written_out(hf, ids, right, wrong)
        tokens, expected, score = tokens + one / 3, expected + each / 3, score + told / 3
    assert close(found.values, tokens)
    assert close(heads.values, expected)
    assert close(float(found["score"]), score)
    assert close(float(found.values.sum()), score)
    against = pb.find.relevance(model, task, site="mlp_out", against="twin")
    own = pb.find.relevance(model, task, site="mlp_out")
    same = pb.Task("same", task.clean, task.right, task.wrong, task.clean)
    assert close(pb.find.relevance(model, same, site="mlp_out", against="twin").values, 0.0, of=own.values)
    assert (against.values - own.values).abs().max() > 0.01


@torch.no_grad()
def unbiased() -> pb.Model:
    """A GPT-2 in double precision without biases, which computes nothing in single precision in between."""
    hf = twins.twin("gpt2").double()
    for name, parameter in hf.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    return pb.load(hf)


def test_without_biases_tokens_sum_to_the_score_in_double_precision() -> None:
    model, task = unbiased(), pairs()
    found = pb.find.relevance(model, task)
    assert torch.equal(found["biases"], torch.zeros((), dtype=torch.float64))
    assert close(float(found.values.sum()), float(found["score"]), dtype=torch.float64)
    assert close(float(found["rest"]), 0.0, of=found.values, dtype=torch.float64)


def test_biases_break_conservation_and_are_told() -> None:
    """In GPT-2 with its biases tokens alone are not the score, by what the biases have: a number of the Result and of its note."""
    found = pb.find.relevance(lent("gpt2"), pairs())
    assert abs(float(found.values.sum() - found["score"])) > 0.1
    assert close(float(found["score"] - found.values.sum()), float(found["biases"]), of=10.0)
    assert "biases" in found.notes[0]


FAMILIES = ["gpt2", "llama", "gemma2", "phi", "mixtral", "gpt_neo", "gptj", "falcon alibi", "mpt", "opt", "mamba2", "qwen3_next", "deepseek_v3", "gpt_oss", "phimoe", "falcon_h1", "glm4", "lfm2_moe"]  # fmt: skip


@pytest.mark.parametrize("family", by_turns(FAMILIES, of=3))
def test_tokens_and_biases_are_the_score(family: str) -> None:
    """In every family, biases counted by themselves; and the model's values are its own under the rules."""
    model, task = lent(family), pairs(2)
    found = pb.find.relevance(model, task, batch_size=2)
    assert close(float(found.values.sum() + found["biases"]), float(found["score"]), of=10.0, noise=256)
    logits = pb.run(model, task).last_logits.double()
    told = [float(row[r] - row[list(w)].mean()) for row, r, w in zip(logits, task.right, task.wrong, strict=True)]
    assert close(float(found["score"]), sum(told) / 2, of=logits)


def test_a_step_that_no_rule_is_for_is_refused() -> None:
    """An activation of a kind of its own, and one that leaves torch's functions."""

    class Cubed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.logcumsumexp(x, -1)

    hf = twins.twin("llama")
    hf.model.layers[0].mlp.act_fn = Cubed()
    with pytest.raises(pb.PatchbayError, match="relevance is not conserved"):
        pb.find.relevance(pb.load(hf), pairs())
    with pytest.raises(pb.PatchbayError, match="bloom: relevance is not conserved"):
        pb.find.relevance(lent("bloom"), pairs())
    text = pb.find.relevance(pb.load("tiny"), "The capital of Lolavia is")
    assert text.tables["tokens"][0]["token"]
    with pytest.raises(pb.PatchbayError, match="needs a task with corrupted twins"):
        pb.find.relevance(pb.load("tiny"), "The capital", against="twin")
    with pytest.raises(pb.PatchbayError, match="no layer of this mamba model has it"):
        pb.find.relevance(lent("mamba2"), pairs(), site="head")


def test_attnlrp_gives_queries_keys_and_values_their_shares() -> None:
    """Fused and step by step, gradients of q and k are a quarter and of v half, through softmax as it is; values are the same."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 4, generator=generator, requires_grad=True) for _ in range(3))
    plain = torch.autograd.grad(((q @ k.mT / 2).softmax(-1) @ v).pow(2).sum(), (q, k, v))
    with _rules.Rules("attnlrp"):
        marked = [_rules.mark(x, {_rules.SIGNAL}) for x in (q, k, v)]
        steps = (marked[0] @ marked[1].mT / 2).softmax(-1) @ marked[2]
        fused = nn.functional.scaled_dot_product_attention(*marked)
    assert close(steps, fused)
    for out in (steps, fused):
        found = torch.autograd.grad(out, (q, k, v), 2 * out.detach(), retain_graph=True)
        for one, own, share in zip(found, plain, (0.25, 0.25, 0.5), strict=True):
            assert close(one, share * own)


def test_a_caller_that_keeps_no_graphs_gets_the_same() -> None:
    model, _, task = chain("gpt2", 4)
    with torch.no_grad():
        found = pb.find.relevance(model, task[:2], site="head")
    assert torch.equal(found.values, pb.find.relevance(model, task[:2], site="head").values)


def test_null() -> None:
    """Random answers of a random model: no head is clear of 0 more often than by chance."""
    model = pb.load(planted.null(seed=3).model)
    found = pb.find.relevance(model, pairs(40, n_wrong=1), site="head")
    apart = (found["low"] > 0) | (found["high"] < 0)
    assert float(apart.double().mean()) < 0.4
    assert found.values.abs().max() < 0.2 * pb.find.relevance(*chain("gpt2", 4)[::2], site="head").values.abs().max()


@pytest.mark.slow
@pytest.mark.skipif(not STORIES.is_dir(), reason=f"needs the shared model {STORIES}")
def test_on_a_small_trained_model_plain_attribution_patching_is_nearer_to_the_truth() -> None:
    """An honest negative: against exact patching of MLP outputs relevance patching correlates less than attribution patching does."""
    model = pb.load(str(STORIES))
    texts = [
        f"Once upon a time, there was a {x} named {n}. {n}"
        for x in ("boy", "girl", "dog", "cat")
        for n in ("Tom", "Sue", "Ben", "Tim")
    ]
    encoded = model.encode(texts)
    same = [ids for ids in encoded if len(ids) == len(encoded[0])]
    half = len(same) // 2
    said = pb.run(model, same[:half]).last_logits
    wrong = [[int(row.topk(2).indices[1])] for row in said]
    task = pb.Task("stories", same[:half], said.argmax(-1).tolist(), wrong, same[half : 2 * half])
    exact = pb.prove.activation_patching(model, task, site="mlp_out", positions="all", way="noising")["effect"]
    plain = pb.prove.attribution_patching(model, task, site="mlp_out", positions="all").values
    ours = pb.find.relevance(model, task, site="mlp_out", against="twin").values
    agree = [float(torch.corrcoef(torch.stack([exact.flatten(), x.flatten()]))[0, 1]) for x in (ours, plain)]
    print(f"relevance {agree[0]:.2f}, attribution patching {agree[1]:.2f}")
    assert agree[0] < agree[1]

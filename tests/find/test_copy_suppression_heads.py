"""Copy suppression: the planted head and its nulls, the formula as loops, nothing in a random model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.find.copy_suppression_heads import copy_suppression_heads
from patchbay.tiny import planted, twins
from patchbay.tiny.planted_suppression import copy_suppression
from tests.tolerance import close


@pytest.mark.parametrize("form", ["gpt2", "llama"])
@pytest.mark.parametrize("seed", [0, 1])
def test_planted(form: Any, seed: int) -> None:
    built = copy_suppression(form=form, seed=seed)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    result = copy_suppression_heads(model, truth["prompts"])
    best, second = result.table(2)
    assert str(best["part"]) == truth["suppression"]
    assert best["value"] > 10 * abs(best["null_mean"])
    assert best["own_lowest"] == 1.0
    assert best["attention"] > 0.6
    assert best["p_adjusted"] <= 0.05
    assert abs(second["value"]) < 0.05
    copies = next(row for row in result.table() if str(row["part"]) == truth["copy"])
    assert copies["own_lowest"] == 0.0  # the head that copies says its own token highest


def test_a_copying_head_is_no_suppressor() -> None:
    """The same place looked at, the opposite said: the induction head comes last, with the other sign."""
    built = planted.induction(seed=0)
    model = pb.load(built.model, built.tokenizer)
    result = copy_suppression_heads(model, built.truth["prompts"])
    assert str(result.bottom(1)[0]) == built.truth["induction"]
    assert result.values.min() < -0.5


def test_reference() -> None:
    """McDougall et al.: the most predicted earlier tokens, and A (v W_O) read by their own logit, as loops on GPT-2's weights."""
    hf = twins.twin("gpt2")
    model = pb.load(hf)
    prompts = [[5, 6, 7, 5, 9, 10, 7, 6, 12], [11, 12, 13, 12, 11], [14, 15, 16, 14, 15, 16, 14]]
    result = copy_suppression_heads(model, prompts, share=0.3, lowest=9, sample=99)
    hf.set_attn_implementation("eager")
    final, unembed = hf.transformer.ln_f, hf.lm_head.weight.detach().double()
    names = ("suppression", "without_first", "attention", "attention_elsewhere", "own_lowest")
    expected = {name: torch.zeros(2, 4, dtype=torch.float64) for name in names}
    for ids in prompts:
        seen: list[torch.Tensor] = []
        hook = final.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0].double()))
        with torch.no_grad():
            out = hf(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
        hook.remove()
        scale = (seen[0].var(dim=1, correction=0) + 1e-5).sqrt()
        for i, block in enumerate(hf.transformer.h):
            with torch.no_grad():
                values = block.attn.c_attn(block.ln_1(out.hidden_states[i]))[0, :, 64:].double()
                lens = final(out.hidden_states[i])[0].double() @ unembed.T  # [query, vocab]
            for head in range(4):
                pattern = out.attentions[i][0, head].double()
                said = []
                for p in range(len(ids)):
                    place = slice(8 * head, 8 * head + 8)
                    write = values[p, place] @ block.attn.c_proj.weight[place].detach().double()
                    said.append(unembed @ (final.weight.detach().double() * (write - write.mean())))
                    lower = int((said[p] <= said[p][ids[p]]).sum()) - 1
                    expected["own_lowest"][i, head] += (lower < 9) / len(ids) / len(prompts)
                others: list[float] = []
                for name, first in (("suppression", 0), ("without_first", 1)):
                    for q in range(first + 1, len(ids)):
                        predicted = sorted((float(lens[q, ids[p]]) for p in range(first, q)), reverse=True)
                        least = predicted[max(1, math.ceil(0.3 * (q - first))) - 1]
                        chosen = [p for p in range(first, q) if float(lens[q, ids[p]]) >= least]
                        if (
                            name == "suppression" and len(chosen) < q
                        ):  # a fair share of what goes to the other earlier ones
                            rest = sum(float(pattern[q, p]) for p in range(q) if p not in chosen)
                            others.append(rest * len(chosen) / (q - len(chosen)))
                        for p in chosen:
                            gives = float(pattern[q, p] * (said[p][ids[p]] - said[p].mean()) / scale[q])
                            expected[name][i, head] -= gives / (len(ids) - 1 - first) / len(prompts)
                            if name == "suppression":
                                expected["attention"][i, head] += float(pattern[q, p]) / (len(ids) - 1) / len(prompts)
                expected["attention_elsewhere"][i, head] += sum(others) / len(others) / len(prompts)
    hf.set_attn_implementation("sdpa")
    for name, value in expected.items():
        assert close(result[name], value), name
    assert expected["own_lowest"].unique().numel() > 1


def test_null() -> None:
    """In a random model no head takes back more than rounding of what a suppressor does, nor says its own token lowest."""
    built = planted.null(seed=1)
    model = pb.load(built.model, built.tokenizer)
    result = copy_suppression_heads(model, pb.tasks.repeated_tokens(model, 20))
    assert (result.values - result["null_mean"]).abs().max() < 0.02  # the planted one: 14
    assert (result["own_lowest"] - 6 / 64).abs().max() < 0.12


def test_bad_input() -> None:
    model = pb.load(twins.twin("gpt2"))
    with pytest.raises(pb.PatchbayError, match="prompt 1 has 2 tokens; 3 or more"):
        copy_suppression_heads(model, [[5, 6, 7], [5, 6]])
    with pytest.raises(pb.PatchbayError, match="0 < share <= 1"):
        copy_suppression_heads(model, [[5, 6, 7]], share=0.0)
    with pytest.raises(pb.PatchbayError, match="mamba model has them"):
        copy_suppression_heads(pb.load(twins.twin("mamba2")), [[5, 6, 7]])
    with pytest.raises(pb.PatchbayError, match=r"qwen3_next.*gate"):
        copy_suppression_heads(pb.load(twins.twin("qwen3_next")), [[5, 6, 7, 8]])


def test_the_null_averages_out_over_prompts() -> None:
    """The places of the null are drawn on from prompt to prompt: of equal prompts each has its own."""
    model = pb.load(twins.twin("gpt2"))
    ids = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    spread = {
        n: torch.stack([copy_suppression_heads(model, [ids] * n, seed=s)["null_mean"] for s in range(8)]).std(0).mean()
        for n in (1, 16)
    }
    assert float(spread[16]) < 0.5 * float(spread[1])

"""Name movers: the planted mover and its closed form, the sum over sources as loops, nothing in a random model."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay import maths
from patchbay.find._movers import Moved
from patchbay.find.name_mover_heads import name_mover_heads
from patchbay.tiny import planted, twins
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.find.name_mover_heads")


def mentioned(form: Any = "gpt2", seed: int = 0) -> tuple[pb.Model, pb.Task, Any]:
    built = planted.inhibition(form=form, seed=seed)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    return model, pb.Task.from_prompts(model, truth["prompts"], truth["answers"], truth["wrong"]), truth


@pytest.mark.parametrize("form", ["gpt2", "llama"])
@pytest.mark.parametrize("seed", [0, 1])
def test_planted(form: Any, seed: int) -> None:
    model, task, truth = mentioned(form, seed)
    result = name_mover_heads(model, task)
    best, second = result.table(2)
    assert str(best["part"]) == truth["mover"]
    assert best["value"] == pytest.approx(truth["logit"], rel=0.02)
    assert best["attention"] == pytest.approx(truth["attention"][truth["mover"]], abs=0.01)
    assert best["copy"] == 1.0
    assert best["p_adjusted"] <= 0.05
    assert second["p_adjusted"] > 0.05
    assert abs(second["value"]) < 0.01 * best["value"]
    assert best["without_first"] == pytest.approx(best["attention"], abs=0.01)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_reference(name: str) -> None:
    """Wang et al.: A[last, p] (v_p W_O), read by right minus wrong behind the frozen final norm, as loops over heads and places."""
    hf = twins.twin(name)
    model = pb.load(hf)
    task = pb.tasks.repeated_tokens(model, 3, max_period=6, max_offset=4)
    result = name_mover_heads(model, task, top=20)
    hf.set_attn_implementation("eager")
    blocks, final = (hf.transformer.h, hf.transformer.ln_f) if name == "gpt2" else (hf.model.layers, hf.model.norm)
    eps = 1e-5 if name == "gpt2" else hf.config.rms_norm_eps
    names = ("moved", "moved_wrong", "elsewhere", "attention", "attention_wrong", "attention_first", "copy")
    expected = {key: torch.zeros(2, 4, dtype=torch.float64) for key in names}
    for ids, right, wrong in zip(task.clean, task.right, task.wrong, strict=True):
        seen: list[torch.Tensor] = []
        hook = final.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0, -1].double()))
        with torch.no_grad():
            out = hf(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
        hook.remove()
        x, gain, unembed = seen[0], final.weight.detach().double(), hf.lm_head.weight.detach().double()
        centred = x - x.mean() if name == "gpt2" else x
        scale = (centred.square().mean() + eps).sqrt()
        for i, block in enumerate(blocks):
            with torch.no_grad():
                if name == "gpt2":
                    values = block.attn.c_attn(block.ln_1(out.hidden_states[i]))[0, :, 64:]
                    w_o, group = block.attn.c_proj.weight.detach().double(), 1
                else:
                    values = block.self_attn.v_proj(block.input_layernorm(out.hidden_states[i]))[0]
                    w_o, group = block.self_attn.o_proj.weight.detach().T.double(), 2
            for head in range(4):
                row = out.attentions[i][0, head, -1].double()
                v = values[:, head // group * 8 : head // group * 8 + 8].double()
                at_right = [p for p, token in enumerate(ids) if token == right]
                others = [p for p in range(1, len(ids)) if ids[p] != right and ids[p] not in wrong]
                for p, token in enumerate(ids):
                    write = v[p] @ w_o[head * 8 : head * 8 + 8]
                    write = write - write.mean() if name == "gpt2" else write
                    said = unembed @ (gain * write)
                    logits = float(row[p] * (said[right] - said[list(wrong)].mean()) / scale) / len(task)
                    where = "moved" if token == right else "moved_wrong" if token in wrong else "elsewhere"
                    if where != "elsewhere":
                        expected[where][i, head] += logits
                        paid = "attention" if where == "moved" else "attention_wrong"
                        expected[paid][i, head] += float(row[p]) / len(task)
                    elif p:
                        expected[where][i, head] += logits * len(at_right) / len(others)
                    if token == right:
                        higher = int((said > said[right]).sum())
                        expected["copy"][i, head] += (higher < 20) / len(at_right) / len(task)
                expected["attention_first"][i, head] += float(row[0]) / len(task)
    hf.set_attn_implementation("sdpa")
    for key, value in expected.items():
        assert close(result[key], value), key
    assert expected["copy"].unique().numel() > 1
    each = [name_mover_heads(model, task[i], top=20) for i in range(3)]
    flipped = maths.sign_flip_p(torch.stack([one["moved"] - one["elsewhere"] for one in each]), floor=1e-6)
    assert close(result["p"], flipped)


def test_null() -> None:
    """In a random model no head moves the answer, and they copy it about as often as chance says."""
    built = planted.null(seed=2)
    model = pb.load(built.model, built.tokenizer)
    result = name_mover_heads(model, pb.tasks.repeated_tokens(model, 40))
    assert result.values.abs().max() < 0.05
    assert (result["p_adjusted"] > 0.05).all()
    assert result["copy"].mean() < 0.25


def test_movers_move_the_answer_more_than_other_places_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of six heads two give more from the answer's place than from others, one less, and one less but still towards it."""
    right = torch.tensor([[2.0, 1.5, -2.0, 0.5, 0.0, 0.0]]).expand(12, 1, 6).double()
    elsewhere = torch.tensor([[0.5, -1.0, -0.5, 1.5, 0.0, 0.0]]).expand(12, 1, 6).double()
    others = torch.zeros(12, 1, 6).double()
    seen = Moved(right, others, elsewhere, others, others, others, others, others)
    monkeypatch.setattr(module, "moved", lambda *given, **more: seen)
    found = name_mover_heads(pb.load(twins.twin("gpt2")), pb.Task("x", [[5, 6]], [5], [[6]]))
    assert found.notes[0].startswith("2 heads move the answer and 1 push it down")


def test_trained_movers_are_found_on_the_indirect_object() -> None:
    model = pb.load("tiny")
    result = name_mover_heads(model, pb.tasks.indirect_object(model, 16))
    assert {str(part) for part in result.top(3)} == {"L1.H0", "L1.H1", "L1.H3"}
    assert min(row["copy"] for row in result.table(3)) > 0.9


def test_prompts_without_their_answer_are_refused() -> None:
    model = pb.load(twins.twin("gpt2"))
    task = pb.Task("own", [(5, 6, 7), (5, 6, 8)], (6, 9), ((7,), (6,)))
    with pytest.raises(pb.PatchbayError, match=r"1 of 2 prompts do not contain their right answer \(first: prompt 1\)"):
        name_mover_heads(model, task)
    with pytest.raises(pb.PatchbayError, match="top=0"):
        name_mover_heads(model, task, top=0)
    with pytest.raises(pb.PatchbayError, match="mamba model has them"):
        name_mover_heads(pb.load(twins.twin("mamba2")), task)

"""Dose and response: the planted switch turns answers over; equals counting by hand; a knob that does nothing shows nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

import patchbay as pb
from patchbay.tiny import planted

STRENGTHS = [-2.0, 0.0, 1.0, 2.0]


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_planted(form: Any) -> None:
    """A neuron that decides between two answers: silent it decides nothing, turned round it decides for the other."""
    built = planted.relation_neuron(form=form, seed=1)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    task = pb.Task.from_prompts(model, truth["prompts"], truth["answers"], truth["wrong"])
    knob = pb.turn.scale(list(truth["neurons"].values()), 1.0, model=model)
    result = pb.measure.dose_response(
        model, task, knob, strengths=STRENGTHS, neutral=[" the door. the cup", " one, two"]
    )
    right, wrong = result["right"].tolist(), result["wrong"].tolist()
    assert (right[2], right[3]) == (1.0, 1.0)
    assert (right[0], wrong[0]) == (0.0, 1.0)
    assert result.values[1].abs() < 1 < result.values[2]
    assert bool((result.values.diff() > 0).all())
    assert result["kl"].max() < 0.05  # texts in which the neurons do not fire
    assert torch.allclose(result["loss"], result["loss_without"].expand(4), atol=0.02)
    assert [str(part) for part in result.highlights] == list(truth["neurons"].values())


def test_reference() -> None:
    """Shares, score, loss and divergence counted by hand from Hugging Face's logits, one prompt and text at a time."""
    built = planted.induction(seed=0)
    model = pb.load(built.model, built.tokenizer)
    task = pb.tasks.repeated_tokens(model, 7)
    texts = [[5, 9, 12, 9], [20, 21, 22, 23, 24, 25, 20, 21], [30, 31]]
    head = model.part(built.truth["induction"])
    knob = pb.turn.scale([head], 0.0)
    result = pb.measure.dose_response(model, task, knob, strengths=[0.0, 0.5, 1.0], neutral=texts, batch_size=2)
    rows = model.hf.transformer.h[head.layer].attn.c_proj.weight.data[head.index * 64 : head.index * 64 + 64]
    before = rows.clone()
    plain = [model.hf(torch.tensor([ids])).logits[0].detach() for ids in texts]
    for step, strength in enumerate((0.0, 0.5, 1.0)):
        rows.copy_(before * strength)  # what the head writes, in its weights
        counts, score = {"right": 0.0, "wrong": 0.0, "other": 0.0}, 0.0
        for ids, right, wrong in zip(task.clean, task.right, task.wrong, strict=True):
            logits = model.hf(torch.tensor([ids])).logits[0, -1].detach()
            said = int(logits.argmax())
            counts["right" if said == right else "wrong" if said in wrong else "other"] += 1 / len(task)
            score += float(logits[right] - logits[list(wrong)].mean()) / len(task)
        loss = kl = 0.0
        for ids, base in zip(texts, plain, strict=True):
            logits = model.hf(torch.tensor([ids])).logits[0].detach()
            loss += float(cross_entropy(logits[:-1], torch.tensor(ids[1:]))) / len(texts)
            p, q = base[:-1].log_softmax(-1), logits[:-1].log_softmax(-1)
            kl += float(kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()) / len(texts)
        rows.copy_(before)
        for name, share in counts.items():
            assert float(result[name][step]) == pytest.approx(share, abs=1e-6)
        assert float(result.values[step]) == pytest.approx(score, abs=1e-4)
        assert float(result["loss"][step]) == pytest.approx(loss, abs=1e-5)
        assert float(result["kl"][step]) == pytest.approx(kl, abs=1e-5)
    assert result["kl"][2] == 0
    assert result["loss"][2] == result["loss_without"]
    assert result.values[2] == result["score_without"]
    assert bool((result["low"] <= result.values).all())
    assert bool((result.values <= result["high"]).all())


def test_null() -> None:
    """A noise neuron of a random model: whatever the strength, the same answers, score within its interval, no harm."""
    built = planted.null(seed=0)
    model = pb.load(built.model, built.tokenizer)
    task = pb.tasks.repeated_tokens(model, 20)
    knob = pb.turn.scale("L0.N3", 1.0)  # type: ignore[arg-type]
    result = pb.measure.dose_response(model, task, knob, strengths=STRENGTHS, neutral=[[5, 6, 7, 8], [9, 10, 11]])
    assert (result["right"].max() - result["right"].min()) <= 0.05
    assert (result.values.max() - result.values.min()) < float((result["high"] - result["low"]).min())
    assert result["kl"].max() < 0.01


def test_without_neutral_texts_it_says_so() -> None:
    built = planted.null(seed=0)
    model = pb.load(built.model, built.tokenizer)
    task = pb.tasks.repeated_tokens(model, 3)
    knob = pb.turn.scale("L0.H0", 0.0)  # type: ignore[arg-type]
    result = pb.measure.dose_response(model, task, knob, strengths=[0.0, 1.0])
    assert "loss" not in result
    assert "not measured" in result.notes[0]
    for metric in ("kl", "probability", "accuracy"):
        other = pb.measure.dose_response(model, task.with_metric(metric), knob, strengths=[1.0])
        assert other.values[0] == other["score_without"]


def test_errors() -> None:
    built = planted.null(seed=0)
    model = pb.load(built.model, built.tokenizer)
    task = pb.tasks.repeated_tokens(model, 3)
    knob = pb.turn.scale("L0.H0", 0.0)  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="each one once"):
        pb.measure.dose_response(model, task, knob, strengths=[1.0, 1.0])
    with pytest.raises(pb.PatchbayError, match="not a finite number"):
        pb.measure.dose_response(model, task, knob, strengths=[1.0, float("inf")])
    with pytest.raises(pb.PatchbayError, match="neutral text 1 has one token"):
        pb.measure.dose_response(model, task, knob, neutral=[[4, 5], [4]])

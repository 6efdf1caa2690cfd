"""Inhibition heads: the planted one, the path to a mover's query as loops and as path patching, nothing in a random model."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.find.inhibition_heads import inhibition_heads
from patchbay.tiny import planted, twins
from patchbay.tiny.planted_vocabulary import CLASSES
from tests.shares import by_turns
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.find.inhibition_heads")


def with_twins(form: Any, seed: int, n: int = 14) -> tuple[pb.Model, pb.Task, Any]:
    """Two names, one of them mentioned again; in the twin the second mention is a third name, so nobody comes twice."""
    built = planted.inhibition(form=form, seed=seed)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    names = list(CLASSES["name"])
    prompts, right, wrong, corrupted = [], [], [], []
    for i in range(n):
        first, second, third = (names[(i + step) % len(names)] for step in (0, 3 + i // len(names), 7))
        twice, once = (first, second) if i % 2 else (second, first)
        prompts.append(f" then{first} and{second} has a. then{twice} gave to")
        corrupted.append(f" then{first} and{second} has a. then{third} gave to")
        right.append(once)
        wrong.append(twice)
    return model, pb.Task.from_prompts(model, prompts, right, wrong, corrupted), truth


@pytest.mark.parametrize(("seed", "form"), by_turns([0, 1], ["gpt2", "llama"], of=2))
def test_planted(form: Any, seed: int) -> None:
    model, task, truth = with_twins(form, seed)
    result = inhibition_heads(model, task, movers=truth["mover"], draws=1)
    best, second = result.table(2)
    assert str(best["part"]) == truth["inhibition"]
    assert best["value"] > 0.5  # the mover goes from one name to both, or to the other
    assert best["value"] > 5 * abs(best["random"])
    assert best["effect"] > 5.0
    assert best["looks_at_wrong"] > 0.9
    assert best["p_adjusted"] <= 0.05
    assert abs(second["value"]) < 0.05
    assert result.values[3].isnan().all()  # at the mover's layer and after it there is no path


def test_the_mover_is_found_and_watched_on_the_other_half() -> None:
    model, task, truth = with_twins("gpt2", 0, n=24)
    result = inhibition_heads(model, task)
    assert [str(part) for part in result.highlights] == [truth["mover"]]
    assert str(result.top(1)[0]) == truth["inhibition"]
    assert "chosen on 12 prompts and watched on the other 12" in result.notes[0]


def test_reference() -> None:
    """Wang et al.: the twin's head output added to the stream, the mover's query read from it, as loops on GPT-2's weights."""
    hf = twins.twin("gpt2")
    model = pb.load(hf)
    task = pb.tasks.repeated_tokens(model, 3, max_period=6, max_offset=4)
    result = inhibition_heads(model, task, movers="L1.H2")
    hf.set_attn_implementation("eager")
    first, second = hf.transformer.h
    expected = torch.zeros(4, dtype=torch.float64)
    for ids, other, right, wrong in zip(task.clean, task.corrupted or (), task.right, task.wrong, strict=True):
        with torch.no_grad():
            runs = [hf(torch.tensor([x]), output_attentions=True, output_hidden_states=True) for x in (ids, other)]
            values = [first.attn.c_attn(first.ln_1(out.hidden_states[0]))[0, :, 64:] for out in runs]
            stream = runs[0].hidden_states[1][0]
            keys = second.attn.c_attn(second.ln_1(stream))[:, 32 + 16 : 32 + 24]
            for head in range(4):
                place = slice(8 * head, 8 * head + 8)
                z = [out.attentions[0][0, head, -1] @ v[:, place] for out, v in zip(runs, values, strict=True)]
                told = stream[-1] + (z[1] - z[0]) @ first.attn.c_proj.weight[place]
                for sign, x in ((1.0, stream[-1]), (-1.0, told)):
                    query = second.attn.c_attn(second.ln_1(x))[16:24]
                    row = torch.tensor([float(query @ key) / 8**0.5 for key in keys]).softmax(0)
                    for p, token in enumerate(ids):
                        side = 1.0 if token == right else -1.0 if token in wrong else 0.0
                        expected[head] += sign * side * float(row[p]) / len(task)
    hf.set_attn_implementation("sdpa")
    assert close(result.values[0], expected)
    assert expected.abs().max() > 1e-4


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi", "bloom"])
def test_the_effect_is_that_of_path_patching_with_mlps_frozen(name: str) -> None:
    model = pb.load(twins.twin(name))
    task = pb.tasks.repeated_tokens(model, 4, max_period=6, max_offset=4)
    ours = inhibition_heads(model, task, movers="L1.H1", draws=1)["effect"][0]
    theirs = pb.prove.path_patching(model, task, receivers=["L1.H1.q"], mlps="frozen").values[0]
    assert close(ours, theirs, of=1.0)
    assert theirs.abs().max() > 1e-4


def test_null() -> None:
    """In a random model no head turns a random head's attention from wrong to right."""
    built = planted.null(seed=3)
    model = pb.load(built.model, built.tokenizer)
    result = inhibition_heads(model, pb.tasks.repeated_tokens(model, 12), movers="L1.H0", draws=1)
    assert (result["p_adjusted"].nan_to_num(1.0) > 0.05).all()
    assert result.values.nan_to_num(0.0).abs().max() < 0.02


def test_random_pushes_are_averaged_and_a_head_has_to_beat_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pb.load(twins.twin("gpt2"))
    task = pb.tasks.repeated_tokens(model, 12, max_period=6, max_offset=4)
    one, many = (inhibition_heads(model, task, movers="L1.H1", draws=n)["random"][0].abs().mean() for n in (1, 8))
    assert float(many) < 2 * float(one), "a mean of eight, not their sum"
    pushed = torch.tensor([0.5, 0.5, 0.0, 0.0])
    names = ("inhibition", "effect", "random", "looks_at_wrong", "without_first", "looks_at_right")
    seen = {name: (pushed if name == "random" else torch.full((4,), 0.1)).expand(12, 4).double() for name in names}
    monkeypatch.setattr(module, "_measure", lambda *given: seen)
    found = inhibition_heads(model, task, movers="L1.H1", draws=1)
    assert (found["p_adjusted"][0] <= 0.05).all()
    assert any(note.startswith("2 of 4 heads") for note in found.notes), found.notes


def test_what_cannot_be_measured_is_refused() -> None:
    model = pb.load(twins.twin("gpt2"))
    task = pb.tasks.repeated_tokens(model, 4, max_period=6, max_offset=4)
    with pytest.raises(pb.PatchbayError, match="no head comes before the movers L0.H1"):
        inhibition_heads(model, task, movers="L0.H1")
    with pytest.raises(pb.PatchbayError, match="no corrupted twins of equal length"):
        inhibition_heads(model, replace(task, corrupted=None), movers="L1.H1")
    with pytest.raises(pb.PatchbayError, match="2 prompts cannot be halved"):
        inhibition_heads(model, task[:2])
    with pytest.raises(pb.PatchbayError, match="lack their right or their wrong answer"):
        inhibition_heads(model, replace(task, wrong=((95,),) * 4), movers="L1.H1")
    with pytest.raises(pb.PatchbayError, match="a mover is a head"):
        inhibition_heads(model, task, movers="L1.mlp")

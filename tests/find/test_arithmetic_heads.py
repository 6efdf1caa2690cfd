"""Arithmetic heads: a planted head that copies an operand, full path patching as the reference, patching a run into itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.find.arithmetic_heads import _at_least, _keys
from patchbay.tiny import planted, twins
from tests.given import gpt2
from tests.shares import by_turns
from tests.tolerance import close


def copying(form: Any, seed: int = 0) -> tuple[pb.Model, str, pb.Task]:
    """The planted copy head; the marked word stands for the operand, and in the twin another marked word stands there."""
    built = planted.copy(form=form, seed=seed)
    model = pb.load(built.model, built.tokenizer)
    clean = model.encode(list(built.truth["prompts"]))
    right = [model.token_id(answer) for answer in built.truth["answers"]]
    corrupted = [
        [right[(n + 1) % len(right)] if token == right[n] else token for token in ids] for n, ids in enumerate(clean)
    ]
    marks = {
        "left": [[ids.index(answer)] for ids, answer in zip(clean, right, strict=True)],
        "operator": [[len(ids) - 1] for ids in clean],
    }
    wrong = [[right[(n + 1) % len(right)]] for n in range(len(right))]
    return model, built.truth["copy"], pb.Task("copy", clean, right, wrong, corrupted, marks=marks)


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_planted(form: Any) -> None:
    """The head that copies the operand ranks first, more than ten times above the median, and looks at nothing else."""
    model, head, task = copying(form)
    result = pb.find.arithmetic_heads(model, task, operands=["left"])
    best = result.table(1)[0]
    assert str(best["part"]) == head
    assert best["value"] > 0.9
    assert best["effect_frozen"] > 0.9
    assert best["value"] > 10 * result.values.flatten().median()
    assert best["p_adjusted"] <= 0.05
    assert best["operands"] > 0.95
    assert best["operator"] < 0.05
    assert [str(part) for part in result.highlights][:1] == [head]
    assert float(result["held_out"]) > 0.9


@pytest.mark.parametrize("name", by_turns(["gpt2", "llama", "gemma2", "phi", "mixtral", "gpt_neo", "bloom"], of=2))
def test_reference(name: str) -> None:
    """Path patching as it is defined: a whole run with every head (and MLP) frozen at all positions and the sender from the twin."""
    model = pb.load(twins.twin(name))
    plain = pb.tasks.repeated_tokens(model, 3, max_period=5, max_offset=2)
    marks = {"left": [[0]] * 3, "right": [[1]] * 3, "operator": [[2]] * 3}
    task = pb.Task("any", plain.clean, plain.right, plain.wrong, plain.corrupted, marks=marks)
    result = pb.find.arithmetic_heads(model, task, all_prompts=True)
    last = model.n_layers - 1
    for layer, head in ((0, 1), (last, 0)):
        for frozen, variable in ((False, "effect"), (True, "effect_frozen")):
            total = 0.0
            for ids, twin, right in zip(task.clean, task.corrupted or (), task.right, strict=True):
                offered = [
                    pb.Port(s, i) for i in range(model.n_layers) for s in ("attn.z", "mlp.out") if s in model.signals(i)
                ]
                base, other = (pb.run(model, [list(p)], taps=offered) for p in (ids, twin))
                edits = [pb.replace(p, base[p]) for p in offered if p.signal == "attn.z" or frozen]
                z = pb.Port("attn.z", layer)
                sent = base[z].clone()
                sent[:, :, head] = other[z][:, :, head]
                edits = [pb.replace(z, sent) if e.port == z else e for e in edits]
                patched = pb.run(model, [list(ids)], edits=edits).logits[0, -1].double().softmax(-1)[right]
                as_is = base.logits[0, -1].double().softmax(-1)[right]
                total += float((as_is - patched) / as_is) / len(task)
            assert close(float(result[variable][layer, head]), total, of=1.0), (layer, head, variable)


def test_attention_is_hugging_face_s() -> None:
    hf = gpt2(0)
    rows = [torch.randint(3, 40, (n,)).tolist() for n in (6, 8, 7)]
    marks = {"left": [[0], [1], [2]], "right": [[2], [3], [5]], "operator": [[1], [2], [3]]}
    task = pb.Task("any", rows, [3, 4, 5], [[6], [7], [8]], [[*row[:-2], 9, row[-1]] for row in rows], marks=marks)
    result = pb.find.arithmetic_heads(pb.load(hf), task, all_prompts=True)
    hf.set_attn_implementation("eager")
    paid, bare, sign = torch.zeros(3, 2, 4)
    for n, ids in enumerate(rows):
        with torch.no_grad():
            attentions = hf(torch.tensor([ids]), output_attentions=True).attentions
        for i in range(2):
            last = attentions[i][0, :, -1]
            keys = [*marks["left"][n], *marks["right"][n]]
            paid[i] += last[:, keys].sum(1) / 3
            bare[i] += last[:, [k for k in keys if k]].sum(1) / (1 - last[:, 0]) / 3
            sign[i] += last[:, marks["operator"][n][0]] / 3
    assert close(result["operands"], paid)
    assert close(result["operator"], sign)
    assert close(result["operands_without_first"], bare)
    assert close(float(result["uniform_operands"]), (2 / 6 + 2 / 8 + 2 / 7) / 3)


def test_null() -> None:
    """A run patched into itself changes nothing at all; in a random model there are no key heads."""
    model, _, task = copying("gpt2")
    itself = pb.Task("itself", task.clean, task.right, task.wrong, task.clean, marks=task.marks)
    result = pb.find.arithmetic_heads(model, itself, operands=["left"])
    assert close(result.values, 0.0, of=1.0)
    assert close(result["mlp"], 0.0, of=1.0)
    assert (result["p"] == 1.0).all()
    assert not result.highlights
    built = planted.null(seed=0)
    random_model = pb.load(built.model, built.tokenizer)
    other = pb.find.arithmetic_heads(random_model, task, operands=["left"], all_prompts=True)
    assert not other.highlights
    assert other.values.abs().max() < 0.2


def test_key_sets_of_several_forms_are_compared() -> None:
    model, _, task = copying("gpt2")
    rows = pb.find.arithmetic_heads(model, pb.Task.joined([task, task]), operands=["left"]).tables["groups"]
    assert len(rows) == 1
    row = rows[0]
    assert (row["first"], row["second"]) == ("0", "1")
    assert row["shared"] == row["n_first"] == row["n_second"] >= 1
    assert row["expected"] == row["n_first"] ** 2 / 8
    assert row["jaccard"] == 1.0
    assert _at_least(0, 3, 4, 10) == pytest.approx(1.0)
    assert _at_least(3, 3, 3, 10) == pytest.approx(1 / 120)


def test_errors() -> None:
    model, _, task = copying("gpt2")
    with pytest.raises(pb.PatchbayError, match="lacks the marks right; it has left, operator"):
        pb.find.arithmetic_heads(model, task)
    with pytest.raises(pb.PatchbayError, match=r"operands=\[\]: name one or more of the task's marks, left, operator"):
        pb.find.arithmetic_heads(model, task, operands=[])
    with pytest.raises(pb.PatchbayError, match="needs a corrupted twin"):
        alone = pb.Task("alone", task.clean, task.right, task.wrong, marks=task.marks)
        pb.find.arithmetic_heads(model, alone, operands=["left"])
    with pytest.raises(pb.PatchbayError, match="groups='form'"):
        pb.find.arithmetic_heads(model, task, operands=["left"], groups="form")
    unknown = pb.Task("unknown", task.clean, [9] * len(task), [[8]] * len(task), task.corrupted, marks=task.marks)
    answers = set(task.right)
    assert 9 not in answers
    with pytest.raises(pb.PatchbayError, match="answers none of the 12 prompts.*all_prompts=True"):
        pb.find.arithmetic_heads(model, unknown, operands=["left"])


def test_key_heads_are_those_that_cost_most_first() -> None:
    heads = [pb.Part(0, "head", i) for i in range(4)]
    effect = torch.tensor([[0.2, -0.6, 0.5, 0.0]]).repeat(12, 1) + 0.01 * torch.randn(
        12, 4, generator=torch.Generator().manual_seed(0)
    )
    assert [str(part) for part in _keys(heads, effect)] == ["L0.H2", "L0.H0"]

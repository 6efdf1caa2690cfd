"""turn.context_knob: finds the planted intent where one stream holds it, and says that there is no knob where none does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay import maths
from patchbay.tiny import planted
from patchbay.tiny.planted_context import context
from patchbay.turn._intent import attention_range, items, swapped
from patchbay.turn.context_knob import _by_prompt, _found
from tests.shares import by_turns
from tests.tolerance import close


def asked(form: Any, funnelled: bool, n: int = 48) -> tuple[pb.Model, pb.Task, Any]:
    built = context(form=form, funnelled=funnelled, seed=1)
    model, truth = pb.load(built.model, built.tokenizer), built.truth

    def tokens(key: str) -> list[list[int]]:
        return [built.tokenizer.encode(text) for text in truth[key]]

    right, wrong = ([ids[0] for ids in tokens(key)] for key in ("answers", "wrong"))
    labels = {"intent": truth["intents"]}
    task = pb.Task("intent", tokens("prompts"), right, [[w] for w in wrong], tokens("twins"), labels=labels)
    return model, task[:n], truth


@pytest.mark.parametrize("form", by_turns(["gpt2", "llama"], of=2))
def test_planted(form: Any) -> None:
    model, task, truth = asked(form, True)
    knob = pb.turn.context_knob(model, task, steps=10)
    assert isinstance(knob, pb.Knob)
    search = knob.evidence["search"]
    assert str(knob.edits[0]) == "project(L0.resid_out, tensor[256, 256], positions='last')"
    assert search["iia"][0] >= 0.95
    assert search["random"][0] <= 0.05
    assert search["margin_low"] > 0.5
    assert search["elsewhere"].tolist()[1:] == [0.0, 0.0]
    assert search["towards"] >= 0.95
    assert search["away"] >= 0.95
    assert search["without"] == 0.5
    assert torch.cosine_similarity(knob.edits[1].value, truth["direction"], dim=0) > 0.5
    assert search.notes[0].startswith("knob found: at layer 0")
    assert any("in layers 1 " in note for note in search.notes)
    back = pb.turn.context_knob(model, task, to="prior", layers=[0], steps=10)
    said = pb.run(model, task, edits=[back]).last_logits.argmax(-1)
    prior = [r if i == "prior" else w[0] for r, w, i in zip(task.right, task.wrong, task.labels["intent"], strict=True)]
    assert (said == torch.tensor(prior)).double().mean() >= 0.95


def test_null() -> None:
    """The intent never reaches the last token's stream before the answer: no knob, in words, and no use as one."""
    model, task, _ = asked("llama", False)
    none = pb.turn.context_knob(model, task, steps=10)
    assert isinstance(none, pb.Result)
    assert none.notes[0].startswith("no single-layer knob found")
    assert none["accuracy"] == 1.0
    assert float(none["iia"][~none["iia"].isnan()].max()) <= 0.2
    assert float(none["whole"].max()) <= 0.2
    with pytest.raises(pb.PatchbayError, match="no single-layer knob found"), model.edited(none):
        pass


def test_a_random_model_has_no_knob() -> None:
    _, task, _ = asked("llama", True, 16)
    wild = pb.load(planted.null(form="llama", seed=0, n_layers=3).model)
    none = pb.turn.context_knob(wild, task, steps=2, layers=[0])
    assert isinstance(none, pb.Result)
    assert any("little to turn" in note for note in none.notes)


def test_reference() -> None:
    """Held at v, w . h is v and the rest of h stays; the swap as loops over coordinates; the range by trying them all."""
    model, task, _ = asked("llama", True, 24)
    knob = pb.turn.context_knob(model, task, steps=3)
    assert isinstance(knob, pb.Knob)
    port, constant = knob.edits[0].port, float(knob.evidence["search"]["constant"])
    w = knob.edits[1].value / knob.edits[1].value.norm() * (1 if constant > 0 else -1)
    before, after = (pb.run(model, task, taps=[port], edits=edits).last(port) for edits in ([], [knob]))
    assert close(after @ w, constant)
    away = torch.eye(len(w)) - torch.outer(w, w)
    assert close((after - before) @ away, 0.0, of=after)
    assert close(away @ away, away)
    target, source = before[:2], before[2:4]
    for row in range(2):
        gap = sum(float(w[i]) * (float(source[row, i]) - float(target[row, i])) for i in range(len(w)))
        by_hand = torch.tensor([float(target[row, i]) + gap * float(w[i]) for i in range(len(w))])
        assert close(swapped(target, source, w)[row], by_hand)
    found = attention_range(model, items(task), 32)
    assert found.layers == [1]  # the mover's
    assert found.runs <= 2 * 2 + 3
    assert _brought(model, task, [1]) > 0.9
    assert max(_brought(model, task, layers) for layers in ([0], [2], [0, 2])) < 0.1


def _brought(model: pb.Model, task: pb.Task, layers: list[int]) -> float:
    """Mean probability of the other answer with the twin's attention put in at the last token of these layers."""
    ports = [pb.Port("attn.out", layer) for layer in layers]
    trace = pb.run(model, [list(ids) for ids in task.corrupted or ()], taps=ports)
    edits = [pb.replace(port, trace.last(port)[:, None], positions="last") for port in ports]
    logits: Tensor = pb.run(model, task, edits=edits).last_logits
    other = torch.tensor([answers[0] for answers in task.wrong])
    return float(logits.softmax(-1).gather(1, other[:, None]).mean())


def test_errors() -> None:
    model, task, _ = asked("llama", True, 16)
    bare = pb.Task("bare", task.clean, task.right, task.wrong, task.corrupted)
    three = pb.Task(
        "x", task.clean, task.right, task.wrong, task.corrupted, labels={"intent": ["a", "b", "c", "d"] * 4}
    )
    for given, options, message in (
        (bare, {}, "lacks the label 'intent'"),
        (pb.Task("x", task.clean, task.right, task.wrong, labels=task.labels), {}, "lacks corrupted twins"),
        (three, {}, "intents a, b, c, d; two are needed"),
        (task, {"to": "text"}, "context and prior"),
        (task, {"layers": [3]}, "possible are 0 to 2"),
        (task, {"steps": 0}, "at least 1 step"),
        (task[:3], {}, "4 prompts or more"),
    ):
        with pytest.raises(pb.PatchbayError, match=message):
            pb.turn.context_knob(model, given, **options)


def test_a_model_that_guesses_the_intent_has_no_knob() -> None:
    """It says "the other answer" half of the time by itself: flips alone, also beyond random ones, are no find."""
    guessing = {"iia": torch.tensor([0.56]), "margin": (0.1, 0.02, 0.2), "accuracy_low": 0.4}
    assert not _found(guessing, 0)
    assert _found({**guessing, "accuracy_low": 0.9}, 0)
    model = pb.load("tiny-llama")  # knows the facts, and was never told what "Mary knew" asks for
    none = pb.turn.context_knob(model, pb.tasks.facts_by_intent(model, 24), layers=[0], steps=2)
    assert isinstance(none, pb.Result)
    assert any("little to turn" in note for note in none.notes)


def test_a_prompt_and_its_twin_are_one_draw() -> None:
    """Items i and n + i are one prompt: the interval of 40 is that of 20 means, and no narrower."""
    hits = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0] * 4).repeat(2)  # prompt and twin agree
    paired = maths.bootstrap_interval(_by_prompt(hits))
    assert torch.equal(_by_prompt(hits), hits[:20])
    assert paired == maths.bootstrap_interval(hits[:20])
    alone = maths.bootstrap_interval(hits)
    assert paired.high - paired.low > 1.2 * (alone.high - alone.low)

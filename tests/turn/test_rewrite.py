"""turn.rewrite: a fact of a trained model gets another answer and keeps its neighbours; equals ROME by hand; other keys do nothing."""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import patchbay as pb
from patchbay.tasks import words
from tests import given
from tests.tolerance import close

TEXTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17, 18], [3, 20, 21, 22], [23, 24, 25, 26, 27, 28]]


def asked(task: pb.Task, new: int) -> pb.Task:
    """The same prompts, whose right answer is a new one and the wrong one the old."""
    return replace(task, right=(new,) * len(task), wrong=tuple((old,) for old in task.right), corrupted=None)


@functools.cache
def facts() -> tuple[pb.Model, pb.Task, dict[str, pb.Task], list[str]]:
    """The built-in model, one fact of it asked with another answer, paraphrases of it, others about other lands, and texts."""
    model, rng = pb.load("tiny"), random.Random(0)
    known = pb.tasks.facts_in_memory(model, 8, seed=0)
    land, other = known.labels["subject"][:2]
    table = {land: known.labels["answer"][0], other: known.labels["answer"][1]}
    both = pb.tasks.facts_in_memory(model, 12, table=table, filler=1, seed=2)
    own = both[[i for i, subject in enumerate(both.labels["subject"]) if subject == land]]
    new = known.right[2]
    neighbours = known[
        [i for i, subject in enumerate(known.labels["subject"]) if subject != land and known.right[i] != new]
    ]
    more = {
        "paraphrases": asked(own[3:], new),
        "neighbours": replace(neighbours, wrong=((new,),) * len(neighbours), corrupted=None),
        "unrelated": asked(neighbours, new),
    }
    return model, asked(own[:3], new), more, [words.sentences(rng, 3)[1:] for _ in range(30)]


@functools.cache
def rewritten() -> pb.Knob:
    model, task, more, texts = facts()
    return pb.turn.rewrite(model, task, texts, layers=[0], others=more)


def test_planted() -> None:
    """The land gets its new capital in sentences that were not asked, and no other land loses its own."""
    found = rewritten().evidence["rewriting"]
    at = {name: i for i, name in enumerate(found.coords["condition"])}
    for name in ("asked", "paraphrases"):
        assert float(found["before"][at[name]]) == 0.0
        assert float(found["success"][at[name]]) == 1.0
        assert float(found["p"][at[name]]) < 0.05
    assert float(found["success"][at["neighbours"]]) == 1.0


def test_null() -> None:
    """The same change under other keys gives the fact no other answer, nor does the fact's own change give one to other lands."""
    found = rewritten().evidence["rewriting"]
    at = {name: i for i, name in enumerate(found.coords["condition"])}
    assert float(found["null_mean"][at["asked"]]) < 0.2
    assert float(found["success"][at["unrelated"]]) == 0.0
    assert float(found["p"][at["unrelated"]]) == 1.0


def small() -> tuple[pb.Model, pb.Task]:
    """Two prompts of one subject and one answer: one fact of a random network."""
    task = given.pairs(2)
    clean = [list(ids) for ids in task.clean]
    clean[1][3] = clean[0][3]
    return given.lent("gpt2"), pb.Task(
        "one", clean, [task.right[0]] * 2, marks={"subject": [[3], [3]]}, metric="log_probability"
    )  # type: ignore[arg-type]


def by_hand(hf: Any, task: pb.Task, layer: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """k [neuron], v* and m [d_model], with plain hooks on GPT-2 and an optimiser of the test's own."""
    module, ids, at = hf.transformer.h[layer].mlp.c_proj, torch.tensor([list(row) for row in task.clean]), 3
    W, seen = module.weight.detach().double(), []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, at].detach().double()))
    with torch.no_grad():
        law = hf(ids).logits[:, at].log_softmax(-1)
    hook.remove()
    k = seen[0].mean(0)
    m = k @ W
    x = torch.zeros_like(m)
    first, second = torch.zeros_like(m), torch.zeros_like(m)
    for step in range(1, steps + 1):
        x = x.detach().requires_grad_()
        delta = x * m.norm() / len(m) ** 0.5

        def add(_: Any, __: Any, out: Tensor, delta: Tensor = delta) -> Tensor:
            more = torch.zeros_like(out)
            more[:, at] = delta.float()
            return out + more

        hook = module.register_forward_hook(add)
        logits = hf(ids).logits
        hook.remove()
        after = logits[:, at].log_softmax(-1)
        loss = -logits[:, -1].log_softmax(-1)[:, task.right[0]].mean()
        loss = loss + (law.exp() * (law - after)).sum(-1).mean() / 16 + (delta.norm() / m.norm()) ** 2 / 10
        [g] = torch.autograd.grad(loss, x)
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
        x = x.detach() - 0.2 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        over = float(x.norm()) / len(m) ** 0.5 / 4.0
        x = x / max(1.0, over)
    return k, m + x * m.norm() / len(m) ** 0.5, m


def moment_by_hand(hf: Any, layer: int) -> Tensor:
    total, n, seen = 0.0, 0, []
    hook = hf.transformer.h[layer].mlp.c_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0][0].double())
    )
    with torch.no_grad():
        for row in TEXTS:
            hf(torch.tensor([row]))
    hook.remove()
    for rows in seen:
        for a in rows:
            total, n = total + torch.outer(a, a), n + 1
    moment = total / n  # type: ignore[operator]
    return moment + 1e-3 * moment.diagonal().mean() * torch.eye(len(moment)).double()


def test_reference() -> None:
    """W' = W + C^-1 k (v* - W k)^T / k C^-1 k, with delta by an optimiser written out: the knob's logits are those of these weights."""
    model, task = small()
    hf: Any = model.hf
    knob = pb.turn.rewrite(model, task, TEXTS, layers=[1], steps=6, draws=1)
    k, aim, _ = by_hand(hf, task, 1, 6)
    W = hf.transformer.h[1].mlp.c_proj.weight.detach().double()
    u = torch.linalg.solve(moment_by_hand(hf, 1), k)
    change = torch.outer(u, aim - k @ W) / (u @ k)
    prompts = [list(ids) for ids in task.clean] + [row for row in TEXTS if len(row) == 6]
    found = [pb.run(model, [row], edits=[knob]).logits for row in prompts]
    plain = [pb.run(model, [row]).logits for row in prompts]
    with torch.no_grad():
        kept = hf.transformer.h[1].mlp.c_proj.weight.clone()
        hf.transformer.h[1].mlp.c_proj.weight += change.float()
        expected = [hf(torch.tensor([row])).logits for row in prompts]
        hf.transformer.h[1].mlp.c_proj.weight.copy_(kept)
    for one, other in zip(found, expected, strict=True):
        assert close(one, other)
    assert max(float((a - b).abs().max()) for a, b in zip(found, plain, strict=True)) > 0.05


def change_of(model: pb.Model, knob: pb.Knob, layer: int) -> Tensor:
    """What the knob adds to the down projection, [neuron, d_model]."""
    [own] = [one for one in knob.edits if one.port.layer == layer]
    assert isinstance(own.value, Tensor)
    W = model.hf.transformer.h[layer].mlp.c_proj.weight.detach().double()  # type: ignore[attr-defined, union-attr, operator]
    return (own.value.T.double() - torch.eye(len(W)).double()) @ W


def test_the_change_has_rank_one_and_leaves_keys_that_the_texts_tell_apart() -> None:
    model, task = small()
    knob = pb.turn.rewrite(model, task, TEXTS, layers=[1], steps=3, draws=1)
    change = change_of(model, knob, 1)
    values = torch.linalg.svdvals(change)
    assert float(values[1] / values[0]) < 1e-3
    k = by_hand(model.hf, task, 1, 0)[0]
    u = torch.linalg.solve(moment_by_hand(model.hf, 1), k)
    other = torch.randn(len(k), generator=torch.Generator().manual_seed(0)).double()
    other -= (other @ u) / (u @ u) * u
    assert float((other @ change).norm() / other.norm()) < 1e-3 * float((k @ change).norm() / k.norm())


def test_several_layers_bring_the_stream_to_one_place_and_a_weight_holds_it_back() -> None:
    """Layer after layer the stream comes to what the last layer's own change would have made of it."""
    model, task = small()
    port = pb.Port("resid_out", 1)
    aim = pb.run(model, task, taps=[port], edits=[pb.turn.rewrite(model, task, TEXTS, layers=[1], draws=1)])[port][:, 3]
    plain = pb.run(model, task, taps=[port])[port][:, 3]
    both = pb.turn.rewrite(model, task, TEXTS, layers=[0, 1], draws=1)
    assert [str(one.port) for one in both.edits] == ["L0.mlp.act", "L1.mlp.act"]
    there = pb.run(model, task, taps=[port], edits=[both])[port][:, 3]
    assert close(there.mean(0), aim.mean(0))
    held = pb.turn.rewrite(model, task, TEXTS, layers=[1], weight=1e5, draws=1)
    less = pb.run(model, task, taps=[port], edits=[held])[port][:, 3]
    assert 0.0 < float((less - plain).norm()) < 0.5 * float((aim - plain).norm())


def test_two_facts_hold_together_and_a_checkpoint_has_them(tmp_path: Path) -> None:
    model = given.lent("llama")
    task = replace(given.pairs(2, n_wrong=1), marks={"subject": [[3], [2, 4]]}, corrupted=None)
    knob = pb.turn.rewrite(model, task, TEXTS, layers=[1], draws=2)
    assert "2 facts" in knob.name
    loaded = pb.load_knob(knob.save(tmp_path / "facts.knob"), model)
    assert loaded == knob
    knob.export(model, tmp_path / "checkpoint")
    ids = torch.tensor([list(row) for row in task.clean])
    with torch.no_grad():
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")(ids).logits
    assert close(exported, pb.run(model, task, edits=[knob]).logits)
    assert knob.edits_at(0.0) == []


def test_what_is_refused() -> None:
    model, task = small()
    with pytest.raises(pb.PatchbayError, match="marks no positions"):
        pb.turn.rewrite(model, replace(task, marks={}), TEXTS)
    with pytest.raises(pb.PatchbayError, match="same key"):
        pb.turn.rewrite(model, replace(task, clean=(task.clean[0],) * 2, right=(5, 6)), TEXTS, layers=[0], steps=1)
    with pytest.raises(pb.PatchbayError, match=r"layers \[7\] have no down projection"):
        pb.turn.rewrite(model, task, TEXTS, layers=[7])
    with pytest.raises(pb.PatchbayError, match="a norm stands between"):
        pb.turn.rewrite(given.lent("gemma2"), task, TEXTS, layers=[0, 1])
    with pytest.raises(pb.PatchbayError, match="a weight of 0 or more"):
        pb.turn.rewrite(model, task, TEXTS, weight=-1.0)
    with pytest.raises(pb.PatchbayError, match="answers of one"):
        several = replace(task, right=(), answers=(((5, 6),), ((5, 6),)), metric="log_probability")
        pb.turn.rewrite(model, several, TEXTS)

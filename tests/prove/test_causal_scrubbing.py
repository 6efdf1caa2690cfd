"""Causal scrubbing: a true hypothesis keeps the score and a false one loses it; everything claimed is 1, nothing 0; equals hooks by hand."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.tiny import planted
from tests import given
from tests.tolerance import close


def related() -> tuple[pb.Model, pb.Task, dict[str, Any]]:
    """Seven names with a day and a month: a head fetches both for the name, a neuron of the last MLP decides by the relation's word."""
    built = planted.relation_neuron(form="gpt2", seed=0)
    model, truth = pb.load(built.model, built.tokenizer), dict(built.truth)
    task = pb.Task.from_prompts(model, truth["prompts"], truth["answers"], truth["wrong"])
    labels = {"name": [i // 2 for i in range(14)], "relation": [i % 2 for i in range(14)]}
    layer = next(iter(truth["neurons"].values())).split(".")[0]
    return model, pb.Task("related", task.clean, task.right, task.wrong, labels=labels), truth | {"mlp": f"{layer}.mlp"}


def test_planted() -> None:
    model, task, truth = related()
    true = {truth["subject_head"]: "name", truth["mlp"]: "relation"}
    found = pb.prove.causal_scrubbing(model, task, true)
    assert float(found["recovered"]) > 0.9
    assert float(found["p"]) < 0.1
    assert float(found["null"].max()) < 0.7
    assert float(found["others"].min()) > 0.2
    wrong = pb.prove.causal_scrubbing(model, task, true | {truth["mlp"]: "name"}, draws=3)
    assert float(wrong["recovered"]) < 0.8 * float(found["recovered"])


def test_everything_claimed_is_the_model_and_nothing_claimed_is_none_of_it() -> None:
    model, task, _ = related()
    every = {f"L{i}.{kind}": "self" for i in range(model.n_layers) for kind in ("attn", "mlp")}
    found = pb.prove.causal_scrubbing(model, task, every, draws=1)  # type: ignore[arg-type]
    assert torch.equal(found["scrubbed"], found["whole"])
    assert float(found["recovered"]) == 1.0
    assert any("passes for nothing" in note for note in found.notes), "nothing was drawn anew"
    some = pb.prove.causal_scrubbing(model, task, {f"L{model.n_layers - 1}.H0": "relation"}, draws=3)
    assert abs(float(some["recovered"])) < 0.6


def test_reference() -> None:
    """One draw by plain hooks on GPT-2 with the same random choices: units in the order of the pass, drawn for all prompts at a time."""
    model = given.lent("gpt2")
    hf: Any = model.hf
    labels = {"first": [0, 0, 1, 1, 1, 0], "second": [0, 1, 0, 1, 0, 1]}
    pairs = given.pairs(6)
    task = pb.Task("labelled", pairs.clean, pairs.right, pairs.wrong, labels=labels)
    hypothesis: dict[str, Any] = {"L0.H1": "first", "L1.mlp": ["first", "second"], "L1.H3": "self"}
    found = pb.prove.causal_scrubbing(model, task, hypothesis, draws=1, seed=5)
    rng, ids, width = (
        random.Random("causal_scrubbing-5"),
        torch.tensor([list(row) for row in task.clean]),
        model.d_model // 4,
    )

    def choice(unit: str, claims: dict[str, Any]) -> list[int]:
        if unit not in claims:
            return [rng.randrange(6) for _ in range(6)]
        own = claims[unit]
        return [rng.choice([j for j in range(6) if own[j] == own[i]]) for i in range(6)]

    def scrub(claims: dict[str, Any]) -> Tensor:
        hooks = []
        for layer, block in enumerate(hf.transformer.h):
            heads = [choice(f"L{layer}.H{head}", claims) for head in range(4)]
            whole = choice(f"L{layer}.mlp", claims)

            def swap(_: Any, args: Any, heads: list[list[int]] = heads) -> Any:
                x = args[0].clone()
                for head, own in enumerate(heads):
                    x[:, :, head * width : (head + 1) * width] = args[0][own][:, :, head * width : (head + 1) * width]
                return (x, *args[1:])

            hooks.append(block.attn.c_proj.register_forward_pre_hook(swap))
            hooks.append(block.mlp.register_forward_hook(lambda _, __, out, whole=whole: out[whole]))
        with torch.no_grad():
            logits = hf(ids).logits[:, -1].double()
        for hook in hooks:
            hook.remove()
        return logits[torch.arange(6), list(task.right)] - logits.gather(
            1, torch.tensor([list(row) for row in task.wrong])
        ).mean(1)

    claims = {
        "L0.H1": [(one,) for one in labels["first"]],
        "L1.mlp": list(zip(labels["first"], labels["second"], strict=True)),
        "L1.H3": [(i,) for i in range(6)],
    }
    scrubbed, none = scrub(claims), scrub({})
    assert close(float(found["scrubbed"]), float(scrubbed.mean()), of=1.0)
    assert close(float(found["no_claim"]), float(none.mean()), of=1.0)
    dealt = {unit: rng.sample(own, 6) for unit, own in claims.items()}
    whole = float(found["whole"])
    null = (scrub(dealt).mean() - none.mean()) / (whole - none.mean())
    assert close(found["null"].tolist(), [float(null)], of=1.0)


def test_null() -> None:
    """Labels that have nothing to do with the prompts recover no more than the same labels dealt out anew."""
    model, task, truth = related()
    labels = {"name": random.Random(0).choices(range(3), k=14)}
    other = pb.Task("other", task.clean, task.right, task.wrong, labels=labels)
    found = pb.prove.causal_scrubbing(model, other, {truth["subject_head"]: "name", truth["mlp"]: "name"})
    assert float(found["p"]) > 0.1  # of ten draws it is at least 1 / 11
    assert float(found["recovered"]) < 0.6


def test_a_constant_part_passes_for_nothing_and_it_is_said() -> None:
    """A part whose output is always the same confirms any claim about it: the trap, which the Result names."""
    model = pb.load(given.gpt2(0))
    with torch.no_grad():
        model.hf.transformer.h[1].mlp.c_proj.weight.zero_()  # type: ignore[attr-defined, union-attr, operator]
    pairs = given.pairs(6)
    labels = {"first": [0, 0, 1, 1, 1, 0]}
    small = [[token % 40 for token in ids] for ids in pairs.clean]
    task = pb.Task("labelled", small, [3] * 6, [[4]] * 6, labels=labels)  # type: ignore[arg-type]
    found = pb.prove.causal_scrubbing(pb.load(model.hf), task, {"L1.mlp": "first", "L0.mlp": "first"}, draws=2)
    assert found["moved"].tolist()[0] == 0.0
    assert float(found["moved"][1]) > 0.1
    assert any(note.startswith("L1.mlp: nothing moved") for note in found.notes)


def test_what_is_refused() -> None:
    model, task, truth = related()
    with pytest.raises(pb.PatchbayError, match="no label 'nmae'.*did you mean"):
        pb.prove.causal_scrubbing(model, task, {truth["mlp"]: "nmae"})
    with pytest.raises(pb.PatchbayError, match="scrubbed are heads, attentions and MLPs"):
        pb.prove.causal_scrubbing(model, task, {"L0.N3": "name"})
    uneven = pb.Task("uneven", [[5, 6], [7, 8, 9]], [1, 2], [[3], [4]])  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="of one length"):
        pb.prove.causal_scrubbing(model, uneven, {truth["mlp"]: "self"})

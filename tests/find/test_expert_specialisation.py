"""Expert specialisation: the planted expert, routers as loops, nothing for labels dealt at random; every mixture, no silence."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.find.expert_specialisation import _bootstrap
from patchbay.tiny import planted, twins
from tests.given import MIXTURES, lent
from tests.tolerance import close


def labelled(model: pb.Model, n: int, seed: int = 0) -> pb.Task:
    """Random prompts with labels dealt at random."""
    task = pb.tasks.repeated_tokens(model, n, max_period=6, max_offset=4, seed=seed)
    rng = random.Random(seed)
    return replace(task, labels={"group": [rng.choice("xyz") for _ in range(n)], "half": [i % 2 for i in range(n)]})


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted(seed: int) -> None:
    """The expert that a class of words is routed to: every word of the class, none of another one."""
    built = planted.routed_expert(seed=seed)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    others = [i for i in range(3, 64) if i not in truth["class_ids"]]
    before = built.tokenizer.encode(" the")
    clean = [[*before, word] for word in [*truth["class_ids"], *others]]
    labels = {"class": ["in"] * len(truth["class_ids"]) + ["out"] * len(others)}
    task = pb.Task("classes", clean, [truth["token_id"]] * len(clean), metric="log_probability", labels=labels)
    result = pb.find.expert_specialisation(model, task, label="class", value="in")
    best = result.table(1)[0]
    assert str(best["part"]) == truth["expert"]
    assert best["value"] > 0.9
    assert best["p_adjusted"] < 0.01
    assert best["low"] > 0.8
    weight = pb.find.expert_specialisation(model, task, label="class", value="in", measure="weight").table(1)[0]
    assert str(weight["part"]) == truth["expert"]
    assert weight["value"] == pytest.approx(truth["router_weight"] - truth["other_router_weight"], abs=1e-3)
    turned = pb.find.expert_specialisation(model, task, label="class", value="out")
    assert close(turned.values, -result.values)
    resonance = [row for row in result.tables["tokens"] if str(row["part"]) == truth["expert"]]
    assert [row["token"] for row in resonance] == [" the"]  # the one word that stands three times or more
    assert resonance[0]["share"] == 0.0
    thrice = pb.Task(
        "thrice", clean * 3, task.right * 3, metric="log_probability", labels={"class": labels["class"] * 3}
    )
    tables = pb.find.expert_specialisation(model, thrice, label="class", value="in").tables
    resonance = [row["token"] for row in tables["tokens"] if str(row["part"]) == truth["expert"]]
    assert len(resonance) == 5
    assert {built.tokenizer.encode(token)[0] for token in resonance} <= set(truth["class_ids"])
    assert all(row["control"].split(".")[0] == str(row["part"]).split(".")[0] for row in tables["controls"])


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
@pytest.mark.parametrize("positions", ["last", "all"])
def test_reference(name: str, positions: Any) -> None:
    """Choices and weights from the model's own router logits, counted in loops; differences, loads and resonance by hand."""
    model = lent(name)
    task = labelled(model, 12)
    n_experts, k = 4, 2
    choice = pb.find.expert_specialisation(model, task, label="group", value="y", positions=positions, batch_size=5)
    weight = pb.find.expert_specialisation(model, task, label="group", value="y", positions=positions, measure="weight")
    fired, weights = [], []
    for ids in task.clean:
        with torch.no_grad():
            logits = model.hf(torch.tensor([ids]), output_router_logits=True).router_logits
        counts = [[0.0] * n_experts for _ in logits]
        shares = [[0.0] * n_experts for _ in logits]
        places = [len(ids) - 1] if positions == "last" else range(len(ids))
        for layer, scores in enumerate(logits):
            probabilities = scores.softmax(-1)
            for place in places:
                row = probabilities[place].tolist()
                top = sorted(range(n_experts), key=lambda e: -row[e])[:k]
                total = sum(row[e] for e in top) if name == "mixtral" else 1.0
                for expert in top:
                    counts[layer][expert] += 1 / len(places)
                    shares[layer][expert] += row[expert] / total / len(places)
        fired.append(counts)
        weights.append(shares)
    inside = [group == "y" for group in task.labels["group"]]
    for result, seen in ((choice, fired), (weight, weights)):
        for layer in range(2):
            for expert in range(n_experts):
                a = [row[layer][expert] for row, own in zip(seen, inside, strict=True) if own]
                b = [row[layer][expert] for row, own in zip(seen, inside, strict=True) if not own]
                assert close(float(result.values[layer, expert]), sum(a) / len(a) - sum(b) / len(b), of=result.values)
    for at, named in enumerate(choice.labels_of("condition")):
        rows = [row for row, group in zip(fired, task.labels["group"], strict=True) if str(group) == named]
        assert close(choice["frequency"][at], torch.tensor(rows).mean(0)), named
    sizes = [1 if positions == "last" else len(ids) for ids in task.clean]
    for layer in range(2):
        for expert in range(n_experts):
            total = sum(row[layer][expert] * n for row, n in zip(fired, sizes, strict=True)) / sum(sizes)
            assert close(float(choice["load"][layer, expert]), total, of=choice["load"])


def test_p_is_the_share_of_deals_as_large() -> None:
    """Against every one of the 924 ways to deal twelve prompts into halves."""
    import itertools

    model = lent("mixtral")
    task = labelled(model, 12)
    result = pb.find.expert_specialisation(model, task, label="half", value="0", positions="all")
    fired = []
    for i in range(12):
        two = task[[i, (i + 1) % 12]]
        one = pb.find.expert_specialisation(model, two, label="half", positions="all")
        fired.append(one["frequency"][one.labels_of("condition").index(str(task.labels["half"][i]))])
    seen = torch.stack(fired)  # [prompt, layer, expert]
    observed = (seen[::2].mean(0) - seen[1::2].mean(0)).abs()
    hits, n = torch.zeros_like(observed), 0
    for chosen in itertools.combinations(range(12), 6):
        rest = [i for i in range(12) if i not in chosen]
        hits += (seen[list(chosen)].mean(0) - seen[rest].mean(0)).abs() >= observed - 1e-9
        n += 1
    assert torch.allclose(result["p"], hits / n, atol=0.04)


def test_ends_are_those_of_two_means_that_vary() -> None:
    """300 and 150 normal values: the ends lie 1.96 standard errors of their difference from it, on both sides."""
    generator = torch.Generator().manual_seed(0)
    of = torch.arange(450) % 3 // 2  # 300 of the first, 150 of the second
    fired = (torch.randn(450, 1, 4, generator=generator).double() * (1.0 + of[:, None, None])) + 0.5 * of[:, None, None]
    low, high = _bootstrap(fired, SimpleNamespace(of=of), [0], 0)  # type: ignore[arg-type]
    sides = fired[of == 0], fired[of == 1]
    mean = sides[0].mean(0) - sides[1].mean(0)
    error = sum(side.var(0) / len(side) for side in sides) ** 0.5
    for end in (mean - low[0], high[0] - mean):
        assert torch.allclose(end, 1.96 * error, rtol=0.1)


@pytest.mark.parametrize("measure", ["choice", "weight"])
def test_null(measure: Any) -> None:
    """Labels dealt at random: no expert is found, of two groups or of three."""
    built = planted.null(form="mixtral", seed=1)
    model = pb.load(built.model, built.tokenizer)
    for label in ("half", "group"):
        result = pb.find.expert_specialisation(model, labelled(model, 60, 3), label=label, measure=measure)
        assert float(result["p_adjusted"].min()) > 0.05


@pytest.mark.parametrize("name", MIXTURES)
def test_every_mixture_is_read_and_its_loads_sum_to_the_choices(name: str) -> None:
    """Fused experts are never silent: each layer with experts has all of them, and k choices at every token."""
    model = lent(name)
    task = labelled(model, 6)
    result = pb.find.expert_specialisation(model, task, label="half", positions="all")
    routed = [i for i in range(model.n_layers) if model.n_experts(i)]
    assert routed
    k = getattr(model.config, "num_experts_per_tok", 2)  # AriaText calls it moe_topk
    for layer in range(model.n_layers):
        load = result["load"][layer, : model.n_experts(layer)] if layer in routed else result["load"][layer]
        assert bool(load.isfinite().all()) == (layer in routed)
        if layer in routed:
            assert close(float(load.sum()), k, dtype=torch.float64, of=1.0)
        else:
            assert "have no routed experts" in " ".join(result.notes)
    shared = any("shared_expert" in key or "shared_mlp" in key for key in model.hf.state_dict())
    assert shared == ("shared experts are on" in " ".join(result.notes))


def test_there_is_an_entry_for_every_mixture_among_the_twins() -> None:
    mixtures = [name for name in twins.FAMILY_CONFIGS if any(lent(name).n_experts(i) for i in range(2))]
    assert sorted(mixtures) == sorted(MIXTURES)


def test_more_than_two_groups_rank_by_the_one_that_an_expert_fires_for() -> None:
    model = lent("mixtral")
    task = labelled(model, 30)
    result = pb.find.expert_specialisation(model, task, label="group")
    assert torch.equal(result.values, result["each"].amax(0))
    assert torch.equal(result["group"].long(), result["each"].argmax(0))
    one = pb.find.expert_specialisation(model, task, label="group", value="z")
    assert close(one.values, result["each"][result.labels_of("condition").index("z")])


def test_bad_input() -> None:
    find, model = pb.find.expert_specialisation, lent("mixtral")
    task = labelled(model, 6)
    with pytest.raises(pb.PatchbayError, match=r"no layer of this gpt2 model offers experts\.out.*has no mixture"):
        find(lent("gpt2"), labelled(lent("gpt2"), 6), label="half")
    hidden = pb.load(twins.twin("gpt2"))
    hidden.hf.config.num_experts = 8
    with pytest.raises(pb.PatchbayError, match=r"config says num_experts=8, so they are there and not found"):
        find(hidden, labelled(hidden, 6), label="half")
    with pytest.raises(pb.PatchbayError, match="positions='first'; possible are last, all"):
        find(model, task, label="half", positions="first")  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="no label 'halves'"):
        find(model, task, label="halves")
    with pytest.raises(pb.PatchbayError, match="asked for the group 'w' of group; there are"):
        find(model, task, label="group", value="w")

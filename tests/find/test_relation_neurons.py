"""Relation neurons: the planted ones, average precision over every order of ties, the curves as plain runs, no relation."""

from __future__ import annotations

import functools
import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats

import patchbay as pb
from patchbay.find._statistics import average_precision, random_average_precision
from patchbay.tiny import planted, twins
from tests.given import entering
from tests.tolerance import close


@functools.cache
def built(form: Any = "gpt2", seed: int = 1) -> Any:
    return planted.relation_neuron(form=form, seed=seed)


def planted_task(form: Any = "gpt2", seed: int = 1) -> tuple[pb.Model, pb.Task, dict[str, str]]:
    made = built(form, seed)
    model, truth = pb.load(made.model, made.tokenizer), made.truth
    task = pb.Task.from_prompts(model, truth["prompts"], truth["answers"], truth["wrong"])
    pairs = [prompt.removeprefix(" the").rsplit(" ", 1) for prompt in truth["prompts"]]
    task = replace(task, labels={"relation": [f" {r}" for _, r in pairs], "subject": [s for s, _ in pairs]})
    return model, task, truth["neurons"]


@pytest.mark.parametrize("form", ["gpt2", "llama"])
@pytest.mark.parametrize("seed", [1, 2])
def test_planted(form: Any, seed: int) -> None:
    """Each relation's neuron is first among all, on subjects it was not found on too; without it the answers fall."""
    model, task, neurons = planted_task(form, seed)
    for i, (relation, neuron) in enumerate(neurons.items()):
        result = pb.find.relation_neurons(model, task, relation=relation, shares=[])
        part = pb.Part(model.n_layers - 1, "neuron", int(neuron.split("N")[1]))
        assert float(result.values[part.layer, part.index]) == 1.0  # type: ignore[index]
        assert float(result["held_out"][part.layer, part.index]) == 1.0
        assert float(result["relation"][part.layer, part.index]) == i
        assert result.unit == "average precision"
    one = 1.0 / (2 * 128)  # a single neuron for each relation; others may be as precise by chance on so few prompts
    first = pb.find.relation_neurons(model, task, shares=[])
    assert set(neurons.values()) <= {str(part) for part in first.top(40)}
    weights = pb.find.relation_neurons(model, task, shares=[one, 0.05])
    assert weights["change"].shape == (2, 2, 2)
    assert torch.equal(weights["overlap"].diagonal(), torch.ones(2, dtype=torch.float64))


def test_planted_curves() -> None:
    """Many prompts, so that chance precision is rare: switching off a relation's neurons costs that relation alone."""
    model, task, neurons = planted_task("gpt2", 1)
    clean = task.clean
    fillers = [" the", " and", " a", " then", " gave", "."]
    rows, right, wrong, relation, subject = [], [], [], [], []
    tokens = model.tokenizer
    for i, ids in enumerate(clean):
        for filler in fillers:
            rows.append([tokens.convert_tokens_to_ids(filler), *ids[1:]])
            right.append(task.right[i])
            wrong.append(task.wrong[i])
            relation.append(task.labels["relation"][i])
            subject.append(task.labels["subject"][i])
    many = pb.Task("many", rows, right, wrong, labels={"relation": relation, "subject": subject})
    result = pb.find.relation_neurons(model, many, shares=[1 / 256, 0.02])
    rows = {str(row["part"]): row for row in result.table()}
    assert all(rows[neuron]["value"] == 1.0 for neuron in neurons.values())
    assert float(result["p_adjusted"][1, int(neurons[" is"].split("N")[1])]) < 0.05
    change, low = result["change"][..., 0], result["random_low"][..., 0]
    assert bool((change.diagonal() < low.diagonal() - 0.3).all())
    off = change[~torch.eye(2, dtype=torch.bool)]
    assert float(off.min()) > -0.05
    assert bool((result["p_change_adjusted"][..., 0].diagonal() < 0.01).all())
    t = result["z"].abs() / 1.1**0.5  # ten draws, whose mean and spread are estimates: Student's t, not a normal z
    assert torch.allclose(result["p_change"], torch.from_numpy(2 * stats.t.sf(t.numpy(), 9)), rtol=1e-6)


def loops(scores: list[float], positive: list[bool]) -> float:
    """Average precision, averaged over every order that the scores allow."""
    total, count = 0.0, 0
    for order in itertools.permutations(range(len(scores))):
        if any(scores[a] < scores[b] for a, b in itertools.pairwise(order)):
            continue
        hits, precision = 0, 0.0
        for place, item in enumerate(order, start=1):
            if positive[item]:
                hits += 1
                precision += hits / place
        total, count = total + precision / hits, count + 1
    return total / count


def test_reference() -> None:
    """Expected AP equals the mean over all orders; activations and deactivation equal hooks on the plain model."""
    rng = random.Random(0)
    for n_levels in (1, 2, 3, 9):
        for _ in range(4):
            scores = [float(rng.randrange(n_levels)) for _ in range(6)]
            positive = [True, *(rng.random() < 0.4 for _ in range(5))]
            rng.shuffle(positive)
            found = average_precision(torch.tensor([scores]), torch.tensor(positive))
            assert close(float(found), loops(scores, positive), dtype=torch.float64, of=1.0)
    model = pb.load(twins.twin("gpt2"))
    task = pb.tasks.repeated_tokens(model, 6, max_period=6, max_offset=4)
    labels = {"relation": ["a", "a", "b", "b", "a", "b"], "subject": ["s", "t", "s", "t", "u", "u"]}
    task = replace(task, labels=labels)
    for pool in ("last", "max", "mean", "median"):
        result = pb.find.relation_neurons(model, task, relation="a", pool=pool, shares=[0.05])  # type: ignore[arg-type]
        seen: list[list[list[float]]] = []  # [prompt][layer][neuron]
        for ids in task.clean:
            here = entering([block.mlp.c_proj for block in model.hf.transformer.h], model.hf, ids)
            reduce = {
                "last": lambda x: x[-1],
                "max": lambda x: x.max(0).values,
                "mean": lambda x: x.mean(0),
                "median": lambda x: x.median(0).values,
            }[pool]
            seen.append([reduce(x).tolist() for x in here])
        found = _found(task)
        for half, variable in ((True, "average_precision"), (False, "held_out")):
            members = [i for i in range(6) if found[i] == half]
            for layer in range(2):
                for neuron in range(0, 128, 17):
                    expected = loops(
                        [seen[i][layer][neuron] for i in members], [labels["relation"][i] == "a" for i in members]
                    )
                    assert close(float(result[variable][layer, neuron]), expected, dtype=torch.float64, of=1.0)


def test_deactivation_is_a_run_without_these_neurons() -> None:
    """`change` at one share, by hooks that set the neurons to 0 on the plain model."""
    model, task, _ = planted_task("gpt2", 1)
    result = pb.find.relation_neurons(model, task, shares=[0.02])
    count = result.labels_of("n_parts")[0]
    found = [i for i in range(len(task)) if _found(task)[i]]
    ports = [layer.mlp.act for layer in model.layers]
    trace = pb.run(model, task, taps=ports)
    apart = []
    for port in ports:
        act = trace.last(port)[found]
        own = torch.tensor([task.labels["relation"][i] == " is" for i in found])
        apart += (act[own].mean(0) - act[~own].mean(0)).tolist()
    each = [round(x, 9) for x in result["each"][0].flatten().tolist()]
    off = sorted(range(256), key=lambda i: (-each[i], -apart[i]))[:count]
    unseen = [i for i in range(len(task)) if i not in found]
    assert int(result.notes[0].split()[2]) == len(found)

    def log_p(silent: list[int]) -> list[float]:
        hooks = []
        for layer, block in enumerate(model.hf.transformer.h):

            def hook(_: Any, args: Any, layer: int = layer) -> Any:
                x = args[0].clone()
                for place in silent:
                    if place // 128 == layer:
                        x[..., place % 128] = 0.0
                return (x,)

            hooks.append(block.mlp.c_proj.register_forward_pre_hook(hook))
        with torch.no_grad():
            out = [model.hf(torch.tensor([task.clean[i]])).logits[0, -1].log_softmax(-1)[task.right[i]] for i in unseen]
        for hook in hooks:
            hook.remove()
        return [float(x) for x in out]

    difference = [a - b for a, b in zip(log_p(off), log_p([]), strict=True)]
    for j, relation in enumerate(result.labels_of("condition")):
        own = [d for d, i in zip(difference, unseen, strict=True) if task.labels["relation"][i] == relation]
        assert close(float(result["change"][0, j, 0]), sum(own) / len(own), of=result["change"])


def _found(task: pb.Task) -> list[bool]:
    """Which prompts AP is found on: shuffled subjects, each to the half that has had fewer; all have as many prompts."""
    order = sorted(set(task.labels["subject"]))
    random.Random("relation_neurons-0").shuffle(order)
    counts, own = [0, 0], {}
    for subject in order:
        own[subject] = 0 if counts[0] <= counts[1] else 1
        counts[own[subject]] += 1
    return [own[s] == 0 for s in task.labels["subject"]]


def test_null() -> None:
    """Labels dealt at random on a random model: no neuron is precise beyond chance; the null's own AP is uniform in p."""
    made = planted.null(seed=4)
    model = pb.load(made.model, made.tokenizer)
    task = pb.tasks.repeated_tokens(model, 60, max_period=6, max_offset=4)
    rng = random.Random(0)
    labels = {"relation": [rng.choice("abc") for _ in range(60)], "subject": [str(i) for i in range(60)]}
    result = pb.find.relation_neurons(model, replace(task, labels=labels), shares=[])
    assert int((result["p_adjusted"] < 0.05).sum()) == 0
    best = result["each"].amax(0)
    assert torch.equal(best[best.isfinite()], result.values[result.values.isfinite()])
    assert float((result["held_out"] - result["null_mean"].mean()).mean()) == pytest.approx(0.0, abs=0.05)
    null = random_average_precision(8, 3, 20_000, 0)
    exact = [loops_of(order) for order in itertools.combinations(range(8), 3)]
    assert float(null.mean()) == pytest.approx(sum(exact) / len(exact), abs=0.01)


def loops_of(places: tuple[int, ...]) -> float:
    return sum((i + 1) / (place + 1) for i, place in enumerate(places)) / len(places)


def test_bad_input() -> None:
    model, task, _ = planted_task()
    find = pb.find.relation_neurons
    with pytest.raises(pb.PatchbayError, match=r"no label 'relations'; its labels are relation, subject; did you mean"):
        find(model, task, labels=("relations", "subject"))
    with pytest.raises(pb.PatchbayError, match="labels names two labels"):
        find(model, task, labels=("relation",))
    with pytest.raises(pb.PatchbayError, match=r"no relation 'was' among the values of 'relation':  is,  has"):
        find(model, task, relation="was")
    with pytest.raises(pb.PatchbayError, match="each relation needs two entities or more"):
        find(model, replace(task, labels={**task.labels, "subject": ["one"] * len(task)}))
    with pytest.raises(pb.PatchbayError, match="has the one value"):
        find(model, replace(task, labels={**task.labels, "relation": ["one"] * len(task)}))
    with pytest.raises(pb.PatchbayError, match="shares="):
        find(model, task, shares=[0.9])
    with pytest.raises(pb.PatchbayError, match="pool='first'; possible are last, mean, max, median"):
        find(model, task, pool="first")  # type: ignore[arg-type]

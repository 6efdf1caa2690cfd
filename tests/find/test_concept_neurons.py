"""Concept neurons: planted shifts and neurons are found, t and p equal SciPy's, equal groups give nothing."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import scipy.stats
import torch

import patchbay as pb
from patchbay.find._statistics import student_p, welch
from patchbay.find.concept_neurons import _same, _shuffled
from patchbay.results.untrained import untrained
from patchbay.tiny import planted, twins
from tests.given import entering, lent
from tests.shares import by_turns
from tests.tolerance import close


@functools.cache
def gpt2() -> pb.Model:
    """A random model in which tokens 50 and 51 are one and the same."""
    hf = twins.twin("gpt2", seed=2)
    weight = hf.get_input_embeddings().weight.data
    weight[51] = weight[50]
    return pb.load(hf)


def contrast(n: int, seed: int) -> pb.Task:
    """Random prompts, half of which end in 50 and half in 51."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, 49, (n, 7), generator=generator).tolist()
    ends = [50 + i % 2 for i in range(n)]
    labels = {"group": ["a" if end == 50 else "b" for end in ends]}
    clean = [[*row, end] for row, end in zip(rows, ends, strict=True)]
    return pb.Task("contrast", clean, [3] * n, metric="log_probability", labels=labels)


def test_planted() -> None:
    """One standard deviation added to 50 of 128 neurons at the tokens of one group: these 50 come first, and replicate."""
    model, task = gpt2(), contrast(240, 0)
    port = pb.Part(1, "mlp").port("act")
    spread = pb.run(model, task, taps=[port]).last(port).std(0)
    neurons = torch.randperm(128, generator=torch.Generator().manual_seed(3))[:50]
    shift = torch.zeros(128)
    shift[neurons] = spread[neurons]
    with model.edited(pb.add(port, shift, positions=pb.Token(50))):
        result = pb.find.concept_neurons(model, task, label="group", value="a", pool="last", control="none")
    first = result.top(50)
    truth = {f"L1.N{int(n)}" for n in neurons}
    assert len({str(part) for part in first} & truth) >= 49
    found = result["p_adjusted"] < 0.05
    assert int(found[1, neurons].sum()) >= 49
    assert int(found.sum()) <= 53
    assert result["found"].tolist() == [int(found.sum()), 0.0]
    assert result["held_out_mean"] > 3.0
    assert float(result["null_high"]) < float(result.values[1, neurons].median())


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_planted_neuron(form: Any) -> None:
    """The neuron that fires on one word stands first in the contrast of that word, and far above an untrained network."""
    built = planted.relation_neuron(form=form, seed=1)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    task = pb.Task.from_prompts(model, truth["prompts"], truth["answers"], truth["wrong"])
    task = replace(task, labels={"relation": [prompt.rsplit(" ", 1)[1] for prompt in truth["prompts"]]})
    for relation, neuron in truth["neurons"].items():
        result = pb.find.concept_neurons(model, task, label="relation", value=relation.strip(), pool="last")
        assert str(result.top(1)[0]) == neuron
        assert float(result["difference"].max()) == pytest.approx(truth["activation"], rel=0.05)
        assert result.labels_of("condition") == ["model", "same", "untrained"]
        assert result["found"][1] == 0


def test_reference() -> None:
    """Welch's t, its degrees of freedom and p as SciPy's and as loops; pooled activations as hooks on the plain model."""
    generator = torch.Generator().manual_seed(0)
    for n_a, n_b, scale in ((4, 5, 1.0), (30, 12, 4.0), (300, 240, 0.2)):
        a = torch.randn(n_a, 60, generator=generator).double() + torch.linspace(0, 3, 60).double()
        b = scale * torch.randn(n_b, 60, generator=generator).double()
        t, df = welch(a, b)
        theirs = scipy.stats.ttest_ind(a.numpy(), b.numpy(), equal_var=False)
        assert close(t, torch.tensor(theirs.statistic), dtype=torch.float64)
        assert close(df, torch.tensor(theirs.df), dtype=torch.float64)
        assert torch.allclose(student_p(t, df), torch.tensor(theirs.pvalue), rtol=1e-9, atol=1e-300)
    few = torch.tensor([0.0, 1e-9, 0.3, 2.0, 50.0, 1e6])
    for df in (1.0, 2.5, 1000.0):
        expected = 2 * scipy.stats.t.sf(few.double().numpy(), df)
        assert torch.allclose(student_p(few, torch.tensor(df)), torch.tensor(expected), rtol=1e-9, atol=1e-300)
    model = pb.load(twins.twin("llama"))
    task = pb.tasks.repeated_tokens(model, 8, max_period=6, max_offset=4)
    result = pb.find.concept_neurons(model, task, control="none", batch_size=3)
    rows: dict[str, list[Any]] = {"clean": [], "corrupted": []}
    for name in rows:
        for ids in getattr(task, name):
            seen = entering([layer.mlp.down_proj for layer in model.hf.model.layers], model.hf, ids)
            rows[name].append([[sum(column) / len(column) for column in layer.T.tolist()] for layer in seen])
    for layer in range(2):
        for neuron in range(0, 48, 5):
            a, b = ([row[layer][neuron] for row in rows[name]] for name in rows)
            means = [sum(x) / len(x) for x in (a, b)]
            shares = [sum((v - m) ** 2 for v in x) / (len(x) - 1) / len(x) for x, m in zip((a, b), means, strict=True)]
            t = (means[0] - means[1]) / sum(shares) ** 0.5
            assert float(result.values[layer, neuron]) == pytest.approx(t, rel=1e-3, abs=1e-3)
            df = sum(shares) ** 2 / sum(s**2 / (len(a) - 1) for s in shares)
            assert float(result["p"][layer, neuron]) == pytest.approx(2 * scipy.stats.t.sf(abs(t), df), abs=1e-3)
    halves = [result[name].flatten().double() for name in ("first", "held_out")]
    picked = [half.argsort(descending=True, stable=True)[: round(0.01 * len(half))] for half in halves]
    assert torch.isclose(result["held_out_mean"].double(), halves[1][picked[0]].mean(), rtol=1e-4), (
        "chosen on the first"
    )
    assert float(result["dice"]) == len(set(picked[0].tolist()) & set(picked[1].tolist())) / len(picked[0])


@pytest.mark.parametrize("seed", [0, 1])
def test_null(seed: int) -> None:
    """Groups that differ in nothing: no neuron is found, halves do not agree, and p is uniform."""
    result = pb.find.concept_neurons(gpt2(), contrast(120, seed), label="group", pool="last", control="none", seed=seed)
    assert result["found"].tolist() == [0.0, 0.0]
    assert abs(float(result["held_out_mean"])) < 1.5
    assert float(result.values.abs().max()) < 1.25 * float(result["null_high"])
    assert float(result["p"].mean()) == pytest.approx(0.5, abs=0.15)


def test_one_shuffle_in_twenty_is_above_the_null() -> None:
    """The largest |t| of all neurons, of 200 other shuffles."""
    seen = torch.randn(40, 1, 30, generator=torch.Generator().manual_seed(0))
    inside = torch.arange(40) < 20
    high, generator, above = _shuffled(seen, inside, 0), torch.Generator().manual_seed(7), 0
    for _ in range(200):
        dealt = inside[torch.randperm(40, generator=generator)]
        above += float(welch(seen[dealt, 0], seen[~dealt, 0])[0].abs().max()) > float(high)
    assert 1 <= above <= 24
    assert _same(seen, 0) != _same(seen, 1), "other halves of one group"


def test_neurons_that_never_vary_have_a_finite_t() -> None:
    a, b = torch.ones(6, 3), torch.ones(6, 3)
    a[:, 1], a[:, 2] = 2.0, 1.0 + 1e-8
    t, df = welch(a, b)
    assert t[0] == 0
    assert t[1].isfinite()
    assert t[1] > 1e5
    assert bool(df.isfinite().all())
    assert student_p(t, df)[0] == 1


@pytest.mark.parametrize("name", by_turns(twins.FAMILY_CONFIGS, of=6, start=2))
def test_an_untrained_network_of_every_family_can_be_made(name: str) -> None:
    model = lent(name)
    if any("mlp.act" in model.signals(i) for i in range(model.n_layers)):
        made = untrained(model, 0)
        assert isinstance(made, pb.Model), made
        assert made.fingerprint != model.fingerprint
        assert made.family == model.family


def test_the_trained_model_is_more_selective_than_untrained_weights() -> None:
    """The localiser's control on `tiny`: months against other runs of words, with last tokens all commas."""
    model = pb.load("tiny")
    task = pb.tasks.successor(model, 60, length=4)
    result = pb.find.concept_neurons(model, task, label="kind", value="months", pool="last")
    trained, same, fresh = result["found"].tolist()
    assert trained > 2 * fresh
    assert same == 0
    assert result["dice"] > 5 * result["dice_null"]


def test_bad_input() -> None:
    model, task = gpt2(), contrast(8, 0)
    find = pb.find.concept_neurons
    with pytest.raises(pb.PatchbayError, match=r"has no corrupted twins .* give label=, one of group"):
        find(model, task)
    with pytest.raises(pb.PatchbayError, match=r"no label 'groups'.* did you mean 'group'"):
        find(model, task, label="groups")
    with pytest.raises(pb.PatchbayError, match="asked for the group 'c' of group; there are a, b"):
        find(model, task, label="group", value="c")
    with pytest.raises(pb.PatchbayError, match=r"needs 4 prompts or more in every group; 'b' has 3"):
        find(model, task[:7], label="group")
    with pytest.raises(pb.PatchbayError, match="takes a Task, got list"):
        find(model, [[1, 2]])  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="possible are untrained, none"):
        find(model, task, label="group", control="random")  # type: ignore[arg-type]

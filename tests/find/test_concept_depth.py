"""Concept depth: the planted layer is the jump, the probe is at its optimum, shuffled labels and random models say nothing."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.find import _probe
from patchbay.find._states import permutations
from patchbay.find.concept_depth import _curve, _shuffled
from patchbay.tiny import planted, planted_depth, twins
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.find.concept_depth")
concept_depth: Any = module.concept_depth
WORDS = list(range(3, 52))  # names, objects, numbers, days, months; 52 is " the"
LAST = 52


def flagged(
    layer: int, form: Any = "gpt2", seed: int = 0, **options: Any
) -> tuple[pb.Model, list[list[int]], list[str]]:
    """A prompt for each word: three others, the word, " the". The word carries 1 or -1, read at " the" after `layer` alone."""
    values = [1.0 if i % 2 else -1.0 for i in range(64)]
    built = planted_depth.carried(values, layer=layer, form=form, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    prompts = [[*torch.randint(3, 52, (3,), generator=generator).tolist(), word, LAST] for word in WORDS]
    return pb.load(built.model, built.tokenizer), prompts, ["odd" if word % 2 else "even" for word in WORDS]


@pytest.mark.parametrize(("layer", "form"), [(0, "gpt2"), (2, "gpt2"), (1, "llama")])
def test_planted(layer: int, form: Any) -> None:
    """Chance before the planted layer, all right from it on: the jump is there and nowhere else."""
    model, prompts, labels = flagged(layer, form)
    result = concept_depth(model, prompts, labels, draws=30)
    rows = ["embed", "L0", "L1", "L2", "L3"]
    assert result.labels_of("layer") == rows
    before, after = result.values[: layer + 1], result.values[layer + 1 :]
    assert after.min() == 1.0
    assert before.max() < 0.75
    assert result["auc"][layer + 1 :].min() == 1.0
    depth = result.tables["depth"][0]
    assert depth["emerges"] == f"L{layer}"
    assert result["variation"][layer + 1] >= 1.1
    assert result["p"][layer + 1 :].max() < 0.05
    assert result["p"][: layer + 1].min() > 0.05
    assert depth["converge"] == (1.0 if layer < 3 else None)


@pytest.mark.slow  # probes at every depth, several times
def test_planted_under_noise_and_rounding() -> None:
    """Noise as large as the signal hides the concept, a little does not; eight bits keep it, four lose it; the lent model is not touched."""
    model, prompts, labels = flagged(1, d_model=256, noise=0.02)
    weights = {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}
    result = concept_depth(
        model, prompts, labels, draws=5, conditions=["noise 0.05", "noise 30", "int8", "int4"], folds=3
    )
    under = dict(zip(result.labels_of("condition"), result["accuracy_under"], strict=True))
    assert torch.equal(under["plain"], result.values)
    assert under["int8"][2] == 1.0
    assert under["int4"][2] < 0.8
    assert under["noise 0.05"][2] > 0.9
    assert under["noise 30"][2] < 0.8
    assert [row["condition"] for row in result.tables["depth"]] == list(under)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.hf.state_dict().items())


def test_reference() -> None:
    """Five folds by hand: every prompt by the probe that did not see it, whose gradient, written out, is zero."""
    model = pb.load(twins.twin("llama"))
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, 96, (30, 6), generator=generator).tolist()
    labels = [["a", "b", "c"][ids[-1] % 3] for ids in prompts]
    result = concept_depth(model, prompts, labels, draws=3, folds=3, batch_size=7)
    target = torch.tensor(["abc".index(label) for label in labels])
    fold = _probe.stratified(target, 3, 0)
    with torch.no_grad():
        hidden = model.hf(torch.tensor(prompts), output_hidden_states=True).hidden_states
    for row, layer in enumerate(result.labels_of("layer")[:2]):  # the last of hidden_states is behind the final norm
        h = hidden[row][:, -1].double()
        h = h - h.mean(0)
        h = h / h.square().mean().sqrt()
        right = 0
        for k in range(3):
            fit = _probe.logistic(h, target[None], (fold != k)[None])
            w, b = fit.weights[0], fit.intercepts[0]
            slope_w, slope_b = w.clone(), torch.zeros(3, dtype=torch.float64)  # penalty 1: its gradient is w
            for i in range(30):
                if fold[i] != k:
                    scores = [float(h[i] @ w[:, c] + b[c]) for c in range(3)]
                    total = sum(torch.tensor(s).double().exp() for s in scores)
                    for c in range(3):
                        p = torch.tensor(scores[c]).double().exp() / total - float(target[i] == c)
                        slope_w[:, c] += p * h[i]
                        slope_b[c] += p
            assert slope_w.abs().max() < 1e-5
            assert slope_b.abs().max() < 1e-5
            right += sum(int((h[i] @ w + b).argmax() == target[i]) for i in range(30) if fold[i] == k)
        assert float(result.values[row]) == pytest.approx(right / 30), layer
        order = torch.cat([torch.arange(30)[None], permutations(30, 3, 0)])
        said = _probe.held_out_scores(h, target[order], fold[order]).argmax(-1)
        null = (said == target[order]).double().mean(1)[1:]  # of the shuffles alone
        assert close(result["null_mean"][row], null.mean()), layer
        assert close(result["null_high"][row], null.quantile(0.95)), layer


def test_areas_are_of_every_fold_and_p_of_the_best_layer() -> None:
    """The null is what the best layer of a shuffle reads; areas are counted pair by pair in the fold that was held out."""
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(3, 30, 4, generator=generator).double()
    target = torch.arange(30) % 2
    states[1, :, 0] += target
    fold = _probe.stratified(target, 3, 0)
    labels, folds = _shuffled(target, fold, 9, 0)
    assert not torch.equal(labels, _shuffled(target, fold, 9, 1)[0]), "another seed, other shuffles"
    found = _curve(states, labels, folds)
    said = [_probe.held_out_scores(_probe.scaled(state), labels, folds) for state in states]
    right = torch.stack([(one.argmax(-1) == labels).double().mean(1) for one in said])  # [layer, 1 + draw]
    best = right[:, 1:].amax(0)
    assert close(
        found["p"], torch.stack([(1 + (best >= own - 1e-12).sum()) / 10 for own in right[:, 0]]).double(), of=1.0
    )
    areas = []
    for fold in range(3):
        for label in (0, 1):
            one = [float(said[1][0, i, label]) for i in range(30) if folds[0, i] == fold and labels[0, i] == label]
            other = [float(said[1][0, i, label]) for i in range(30) if folds[0, i] == fold and labels[0, i] != label]
            areas.append(sum((a > b) + 0.5 * (a == b) for a in one for b in other) / (len(one) * len(other)))
    assert close(float(found["auc"][1]), sum(areas) / len(areas), dtype=torch.float64, of=1.0)


def test_the_probe_finds_a_closed_form() -> None:
    """Two points at +-x: the penalised weight solves w = x (1 - tanh(w x)) / 1 along the axis, by symmetry."""
    x = torch.tensor([[2.0, 0.0], [-2.0, 0.0]], dtype=torch.float64)
    fit = _probe.logistic(x, torch.tensor([[1, 0]]), torch.ones(1, 2).bool())
    v = float(fit.weights[0, 0, 1])
    assert close(fit.weights[0, 0, 0], -v)
    assert close(fit.intercepts, 0.0, of=v)
    low, high = 0.0, 10.0  # the derivative in v: 2 v - 2 * 2 * 2 * sigmoid(-4 v) = 0, by bisection
    for _ in range(60):
        middle = (low + high) / 2
        slope = 2 * middle - 8.0 / (1.0 + torch.tensor(4 * middle).double().exp())
        low, high = (middle, high) if slope < 0 else (low, middle)
    assert close(v, low, of=1.0)
    assert fit.gradient < 1e-5


def test_a_turned_stream_gives_the_same_and_auc_is_the_count_of_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 10, generator=generator, dtype=torch.float64)
    labels = torch.randint(2, (24,), generator=generator)
    fold = torch.arange(24)[None] % 3
    turn = torch.linalg.qr(torch.randn(10, 10, generator=generator, dtype=torch.float64))[0]
    plain = _probe.held_out_scores(_probe.scaled(x), labels[None], fold)
    turned = _probe.held_out_scores(_probe.scaled(x @ turn), labels[None], fold)
    assert close(plain, turned)
    scores = torch.randint(4, (12,), generator=generator).double()
    positive = torch.arange(12) % 3 == 0
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[positive].tolist() for b in scores[~positive].tolist()]
    assert _probe.auc(scores, positive) == pytest.approx(sum(pairs) / len(pairs))


def test_rounding_is_to_the_nearest_level_of_a_row() -> None:
    """Three bits have levels -3 .. 3; embeddings, norms and the unembedding stay as they are."""
    model = pb.load(twins.twin("llama"))
    copied = module._rounded(model, 3).hf
    rounded, own = (hf.model.layers[1].mlp.up_proj.weight for hf in (copied, model.hf))
    for row in range(0, len(own), 7):
        step = max(abs(x) for x in own[row].tolist()) / 3
        for x, y in zip(own[row].tolist(), rounded[row].tolist(), strict=True):
            assert abs(y / step - round(y / step)) < 1e-5
            assert abs(x - y) <= step / 2 + 1e-6
    assert torch.equal(copied.get_input_embeddings().weight, model.hf.get_input_embeddings().weight)
    assert torch.equal(copied.lm_head.weight, model.hf.lm_head.weight)
    assert torch.equal(copied.model.layers[0].input_layernorm.weight, model.hf.model.layers[0].input_layernorm.weight)
    with (
        pytest.raises(pb.PatchbayError, match="inside an `edited` block"),
        model.edited(pb.zero(model.layers[0].mlp.out)),
    ):
        concept_depth(model, [[i, 5] for i in range(6, 18)], [0, 1] * 6, draws=1, folds=2, conditions=["int4"])


def test_null() -> None:
    """Labels that nothing in the text says: no layer is above its shuffles, whatever the seed."""
    built = planted.null(seed=0)
    model = pb.load(built.model, built.tokenizer)
    lowest = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        prompts = torch.randint(3, 60, (30, 5), generator=generator).tolist()
        labels = torch.randint(2, (30,), generator=generator).tolist()
        result = concept_depth(model, prompts, labels, draws=30, folds=3, seed=seed)
        lowest.append(float(result["p"].min()))
        assert (result["null_mean"] - 0.5).abs().max() < 0.1
    assert max(lowest) > 0.2
    assert min(lowest) > 0.03


def test_site_and_families() -> None:
    """A state-space model has its stream; a site that a family lacks is refused with those there are."""
    prompts = [[i, 90 - i, 5] for i in range(3, 15)]
    labels = [i % 2 for i in range(12)]
    model = pb.load(twins.twin("mamba2"))
    assert concept_depth(model, prompts, labels, draws=2, folds=2).labels_of("layer")[0] == "embed"
    with pytest.raises(
        pb.PatchbayError, match=r"site='mlp.in': no layer of this .* model has it; possible are resid_out"
    ):
        concept_depth(model, prompts, labels, site="mlp.in")
    other = pb.load(twins.twin("gpt2"))
    assert concept_depth(other, prompts, labels, site="mlp.in", draws=2, folds=2).labels_of("layer") == ["L0", "L1"]


def test_a_layer_that_gets_none_right_counts_as_one_right() -> None:
    """So that the next one's variation is a number: 4 of 4 after 0 of 4 is a fourfold rise."""
    labels, folds = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 1]]), torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])
    wrong = torch.tensor(
        [[1.0, 0], [0, 1.0], [-1.0, 0], [0, -1.0]], dtype=torch.float64
    )  # each half teaches the other wrongly
    right = torch.tensor([[1.0, 0], [-1.0, 0], [1.0, 0], [-1.0, 0]], dtype=torch.float64)
    curve = _curve(torch.stack([wrong, right]), labels, folds)
    assert curve["accuracy"][1] == 1.0
    assert float(curve["variation"][1]) == 1.0 / max(float(curve["accuracy"][0]), 0.25)
    assert curve["accuracy"][0] == 0.0


def test_bad_input() -> None:
    built = planted.null()
    model = pb.load(built.model, built.tokenizer)
    prompts = [[i, 5] for i in range(6, 18)]
    with pytest.raises(pb.PatchbayError, match="12 prompts and 3 labels"):
        concept_depth(model, prompts, [0, 1, 0])
    with pytest.raises(pb.PatchbayError, match="the one class"):
        concept_depth(model, prompts, [1] * 12)
    with pytest.raises(pb.PatchbayError, match=r"folds=7.*the classes have \[6, 6\]"):
        concept_depth(model, prompts, [0, 1] * 6, folds=7)
    with pytest.raises(pb.PatchbayError, match="one prompt has two labels"):
        concept_depth(model, [*prompts[:-1], prompts[0]], [0, 1] * 6)
    with pytest.raises(pb.PatchbayError, match="condition 'fog'; possible are 'noise 0.5'"):
        concept_depth(model, prompts, [0, 1] * 6, draws=1, folds=2, conditions=["fog"])
    with pytest.raises(pb.PatchbayError, match="site='nowhere'; possible are resid_out"):
        concept_depth(model, prompts, [0, 1] * 6, site="nowhere")
    again = concept_depth(model, [*prompts, prompts[0]], [0, 1] * 6 + [0], draws=1, folds=2)
    assert any("1 prompts that came again" in note for note in again.notes)

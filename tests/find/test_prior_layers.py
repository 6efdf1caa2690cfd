"""Prior layers: the planted layer is where answers begin to follow their prior, asked or not; shuffled priors give nothing."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.tiny import planted, planted_depth, twins
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.find.prior_layers")
prior_layers: Any = module.prior_layers


def task_of(answers: list[int], seed: int = 0) -> pb.Task:
    """Random words and, as the right answer, a token that they do not say."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 52, (len(answers), 5), generator=generator).tolist()
    return pb.Task("random", words, answers, metric="log_probability")


@pytest.mark.parametrize(("layer", "form"), [(0, "gpt2"), (2, "gpt2"), (1, "llama")])
def test_planted(layer: int, form: Any) -> None:
    """A layer adds beta x log prior to every logit: the correlation steps there, for answers that were not asked as well."""
    built = planted_depth.bias(layer=layer, form=form, strength=12.0, seed=layer)
    model = pb.load(built.model, built.tokenizer)
    answers = list(range(3, 63))
    task = task_of(answers)
    result = prior_layers(model, task, prior=[built.truth["log_prior"][token] for token in answers], draws=200)
    before, after = result.values[: layer + 1], result.values[layer + 1 :]
    assert after.min() > 0.9
    assert before.abs().max() < 0.4
    assert result["unasked"][layer + 1 :].min() > 0.9
    assert result["unasked"][: layer + 1].abs().max() < 0.4
    assert (after > result["null_high"][layer + 1 :]).all()
    assert result["p"][layer + 1 :].max() < 0.05
    assert "largest rise" in result.notes[0]
    assert result.notes[0].endswith(f"at L{layer}")
    measured = prior_layers(model, task, neutral=task_of(answers[:30], seed=9).clean, draws=50)  # the model's own prior
    assert measured.values[layer + 1 :].min() > 0.9


def test_planted_strength_zero_is_no_prior() -> None:
    built = planted_depth.bias(layer=1, strength=0.0)
    model = pb.load(built.model, built.tokenizer)
    answers = list(range(3, 63))
    result = prior_layers(model, task_of(answers), prior=[built.truth["log_prior"][t] for t in answers], draws=100)
    assert result.values.abs().max() < 0.4


def test_planted_probe() -> None:
    """A cue carries its answer's prior, and a head of layer 1 brings it to the last token: there the probe can read it."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, generator=generator).tolist()
    built = planted_depth.carried(values, layer=1)
    model = pb.load(built.model, built.tokenizer)
    cues = list(range(3, 52))
    answers = [cue + 12 if cue < 40 else cue - 37 for cue in cues]
    task = pb.Task("cued", [[5, 6, cue, 52] for cue in cues], answers, metric="log_probability")
    result = prior_layers(model, task, prior=[values[cue] for cue in cues], draws=100)
    assert result["probe"][2:].min() > 0.9
    assert (result["probe"][2:] > result["probe_high"][2:]).all()
    assert result["probe_p"][2:].max() < 0.05
    assert result["probe"][:2].max() < 0.5


def test_reference() -> None:
    """Ranks, the lens and the ridge regressions of two folds written out, answers kept together."""
    hf = twins.twin("gpt2")
    model = pb.load(hf)
    generator = torch.Generator().manual_seed(4)
    answers = [10, 11, 12, 13, 14, 15, 10, 11, 12, 13]
    prompts = torch.randint(3, 96, (10, 4), generator=generator).tolist()
    of = {token: float(torch.randn(1, generator=generator)) for token in range(10, 16)}
    result = prior_layers(
        model,
        pb.Task("own", prompts, answers, metric="log_probability"),
        prior=[of[t] for t in answers],
        folds=2,
        draws=10,
        batch_size=3,
    )

    def ranks(values: list[float]) -> torch.Tensor:
        below = [sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]
        return torch.tensor(below).double() - torch.tensor(below).double().mean()

    def spearman(a: list[float], b: list[float]) -> float:
        x, y = ranks(a), ranks(b)
        return float(x @ y / (x.norm() * y.norm()))

    prior = [of[token] for token in answers]
    fold = module._folds(6, 2, 0)
    for layer in range(2):
        states, said = [], []
        for ids, token in zip(prompts, answers, strict=True):
            with torch.no_grad():
                hidden = hf(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0, -1]
                states.append(hidden.double())
                said.append(float(hf.lm_head(hf.transformer.ln_f(hidden)).double().log_softmax(-1)[token]))
        assert close(float(result.values[layer]), spearman(said, prior), of=result.values)
        x = torch.stack(states)
        x = x - x.mean(0)
        x = x / x.square().mean().sqrt()
        predicted = [0.0] * 10
        for k in range(2):
            train = [i for i, token in enumerate(answers) if fold[token - 10] != k]
            mean = x[train].mean(0)
            centred, y = x[train] - mean, torch.tensor([prior[i] for i in train]).double()
            penalty = centred.square().sum() / min(centred.shape)
            gram = centred.T @ centred + penalty * torch.eye(x.shape[1], dtype=torch.float64)
            w = torch.linalg.solve(gram, centred.T @ (y - y.mean()))
            for i in set(range(10)) - set(train):
                predicted[i] = float((x[i] - mean) @ w + y.mean())
        assert close(float(result["probe"][layer]), spearman(predicted, prior), of=result["probe"])


def test_null() -> None:
    """Random priors: inside the band at nearly all layers and seeds, by lens and by probe."""
    built = planted.null(seed=1)
    model = pb.load(built.model, built.tokenizer)
    answers = list(range(3, 63))
    outside, cells = 0, 0
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        prior = torch.randn(60, generator=generator).tolist()
        result = prior_layers(model, task_of(answers, seed), prior=prior, draws=100)
        outside += int(((result.values < result["null_low"]) | (result.values > result["null_high"])).sum())
        outside += int(((result["probe"] < result["probe_low"]) | (result["probe"] > result["probe_high"])).sum())
        cells += 6
        assert result["p"].min() > 0.01
        assert result["probe_p"].min() > 0.01
    assert outside <= 0.25 * cells


def test_one_answer_many_times_is_one_draw() -> None:
    """Ten prompts of each of six answers, which the lens gives one value each: the band is as wide as that of six."""
    built = planted_depth.bias(layer=0, strength=12.0)
    model = pb.load(built.model, built.tokenizer)
    answers = [token for token in range(3, 9) for _ in range(10)]
    prior = [float(token) for token in answers]  # not the planted one
    result = prior_layers(model, task_of(answers), prior=prior, draws=200)
    assert result["null_high"][-1] > 0.5
    assert result["p"][-1] > 0.05
    assert len(result.tables["prior"]) == 6


def test_bad_input_and_state_space_models() -> None:
    built = planted.null()
    model = pb.load(built.model, built.tokenizer)
    task = task_of(list(range(3, 13)))
    with pytest.raises(pb.PatchbayError, match="give prior= .* or neutral="):
        prior_layers(model, task)
    with pytest.raises(pb.PatchbayError, match="prior has 2 values for 10 prompts"):
        prior_layers(model, task, prior=[0.0, 1.0])
    with pytest.raises(pb.PatchbayError, match="all answers have one prior"):
        prior_layers(model, task, prior=[1.0] * 10)
    with pytest.raises(pb.PatchbayError, match="2 different answers"):
        prior_layers(model, task_of([3, 4, 3, 4]), prior=[0.0, 1.0, 0.0, 1.0])
    with pytest.raises(pb.PatchbayError, match="one finite number"):
        prior_layers(model, task_of([3, 4, 5, 6, 7, 3]), prior=[0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    mamba = prior_layers(pb.load(twins.twin("mamba2")), task, neutral=[[5, 6], [7]], draws=5)
    assert mamba.values.isfinite().all()

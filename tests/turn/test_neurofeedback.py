"""Neurofeedback: a planted reporter reports and does not control, a planted imitator controls, a random model does neither."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.tiny import planted, twins
from patchbay.tiny.planted import COPY_STRENGTH, LOGIT_SCALE, SHARPNESS
from patchbay.tiny.planted_canvas import Canvas
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.turn.neurofeedback")
neurofeedback: Any = module.neurofeedback
ZERO, ONE = 62, 63  # the marks: a colon and a line break
SENTENCES = [[word] for word in range(3, 51)]
OPTIONS: dict[str, Any] = {"marks": ([ZERO], [ONE]), "layer": 0}


def circuit(kind: str, seed: int = 0) -> pb.Model:
    """Words carry 1 or -1. "report": look at the marks that stand behind words of the own sign, and say them. "imitate": from a
    word behind a mark look at words behind the same mark, and take over their sign."""
    canvas = Canvas("gpt2", seed, n_layers=2)
    own, copied = canvas.take(1, protect=True), canvas.take(1, protect=True)
    words, behind = canvas.take(canvas.n_vocab), canvas.take(2)
    sign = torch.tensor([0.0 if word in (ZERO, ONE) else 1.0 if word % 2 else -1.0 for word in range(64)])
    canvas.embed(words + sign[:, None] * own)
    marks = words[[ZERO, ONE]]
    first, second = canvas.pick_head(0), canvas.pick_head(1)
    q, k = canvas.offset_maps(1, SHARPNESS)
    v = torch.cat([own, marks]).T  # [d_model, 3]
    canvas.set_head(0, first, q=q, k=k, v=v, o=torch.cat([4.0 * copied, behind]))
    slots = canvas.slots(2)
    if kind == "report":
        canvas.set_head(
            1, second, q=SHARPNESS * own.T @ slots[:1], k=copied.T @ slots[:1], v=marks.T, o=COPY_STRENGTH * marks
        )
    else:
        canvas.set_head(
            1, second, q=2 * SHARPNESS * behind.T @ slots, k=behind.T @ slots, v=own.T, o=COPY_STRENGTH * own
        )
    canvas.unembed(LOGIT_SCALE * words)
    from patchbay.tiny.planted_truth import record

    built = record(canvas, kind)
    return pb.load(built.model, built.tokenizer)


def test_planted() -> None:
    """The reporter is right about the planted sign, which is component 1, at chance about component 6, and controls nothing."""
    model = circuit("report")
    knob = neurofeedback(model, SENTENCES, shots=(2, 8), **OPTIONS)
    report, control = knob.evidence["report"], knob.evidence["control"]
    assert report.values.min() > 0.95
    assert report["p"].max() < 0.05
    assert (report["null_mean"] - 0.5).abs().max() < 0.2
    assert report["linear"].min() > 0.9
    assert control["p"].min() > 0.05
    other = neurofeedback(model, SENTENCES, axis=6, shots=(2, 8), **OPTIONS)
    assert (other.evidence["report"].values - 0.5).abs().max() < 0.3
    assert other.evidence["report"]["p"].min() > 0.05


def test_planted_control() -> None:
    """The imitator's word takes over the sign of the examples whose mark is asked; its control is far from other axes'."""
    knob = neurofeedback(circuit("imitate"), SENTENCES, shots=(2, 8), marks=([ZERO], [ONE]), layer=1)
    control = knob.evidence["control"]
    assert control.values.min() > 0.8
    assert control["low"].min() > 0
    assert control["p"].max() < 0.05
    assert (control.values > control["null_high"]).all()


def test_planted_axis_and_knob() -> None:
    """Component 1 and a probe for the signs are the planted axis; the knob at 1 moves the stream by one standard deviation along it."""
    model = circuit("report")
    knob = neurofeedback(model, SENTENCES, **OPTIONS)
    probe = neurofeedback(model, SENTENCES, axis=["odd" if ids[0] % 2 else "even" for ids in SENTENCES], **OPTIONS)
    vectors = [torch.as_tensor(k.edits[0].value).double() for k in (knob, probe)]
    assert abs(float(torch.nn.functional.cosine_similarity(*vectors, dim=0))) > 0.97
    port = model.layers[0].resid_out
    plain = pb.run(model, SENTENCES, taps=[port])[port]
    turned = pb.run(model, SENTENCES, taps=[port], edits=[knob])[port]
    assert close(turned - plain, vectors[0].float().expand_as(plain))
    w = vectors[0] / vectors[0].norm()
    assert float((plain[:, 0].double() @ w).std()) == pytest.approx(float(vectors[0].norm()), rel=0.15)
    assert knob.neutral == 0.0


def test_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores, prompts, reports and Cohen's d of a twin, one prompt at a time, from the examples that were drawn."""
    hf = twins.twin("gpt2")
    model = pb.load(hf)
    generator = torch.Generator().manual_seed(3)
    sentences = torch.randint(3, 90, (12, 3), generator=generator).tolist()
    marks = ([91, 92, 95], [91, 93, 95])
    asked_of: list[list[list[int]]] = []
    gap = module._gap

    def seen(given: Any, prompts: list[list[int]]) -> torch.Tensor:
        asked_of.append(prompts)
        return gap(given, prompts)

    monkeypatch.setattr(module, "_gap", seen)
    knob = neurofeedback(model, sentences, marks=marks, layer=0, shots=(2,), batch_size=5)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    fit, test = order[:6], order[6:]

    def state(ids: list[int], n: int) -> torch.Tensor:
        with torch.no_grad():
            return hf(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0, -n:].double().mean(0)

    states = torch.stack([state(ids, 3) for ids in sentences])
    mean = states[fit].mean(0)
    w = torch.as_tensor(knob.edits[0].value).double()
    w = w / w.norm()
    covariance = (states[fit] - mean).T @ (states[fit] - mean)
    assert close(covariance @ w, torch.linalg.eigvalsh(covariance)[-1] * w)
    label = {i: int((states[i] - mean) @ w >= 0) for i in range(12)}
    least = min(sum(label[i] == side for i in test) for side in (0, 1))
    held = sorted([i for side in (0, 1) for i in [j for j in test if label[j] == side][:least]], key=test.index)
    drawn = module._examples(torch.tensor([label[i] for i in fit]), 2, len(held), 2)
    right, groups = [], {0: [], 1: []}
    for n, (row, i) in enumerate(zip(drawn, held, strict=True)):
        examples = [fit[j] for j in row]
        ids = [token for j in examples for token in [*sentences[j], *marks[label[j]]]] + sentences[i] + [91]
        assert asked_of[0][n] == ids
        with torch.no_grad():
            logits = hf(torch.tensor([ids])).logits[0, -1]
        right.append(int(logits[93] > logits[92]) == label[i])
        sums = {0: 0.0, 1: 0.0}
        for flip in (0, 1):
            for asked in (0, 1):
                before = [token for j in examples for token in [*marks[label[j] ^ flip], *sentences[j]]]
                sums[asked ^ flip] += float(state([*before, *marks[asked], *sentences[i]], 3) @ w) / 2
        for side in (0, 1):
            groups[side].append(sums[side])
    assert float(knob.evidence["report"].values[0]) == pytest.approx(sum(right) / len(right))
    one, zero = (torch.tensor(groups[side]).double() for side in (1, 0))
    pooled = ((one.var() + zero.var()) / 2).sqrt()
    assert close(
        float(knob.evidence["control"].values[0]),
        float((one.mean() - zero.mean()) / pooled),
        of=1.0,
    )


def test_cohens_d_of_a_known_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    one, zero = torch.randn(2, 2000, 1, generator=generator, dtype=torch.float64)
    assert float(module.cohens_d(one + 0.7, zero)[0]) == pytest.approx(0.7, abs=1.96 * (2 / 2000) ** 0.5)


def test_null() -> None:
    """A random model: reports at its null, d inside its interval around 0."""
    built = planted.null(seed=0)
    model = pb.load(built.model, built.tokenizer)
    knob = neurofeedback(
        model, [[a, b] for a, b in zip(range(3, 51), range(50, 2, -1), strict=True)], shots=(2, 6), **OPTIONS
    )
    assert knob.evidence["report"]["p"].min() > 0.05
    assert (knob.evidence["report"].values - 0.5).abs().max() < 0.3
    assert knob.evidence["control"]["p"].min() > 0.01
    assert knob.evidence["control"].values.abs().max() < 0.8


def test_bad_input() -> None:
    built = planted.null()
    model = pb.load(built.model, built.tokenizer)
    with pytest.raises(pb.PatchbayError, match="even numbers of 2 or more"):
        neurofeedback(model, SENTENCES, shots=(3,), **OPTIONS)
    with pytest.raises(pb.PatchbayError, match="two of equal length"):
        neurofeedback(model, SENTENCES, marks=([5], [6, 7]))
    with pytest.raises(pb.PatchbayError, match="they differ at 0 places"):
        neurofeedback(model, SENTENCES, marks=([5], [5]))
    with pytest.raises(pb.PatchbayError, match="components 1 to"):
        neurofeedback(model, SENTENCES, axis=99, **OPTIONS)
    with pytest.raises(pb.PatchbayError, match="two kinds, one for each"):
        neurofeedback(model, SENTENCES, axis=["a", "b"], **OPTIONS)
    with pytest.raises(pb.PatchbayError, match="40 examples: the half"):
        neurofeedback(model, SENTENCES, shots=(40,), **OPTIONS)
    with pytest.raises(pb.PatchbayError, match="fewer shots"):
        neurofeedback(model, [[a] * 20 for a in range(3, 51)], shots=(10,), **OPTIONS)
    with pytest.raises(pb.PatchbayError, match="layer 7 asked"):
        neurofeedback(model, SENTENCES, marks=([ZERO], [ONE]), layer=7)
    mamba = pb.load(twins.twin("mamba2"))
    assert (
        neurofeedback(mamba, SENTENCES[:12], shots=(2,), marks=([ZERO], [ONE]))
        .evidence["report"]
        .values.isfinite()
        .all()
    )


def test_halves_and_examples_hang_on_the_seed_and_the_centre_on_the_fitting_half(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    halves: list[Any] = []
    seeds: list[int] = []
    half, examples = module._half, module._examples
    monkeypatch.setattr(module, "_half", lambda *given: halves.append(given) or half(*given))
    monkeypatch.setattr(module, "_examples", lambda *given: seeds.append(given[-1]) or examples(*given))
    model = pb.load(twins.twin("gpt2"))
    prompts = torch.randint(3, 90, (30, 5), generator=torch.Generator().manual_seed(0)).tolist()
    for seed in (0, 7):
        pb.turn.neurofeedback(model, prompts, marks=([94], [95]), shots=[2, 4], seed=seed)
    assert seeds == [2, 4, 9, 11]
    for fit, test in (halves[:2], halves[2:]):
        _, states, places, w, centre = fit
        assert close(centre, float((states[places] @ w).mean()), dtype=torch.float64, of=states)
        assert sorted([*places, *test[2]]) == list(range(30))
    assert set(halves[0][2]) != set(halves[2][2])

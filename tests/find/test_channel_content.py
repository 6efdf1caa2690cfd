"""find.channel_content: a planted copy head, the numbers written out, shuffled labels, refusals."""

from __future__ import annotations

import functools

import pytest
import torch

import patchbay as pb
from patchbay.tiny import planted, twins
from tests.tolerance import close


@functools.cache
def copying() -> tuple[pb.Model, planted.Planted]:
    made = planted.copy(form="gpt2")
    return pb.load(made.model, made.tokenizer), made


def texts(made: planted.Planted) -> list[str]:
    return list(made.truth["prompts"])


def test_planted() -> None:
    """The copy head writes the code of the one marked word of a prompt: a component that separates words is explained by the
    word that is copied, far more than by anything else."""
    model, made = copying()
    words = texts(made)
    ids = model.encode(words)
    marked = [next(i for i in row if i in made.truth["marked_ids"]) for row in ids]
    prompts = [row for row in ids for _ in range(2)]  # every prompt in both halves
    task = pb.Task(
        "copying",
        prompts,
        [m for m in marked for _ in range(2)],
        [[m + 1] for m in marked for _ in range(2)],
        labels={"marked": [m for m in marked for _ in range(2)]},
    )
    result = pb.find.channel_content(model, task, f"{made.truth['copy']}.C0", draws=99)
    explained = dict(zip(result.labels_of("statistic"), result["explained"].tolist(), strict=True))
    p = dict(zip(result.labels_of("statistic"), result["p"].tolist(), strict=True))
    assert explained["marked"] > 0.7
    assert p["marked"] <= 0.06
    assert explained["marked"] > 2 * max(value for name, value in explained.items() if name != "marked")
    spread = result["coordinate"][:, -1]
    assert close(spread[::2], spread[1::2])
    assert {"raises", "lowers", "reads", "strongest"} <= set(result.tables)


def test_reference() -> None:
    """Coordinate = (what the head writes) . v by the ports; tokens by plain products; R^2 of duplicates by plain loops."""
    model = pb.load(twins.twin("gpt2"))
    prompts = torch.randint(
        5, 14, (6, 9), generator=torch.Generator().manual_seed(1)
    ).tolist()  # each repeats elsewhere
    result = pb.find.channel_content(model, prompts, "L1.H2.C3", draws=5)
    head = model.layers[1].heads[2]
    out = pb.run(model, prompts, taps=[head.out])[head.out].double()
    w = head.weights(fold_norm=True)
    vh = torch.linalg.svd((w["W_V"] @ w["W_O"]).detach().double()).Vh
    sign = 1 if float((out @ vh[3])[0, 5]) * float(result["coordinate"][0, 5]) > 0 else -1
    assert close(sign * out @ vh[3], result["coordinate"])
    gain = model.final_norm_module.weight.detach().double()
    rows = model.unembed.weight.detach().double()
    v = sign * vh[3]
    raised = ((rows - rows.mean(0)) * gain) @ (v - v.mean())
    best = result.tables["raises"][0]
    assert best["id"] == int(raised.argmax())
    assert close(best["value"], float(raised.max()), of=1.0)
    c, found = result["coordinate"], dict(zip(result.labels_of("statistic"), result["explained"].tolist(), strict=True))
    train = [(p, j) for p in (0, 2, 4) for j in range(1, 9)]
    test = [(p, j) for p in (1, 3, 5) for j in range(1, 9)]
    mean = sum(float(c[at]) for at in train) / len(train)
    guess = {}
    for again in (False, True):
        members = [float(c[p, j]) - mean for p, j in train if (prompts[p][j] in prompts[p][:j]) == again]
        guess[again] = mean + sum(members) / (len(members) + 1)
    wrong = sum((float(c[p, j]) - guess[prompts[p][j] in prompts[p][:j]]) ** 2 for p, j in test)
    base = sum((float(c[at]) - mean) ** 2 for at in test)
    assert close(found["duplicate"], 1 - wrong / base, of=1.0)
    sizes = c.abs().flatten().sort(descending=True).values
    for row, size in zip(result.tables["strongest"], sizes.tolist(), strict=False):
        assert row["value"] == float(c[row["prompt"], row["position"]])
        assert abs(row["value"]) == size


def test_null() -> None:
    """Labels that have nothing to do with the prompts explain nothing."""
    model = pb.load(twins.twin("llama"))
    generator = torch.Generator().manual_seed(0)
    low, tried = 0, 0
    for seed in range(6):
        prompts = torch.randint(5, 90, (24, 5), generator=generator).tolist()
        labels = torch.randint(0, 3, (24,), generator=generator).tolist()
        task = pb.Task("noise", prompts, [5] * 24, [[6]] * 24, labels={"noise": labels})
        result = pb.find.channel_content(model, task, "L0.H1.C2", draws=39, seed=seed)
        low += float(result["p"][result.labels_of("statistic").index("noise")]) <= 0.05
        tried += 1
    assert low <= 1, f"{low} of {tried}"


def test_neurons_and_mlps_have_coordinates_too() -> None:
    model = pb.load(twins.twin("llama"))
    prompts = [[5, 6, 7, 8, 6], [9, 10, 11, 9, 30]]
    neuron = pb.find.channel_content(model, prompts, "L1.N7", draws=3)
    act = pb.run(model, prompts, taps=[model.layers[1].mlp.neurons[7].act])[model.layers[1].mlp.neurons[7].act]
    size = model.layers[1].mlp.weights().W_out[7].norm()
    assert close(neuron["coordinate"].abs(), (act * size).abs().double())
    whole = pb.find.channel_content(model, prompts, "L1.mlp.C0>unembed", draws=3)
    assert whole["coordinate"].shape == (2, 5)


@pytest.mark.parametrize(
    ("channel", "options", "says"),
    [
        ("L0.H1", {}, "name one component"),
        ("L0.H1.C99", {}, "components 0..7"),
        ("embed.C0", {}, "heads, MLPs and neurons"),
        ("L0.attn.bias", {}, "heads, MLPs and neurons"),
        ("L0.H1.C0", {"draws": 0}, "at least 1"),
        ("L0.H1.C0", {"first": 50}, "no prompt has a token there"),
        ("L0.H1.C0", {"first": -1}, "first=-1: positions count from 0"),
    ],
)
def test_what_cannot_be_is_refused(channel: str, options: dict[str, int], says: str) -> None:
    with pytest.raises(pb.PatchbayError, match=says):
        pb.find.channel_content(pb.load(twins.twin("gpt2")), [[5, 6, 7], [8, 9, 10]], channel, **options)  # type: ignore[arg-type]


def test_one_prompt_is_not_enough() -> None:
    with pytest.raises(pb.PatchbayError, match="at least 2"):
        pb.find.channel_content(pb.load(twins.twin("gpt2")), [5, 6, 7], "L0.H1.C0")

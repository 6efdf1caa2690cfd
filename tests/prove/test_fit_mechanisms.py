"""Fit mechanisms: planted parameters are recovered, also through a model; equals loops; nothing in noise."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.prove.fit_mechanisms import _split
from patchbay.tiny import planted
from tests.tolerance import close

HYPOTHESES = [
    "full",
    "without positional",
    "without lexical",
    "without reflexive",
    "positional alone",
    "lexical alone",
    "reflexive alone",
    "uniform",
]


def formula(
    p: int, k: int, i: int, n: int, w: float, sigma: list[float], lexical: list[float], reflexive: list[float]
) -> list[float]:
    """The paper's distribution over n candidates, as loops."""
    logits = []
    for a in range(n):
        logit = w * math.exp(-((a - p) ** 2) / (2 * sigma[p] ** 2))
        logit += lexical[k] if a == k else 0.0
        logit += reflexive[i] if a == i else 0.0
        logits.append(logit)
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def similarity(p: list[float], q: list[float]) -> float:
    """1 - JSD in bits."""
    out = 0.0
    for a, b in zip(p, q, strict=True):
        m = (a + b) / 2
        out += 0.5 * (a * math.log2(a / m) if a else 0.0) + 0.5 * (b * math.log2(b / m) if b else 0.0)
    return 1.0 - out


N = 10
TRUTH: dict[str, Any] = {
    "w": 4.0,
    "sigma": [0.5 + 2.0 * (p / N) - 1.8 * (p / N) ** 2 for p in range(N)],
    "lexical": [2.0 + 0.05 * k for k in range(N)],
    "reflexive": [2.5 - 0.05 * i for i in range(N)],
}


def grid(n_cells: int, shuffle: bool = False) -> tuple[pb.Task, pb.Result]:
    """A task and an interchange Result whose distributions come from the formula at TRUTH, one prompt a cell."""
    rng = random.Random(3)
    rows = [rng.sample(range(N), 4) for _ in range(n_cells)]
    distribution = [formula(*row[:3], N, **TRUTH) for row in rows]
    if shuffle:
        rng.shuffle(distribution)
    names = ("positional", "lexical", "reflexive", "asked")
    task = pb.Task(
        "grid",
        clean=[(3, 4)] * n_cells,
        corrupted=[(3, 4)] * n_cells,
        right=[5 + row[3] for row in rows],
        wrong=[[5 + a for a in range(N) if a != row[3]] for row in rows],
        labels={name: [row[at] for row in rows] for at, name in enumerate(names)},
    )
    given = pb.Result({"distribution": (torch.tensor([distribution]), ("layer", "prompt", "token"), "probability")})
    return task, given


def cells_of(task: pb.Task, patched: pb.Result) -> dict[tuple[int, ...], list[float]]:
    """(p, k, i), in order -> the mean distribution of its prompts, by hand."""
    cells: dict[tuple[int, ...], list[list[float]]] = {}
    for at, row in enumerate(patched["distribution"][0].tolist()):
        cells.setdefault(tuple(task.labels[m][at] for m in ("positional", "lexical", "reflexive")), []).append(row)
    return {key: [sum(column) / len(cells[key]) for column in zip(*cells[key], strict=True)] for key in sorted(cells)}


def null_model(seed: int = 0) -> pb.Model:
    built = planted.null(seed=seed, d_model=64, d_mlp=16, n_positions=32)
    return pb.load(built.model, built.tokenizer)


def test_planted() -> None:
    """P = 10: w, sigma and the gates come back; without a term, or with one alone, the fit loses."""
    task, given = grid(160)
    result = pb.prove.fit_mechanisms(null_model(), task, patched=given, steps=1500, draws=1)
    assert result.coords["condition"] == HYPOTHESES
    jss = dict(zip(HYPOTHESES, result.values[0].tolist(), strict=True))
    assert jss["full"] >= 0.9999
    assert result["kl"][0, 0] < 1e-3
    assert result["kl_reverse"][0, 0] < 1e-3
    assert jss["positional alone"] < 0.92
    assert max(jss[name] for name in HYPOTHESES[1:]) < 0.98
    assert float(result["weight"][0]) == pytest.approx(TRUTH["w"], abs=0.05)
    assert result["sigma"][0].tolist() == pytest.approx(TRUTH["sigma"], abs=0.02)
    assert result["lexical"][0].tolist() == pytest.approx(TRUTH["lexical"], abs=0.05)
    assert result["reflexive"][0].tolist() == pytest.approx(TRUTH["reflexive"], abs=0.05)
    assert result["p_adjusted"][0, 0] < 1e-3
    assert result["lost_low"][0, 1:].min() > 0.01
    assert result["shuffled"].max() < jss["uniform"] + 0.02


def test_planted_in_a_model(pointer_model: Any, binding: Any) -> None:
    """Of the pointer model: the key alone explains block 1, the place block 2, the answer the end, each without the others."""
    result = pb.prove.fit_mechanisms(pointer_model(), binding(60), layers=[1, 2, 3], steps=400, draws=2)
    for row, alone in enumerate(("lexical alone", "positional alone", "reflexive alone")):
        jss = dict(zip(HYPOTHESES, result.values[row].tolist(), strict=True))
        assert jss["full"] > 0.98
        assert jss[alone] > 0.98
        assert all(jss[name] < 0.75 for name in HYPOTHESES[4:7] if name != alone)
        without = alone.replace(" alone", "")
        lost = dict(zip(HYPOTHESES, result["lost"][row].tolist(), strict=True))
        assert lost[f"without {without}"] > 0.2
        assert max(abs(lost[name]) for name in HYPOTHESES[1:4] if without not in name) < 0.02
    assert result["p_adjusted"][:, 0].max() < 0.05


def test_reference(binding: Any) -> None:
    """Scores are those of the formula as loops at the fitted parameters, on the cells left over by the split; prompts of
    one (p, k, i) are averaged; and training moved the parameters to where the training cells' loss is lowest."""
    model, task = null_model(seed=1), binding(50, boxes=4)  # 24 triples, so most come up twice
    patched = pb.prove.interchange(model, task, layers=[1])
    result = pb.prove.fit_mechanisms(model, task, patched=patched, steps=60, draws=1, seed=5)
    again = pb.prove.fit_mechanisms(model, task, layers=[1], steps=60, draws=1, seed=5)
    assert again.agrees(result, rtol=1e-9)
    mean = cells_of(task, patched)
    keys = list(mean)
    assert len(keys) == 24
    order = torch.randperm(24, generator=torch.Generator().manual_seed(5)).tolist()
    assert [len(part) for part in (order[:16], order[16:20], order[20:])] == [16, 4, 4]
    fitted = {
        "w": float(result["weight"][0]),
        "sigma": [math.sqrt(s * s + 1e-4) for s in result["sigma"][0].tolist()],
        **{name: result[name][0].tolist() for name in ("lexical", "reflexive")},
    }
    predicted = {c: formula(*keys[c], 4, **fitted) for c in order}
    test = order[20:]
    expected = sum(similarity(mean[keys[c]], predicted[c]) for c in test) / 4
    assert close(float(result.values[0, 0]), expected, dtype=torch.float64, of=result.values)
    uniform = sum(similarity(mean[keys[c]], [0.25] * 4) for c in test) / 4
    assert close(float(result.values[0, -1]), uniform, dtype=torch.float64, of=result.values)
    forward = sum(a * math.log(a / b) for c in test for a, b in zip(mean[keys[c]], predicted[c], strict=True)) / 4
    backward = sum(b * math.log(b / a) for c in test for a, b in zip(mean[keys[c]], predicted[c], strict=True)) / 4
    assert close(float(result["kl"][0, 0]), forward, dtype=torch.float64, of=result["kl"])
    assert close(float(result["kl_reverse"][0, 0]), backward, dtype=torch.float64, of=result["kl_reverse"])


def test_reference_of_the_training() -> None:
    """Adam by hand, on the loss written with loops in autograd numbers: the same parameters after the same steps."""
    task, given = grid(12)
    result = pb.prove.fit_mechanisms(null_model(), task, patched=given, steps=5, draws=1, seed=2)
    names = ("positional", "lexical", "reflexive")
    rows = sorted((tuple(task.labels[m][at] for m in names), given["distribution"][0, at].double()) for at in range(12))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2)).tolist()[:8]  # 12 - 2 x 2 train
    w = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    s = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    gates = torch.zeros(2, N, dtype=torch.float64, requires_grad=True)
    numbers = [w, s, gates]
    moments = [(torch.zeros_like(x), torch.zeros_like(x)) for x in numbers]
    for step in range(1, 6):
        loss = torch.zeros((), dtype=torch.float64)
        for c in order:
            (p, k, i), observed = rows[c]
            width = s[0] + s[1] * p / N + s[2] * (p / N) ** 2
            logits = torch.stack(
                [
                    w * torch.exp(-((a - p) ** 2) / (2 * (width**2 + 1e-4)))
                    + (gates[0, k] if a == k else 0.0)
                    + (gates[1, i] if a == i else 0.0)
                    for a in range(N)
                ]
            )
            q = torch.softmax(logits, 0)
            m = (observed + q) / 2
            loss = loss + (observed * torch.log2(observed / m) + q * torch.log2(q / m)).sum() / 2 / len(order)
        for x, (first, second), g in zip(numbers, moments, torch.autograd.grad(loss, numbers), strict=True):
            first.mul_(0.9).add_(0.1 * g)
            second.mul_(0.999).add_(0.001 * g * g)
            with torch.no_grad():
                x -= 0.05 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    assert close(float(result["weight"][0]), w.item(), of=result["weight"])
    assert close(result["lexical"][0].tolist(), gates[0].detach().tolist(), of=result["lexical"])
    assert close(result["reflexive"][0].tolist(), gates[1].detach().tolist(), of=result["reflexive"])


def test_null(binding: Any) -> None:
    """Shuffled places come down to knowing nothing, by the fit's own count and by loops; so does a random model."""
    task, given = grid(160, shuffle=True)
    result = pb.prove.fit_mechanisms(null_model(), task, patched=given, steps=300, draws=2)
    mean = list(cells_of(task, given).values())
    test = torch.randperm(len(mean), generator=torch.Generator().manual_seed(0))[-round(0.15 * len(mean)) :].tolist()
    baseline = sum(similarity(mean[c], [0.1] * N) for c in test) / len(test)
    assert close(float(result.values[0, -1]), baseline, of=result.values)
    assert float(result.values[0, 0]) == pytest.approx(baseline, abs=0.02)
    assert result["shuffled"][0].tolist() == pytest.approx([baseline] * 2, abs=0.02)
    for seed in (0, 1):
        found = pb.prove.fit_mechanisms(null_model(seed), binding(60, seed=seed), steps=200, draws=2)
        assert found["p_adjusted"][:, 0].min() > 0.05 or (found.values[:, 0] - found.values[:, -1]).max() < 0.01


def test_cells_that_stop_the_training_choose_what_is_kept() -> None:
    """What is learned holds in the cells that train and turns round in those that stop it: of all steps the first is kept."""
    from patchbay.prove import _mixture

    labels = torch.tensor([[[i % 5, (i + 1) % 5, (i + 2) % 5] for i in range(20)]])
    told = torch.nn.functional.one_hot(labels[0, :, 1], 5).double() + 0.02
    turned = torch.nn.functional.one_hot((labels[0, :, 1] + 2) % 5, 5).double() + 0.02
    observed = torch.cat([told[:10], turned[10:]])[None]
    observed = observed / observed.sum(-1, keepdim=True)
    train, valid = torch.arange(10), torch.arange(10, 20)
    kept, _ = _mixture.fit(observed, labels, torch.tensor([[0, 1, 0]]), train, valid, 50)
    assert all(torch.equal(a, b) for a, b in zip(kept, _mixture.start(1, 5), strict=True))
    kept, _ = _mixture.fit(observed, labels, torch.tensor([[0, 1, 0]]), train, train, 50)
    assert float(kept.lexical.min()) > 0.5


def test_every_subset_of_terms_is_a_condition() -> None:
    from patchbay.prove._mixture import TERMS

    assert list(TERMS) == HYPOTHESES
    assert sorted(TERMS.values()) == sorted(itertools.product((False, True), repeat=3))
    for name, there in TERMS.items():
        if name.startswith("without"):
            assert not there[("positional", "lexical", "reflexive").index(name.split()[1])]


def test_errors_say_what_is_possible() -> None:
    task, given = grid(12)
    model = null_model()
    with pytest.raises(pb.PatchbayError, match=r"layers=\[3\]: patched holds \[0\]"):
        pb.prove.fit_mechanisms(model, task, patched=given, layers=[3])
    with pytest.raises(pb.PatchbayError, match="12 prompts of 10 candidates, the task 5 of 10"):
        pb.prove.fit_mechanisms(model, task[:5], patched=given)
    with pytest.raises(pb.PatchbayError, match="needs a variable `distribution`.*score"):
        pb.prove.fit_mechanisms(model, task, patched=pb.Result(torch.zeros(2, 2)))
    with pytest.raises(pb.PatchbayError, match="1 different triples"):
        few = pb.Result({"distribution": (given["distribution"][:, :1], ("layer", "prompt", "token"), "probability")})
        pb.prove.fit_mechanisms(model, task[:1], patched=few)
    with pytest.raises(pb.PatchbayError, match="must be a distribution"):
        twice = pb.Result({"distribution": (2 * given["distribution"], ("layer", "prompt", "token"), "probability")})
        pb.prove.fit_mechanisms(model, task, patched=twice)


def test_a_patch_that_does_nothing_names_no_mechanism() -> None:
    """All probability with the clean answer: five candidates fit well, by terms below 0 alone; the notes say what that is worth."""
    n = 5
    rows = [list(row) for row in itertools.permutations(range(n), 4)]
    names = ("positional", "lexical", "reflexive", "asked")
    task = pb.Task(
        "still",
        clean=[(3, 4)] * len(rows),
        corrupted=[(3, 4)] * len(rows),
        right=[5 + row[3] for row in rows],
        wrong=[[5 + a for a in range(n) if a != row[3]] for row in rows],
        labels={name: [row[at] for row in rows] for at, name in enumerate(names)},
    )
    still = torch.nn.functional.one_hot(torch.tensor([row[3] for row in rows]), n).double()
    keyed = torch.nn.functional.one_hot(torch.tensor([row[1] for row in rows]), n).double()
    given = pb.Result({"distribution": (torch.stack([still, keyed]), ("layer", "prompt", "token"), "probability")})
    built = planted.null()
    result = pb.prove.fit_mechanisms(pb.load(built.model), task, patched=given, steps=300)
    assert result["jss"][0, 0] > 0.9 > result["jss"][0, -1] + 0.2  # a good fit that means nothing
    assert result["unmoved"].tolist() == [1.0, 0.0]
    assert result.notes[0].startswith("furthest above uniform at 1")
    assert result.notes[0].endswith("lost without lexical " + f"{float(result['lost'][1, 2]):.3f}")
    assert any(note.startswith("at 0 the clean answer keeps 50% or more") for note in result.notes)


def test_cells_are_split_by_the_seed_into_parts_that_share_none() -> None:
    parts = _split(20, 0)
    assert sorted(torch.cat(parts).tolist()) == list(range(20))
    assert [len(part) for part in parts] == [14, 3, 3]
    assert not torch.equal(torch.cat(parts), torch.cat(_split(20, 1)))

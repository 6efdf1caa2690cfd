"""DAS: the planted subspace is found, with and without its size; the swap as a hook; all dimensions swap everything; nulls stay low."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.tiny import planted, twins
from tests.given import lent, pairs
from tests.lenses import VOCAB, D, blocks
from tests.tolerance import close

N_A, N_B = 6, 4  # tokens are pairs of two variables, each with a code in a half of the stream


@functools.cache
def model_and_truth() -> tuple[pb.Model, Tensor]:
    """A model that says the pair it is at, and the four directions [direction, d_model] that hold the first variable."""
    generator = torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(D, D, generator=generator))[0]
    one, two = (torch.nn.functional.normalize(torch.randn(n, D // 2, generator=generator), dim=1) for n in (N_A, N_B))
    rows = torch.tensor([[a, b] for a in range(N_A) for b in range(N_B)])
    assert len(rows) == VOCAB
    codes = torch.cat([one[rows[:, 0]], two[rows[:, 1]]], 1) @ turn  # [token, d_model]
    nothing = torch.zeros(D, D)
    return blocks(nothing, nothing, embed=3 * codes, unembed=3 * codes), turn[: D // 2]


def first_variable(n: int = 60, seed: int = 0) -> pb.Task:
    """The base (`corrupted`) with the first variable of the source (`clean`) is to be said; both values of each differ."""
    generator = torch.Generator().manual_seed(seed)
    clean, base, right, wrong = [], [], [], []
    for _ in range(n):
        a = torch.randperm(N_A, generator=generator)[:2].tolist()
        b = torch.randperm(N_B, generator=generator)[:2].tolist()
        start = torch.randint(VOCAB, (2,), generator=generator).tolist()
        clean.append([*start, a[0] * N_B + b[0]])
        base.append([*start, a[1] * N_B + b[1]])
        right.append(a[0] * N_B + b[1])
        wrong.append([a[1] * N_B + b[1]])
    return pb.Task("first", clean, right, wrong, base)  # type: ignore[arg-type]


def at(found: pb.Result, condition: str) -> float:
    return float(found["accuracy"][found.labels_of("condition").index(condition)])


@pytest.mark.parametrize("dims", [4, pytest.param(None, marks=pytest.mark.slow)])
def test_planted(dims: Any) -> None:
    """Four dimensions carry the first variable: found, told apart from everything else, and turned by a knob."""
    model, truth = model_and_truth()
    found = pb.prove.das(model, first_variable(120), "L0.resid_out", dims=dims, steps=200)  # type: ignore[arg-type]
    basis = found["direction"]
    assert at(found, "swapped") > 0.9
    assert max(at(found, name) for name in ("base", "whole", "shuffled", "untrained", "random")) < 0.6
    assert found["difference_low"] > 0.2
    assert found["p"] < 0.01
    assert float(found["dims"]) == 4 if dims else 3 <= float(found["dims"]) <= 5
    assert float((basis @ truth.T).pow(2).sum()) / min(len(basis), 4) > 0.85
    knob = pb.turn.project("L0.resid_out", basis)  # type: ignore[arg-type]
    rows = [[1, 2, t] for t in range(VOCAB)]
    with model.edited(knob):
        said = pb.run(model, rows).last_logits.argmax(-1)
    values = torch.tensor([[t // N_B, t % N_B] for t in range(VOCAB)])
    told = values[said]
    assert (told[:, 1] == values[:, 1]).double().mean() > 0.9  # the other variable is left
    assert (told[:, 0] == values[:, 0]).double().mean() < 0.5


def test_reference() -> None:
    """x + R^T R (x_source - x) by a hook on Hugging Face's model, prompt by prompt, on the prompts that were held out."""
    hf = twins.twin("gpt2")
    model, task = pb.load(hf), pairs(8, n_wrong=1)
    said = pb.run(model, task).last_logits.argmax(-1).tolist()
    task = pb.Task("own", task.clean, said, [[(s + 1) % 60] for s in said], task.corrupted)  # type: ignore[arg-type]
    found = pb.prove.das(model, task, "L0.resid_out", dims=12, steps=3, seed=5)  # type: ignore[arg-type]
    basis = found["direction"]
    assert close(basis @ basis.T, torch.eye(12))
    held = task.split(0.5, 5)[1]
    right: dict[str, list[float]] = {"swapped": [], "base": [], "whole": []}
    for source, base, answer in zip(held.clean, held.corrupted or (), held.right, strict=True):
        with torch.no_grad():
            x = hf(torch.tensor([list(source)]), output_hidden_states=True).hidden_states[1][0, -1]
        for name, rows in (("swapped", basis), ("base", basis[:0]), ("whole", torch.eye(32))):

            def swap(_: Any, __: Any, out: Any, rows: Tensor = rows, x: Tensor = x) -> Any:
                whole = out[0] if isinstance(out, tuple) else out
                now = whole.clone()
                for row in rows:
                    now[0, -1] += row * (row @ (x - whole[0, -1]))
                return (now, *out[1:]) if isinstance(out, tuple) else now

            hook = hf.transformer.h[0].register_forward_hook(swap)
            with torch.no_grad():
                logits = hf(torch.tensor([list(base)])).logits[0, -1]
            hook.remove()
            right[name].append(float(int(logits.argmax()) == answer))
    for name, values in right.items():
        assert at(found, name) == pytest.approx(sum(values) / len(values)), name
    assert sum(right["whole"]) > sum(right["base"])


def test_all_dimensions_swap_everything_and_prove_nothing() -> None:
    """With as many dimensions as the signal has, any rotation is the whole swap: shuffled answers and new rotations do as well."""
    model, _ = model_and_truth()
    found = pb.prove.das(model, first_variable(), "L0.resid_out", dims=D, steps=2)  # type: ignore[arg-type]
    assert at(found, "swapped") == at(found, "whole") == at(found, "shuffled") == at(found, "random")
    assert float(found["difference"]) == 0.0


def test_null() -> None:
    """Random answers of a random model: what a search finds on one half says nothing on the other."""
    model = pb.load(planted.null(seed=3).model)
    found = pb.prove.das(model, pairs(40, n_wrong=1), "L0.resid_out", dims=4, steps=8)  # type: ignore[arg-type]
    assert at(found, "swapped") < 0.25
    assert found["difference_low"] <= 0.0
    assert found["p"] > 0.05


def test_what_is_told_is_of_the_half_that_was_not_searched_on() -> None:
    """Answers that the plain base run gives in the half to search on, and never in the other: none of them is told."""
    model, task = lent("llama"), pairs(12, n_wrong=1)
    said = pb.run(model, task.corrupted, logits="last").last_logits.argmax(-1).tolist()
    first = {tuple(ids) for ids in task.split(0.5, 0)[0].clean}
    right = [token if tuple(ids) in first else (token + 1) % 60 for ids, token in zip(task.clean, said, strict=True)]
    wrong = [[(token + 2) % 60] for token in said]
    asked = pb.Task("halves", task.clean, right, wrong, task.corrupted)  # type: ignore[arg-type]
    found = pb.prove.das(model, asked, "L0.resid_out", dims=2, steps=1)  # type: ignore[arg-type]
    assert at(found, "base") == 0.0


def test_what_cannot_be_searched_is_refused() -> None:
    model, task = lent("llama"), pairs(6)
    cases: list[tuple[str, dict[str, Any], pb.Task]] = [
        ("a search needs \\[prompt, position, d_model\\]", {"at": "L0.H1.z"}, task),
        ("1 to 32 dimensions", {"at": "L0.resid_out", "dims": 33}, task),
        ("4 or more, half to search on", {"at": "L0.resid_out"}, task[:3]),
        ("possible are last", {"at": "L0.resid_out", "positions": "subject"}, task),
        ("no corrupted twins", {"at": "L0.resid_out"}, pb.Task("own", task.clean, task.right, task.wrong)),
    ]
    for message, options, asked in cases:
        with pytest.raises(pb.PatchbayError, match=message):
            pb.prove.das(model, asked, options.pop("at"), **options)

"""Predictive geometry: planted entropies, loops over tokens, kernels that are kernels, and states dealt at random."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch

import patchbay as pb
from tests.measure.test_text_loss import TEXTS, constant
from tests.measure.words import NAMES, reader
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.measure.predictive_geometry")


def test_planted() -> None:
    """Probabilities 1/2, 1/4, 1/4 whatever the text: entropy 1.5 bits, no information, and a gap of 0 for text drawn so."""
    model = constant({"a": math.log(2.0), "b": 0.0, "c": 0.0})
    found = pb.measure.predictive_geometry(model, ["aabc", "caba"], twin=False)
    assert close(float(found["entropy"]), 1.5 * math.log(2))
    assert close(float(found["information"]), 0.0, of=1.0)
    assert close(float(found.values), 0.0, of=1.0)
    rare = pb.measure.predictive_geometry(model, ["bbbb", "cccc"], twin=False)
    assert close(float(rare.values), 0.5 * math.log(2))
    assert module.information(torch.eye(4, dtype=torch.float64).log()) == pytest.approx(math.log(4))


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str) -> None:
    model = reader(name)
    found = pb.measure.predictive_geometry(model, TEXTS, twin=False)
    states: list[list[torch.Tensor]] = [[] for _ in model.layers]
    p, gaps = [], []
    for text in TEXTS:
        ids = [model.tokenizer.bos_token_id, *model.tokenizer(text, add_special_tokens=False)["input_ids"]]
        trace = pb.run(model, [ids], taps=[layer.resid_out for layer in model.layers])
        logp = trace.logits[0].double().log_softmax(-1)
        gap = 0.0
        for at in range(len(ids) - 1):
            row = logp[at].tolist()
            gap += -row[ids[at + 1]] + sum(math.exp(x) * x for x in row)
            p.append([math.exp(x) for x in row])
            for i, layer in enumerate(model.layers):
                states[i].append(trace[layer.resid_out][0, at].double())
        gaps.append(gap)
    assert close(found["per_item"], torch.tensor(gaps).double(), dtype=torch.float32, noise=256)
    n = len(p)
    k = torch.tensor([[sum(math.sqrt(a * b) for a, b in zip(p[i], p[j], strict=True)) for j in range(n)] for i in range(n)]).double()  # fmt: skip
    centre = torch.eye(n).double() - 1 / n
    for i, rows in enumerate(states):
        x = centre @ torch.stack(rows)
        gram = centre @ k @ centre
        expected = float((x @ x.T * gram).sum() / ((x @ x.T).norm() * gram.norm()))
        assert close(float(found["alignment"][i]), expected, noise=256)


def test_null() -> None:
    """States dealt to the tokens at random lie far less as the predictions do; the kernel of predictions has a diagonal of 1 and is positive."""
    model = reader("characters")
    found = pb.measure.predictive_geometry(model, TEXTS)
    assert float(found["alignment_shuffled"][-1]) < 0.5 * float(found["alignment"][-1])
    assert found["alignment_untrained"].shape == (2,)
    logp = torch.randn(30, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)
    kernel = module.overlap(logp)
    assert close(kernel.diagonal(), torch.ones(30).double(), dtype=torch.float64)
    assert float(torch.linalg.eigvalsh(kernel).min()) > -1e-12
    assert module.cka(kernel, kernel) == pytest.approx(1.0)
    assert module.cka(kernel, torch.ones(30, 30).double()) == 0.0


def test_bad_input_is_named() -> None:
    model = reader("characters")
    with pytest.raises(pb.PatchbayError, match="text 1 has 72 tokens and the model reads 64"):
        pb.measure.predictive_geometry(model, ["on", "a" * 71])
    with pytest.raises(pb.PatchbayError, match="predictions at four tokens or more"):
        pb.measure.predictive_geometry(model, ["on"])

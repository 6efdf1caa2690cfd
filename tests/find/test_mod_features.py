"""Mod features: planted remainders are read, edited and shared; the probe and the features as plain formulas; nothing in noise."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch

import patchbay as pb
from patchbay.find._ordinals import effective_embeddings
from patchbay.find.mod_features import RIDGE, mod_features
from patchbay.tiny import planted, twins
from patchbay.tiny.planted_remainder import remainder
from tests.shares import by_turns
from tests.tolerance import close


@pytest.mark.parametrize(("seed", "form"), by_turns([0, 1], ["gpt2", "llama"], of=2))
def test_planted(form: Any, seed: int) -> None:
    built = remainder(form=form, seed=seed)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    result = mod_features(model, classes={"numbers": truth["number_ids"]}, draws=50)
    assert str(result.highlights[0]) == truth["head"]
    at = result.labels_of("condition").index("sum")
    assert result["accuracy"][at] == 1.0
    assert result["p"][at] < 0.03
    assert result["null_high"][at] < 0.3
    assert result["follow"] > 0.95
    assert result["follow_exact"] > 0.95
    assert result["follow_random"] < 0.5
    codes = truth["codes"].double()
    codes = codes - codes.mean(0)
    assert torch.nn.functional.cosine_similarity(result["direction"], codes, dim=1).min() > 0.95


def test_the_direction_turns_the_running_model() -> None:
    """direction[j] - direction[i], added where the notes say, makes the model itself answer j + 1 of the same round."""
    built = remainder(seed=0)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    result = mod_features(model, classes={"numbers": truth["number_ids"]}, draws=5)
    assert "the edit is pb.add at L0.resid_out of direction[j] - direction[i]" in result.notes[-1]
    number, i, j = truth["number_ids"][34], 4, 7
    shift = (result["direction"][j] - result["direction"][i]).float()
    plain = pb.run(model, [[60, number]]).last_logits[0, truth["number_ids"]].argmax()
    turned = pb.run(model, [[60, number]], edits=[pb.add(model.port("L0.resid_out"), shift, positions=[-1])])
    assert int(plain) == 35
    assert int(turned.last_logits[0, truth["number_ids"]].argmax()) == 38


def test_reference() -> None:
    """Ridge in its primal form, features as means of decade-centred rows, on the two halves that the method drew."""
    hf = twins.twin("gpt2")
    model, ids = pb.load(hf), list(range(5, 65))
    result = mod_features(model, modulus=10, classes={"numbers": ids, "others": list(range(66, 96))}, draws=20, seed=4)
    value = numpy.arange(60)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(4)).tolist()
    half = numpy.isin(value // 10, order[:3])
    for way, accuracy in zip(result.labels_of("condition"), result["accuracy"].tolist(), strict=True):
        x = effective_embeddings(model, ids, 64)[way].double().numpy()
        hits = []
        for test in (half, ~half):
            rows, y = x[~test] - x[~test].mean(0), numpy.eye(10)[value[~test] % 10]
            ridge = RIDGE * numpy.mean((rows**2).sum(1))
            weight = numpy.linalg.solve(rows.T @ rows + ridge * numpy.eye(x.shape[1]), rows.T @ (y - y.mean(0)))
            said = ((x[test] - x[~test].mean(0)) @ weight + y.mean(0)).argmax(1)
            hits += (said == value[test] % 10).tolist()
        assert accuracy == pytest.approx(numpy.mean(hits))
    transferred = result.tables["transfer"][0]["p"] * 21  # of 20 shuffles and itself
    assert transferred == pytest.approx(round(transferred))
    assert 1 <= round(transferred) < 21
    way = "raw" if result.highlights[0].layer == 0 else "sum"
    x = effective_embeddings(model, ids, 64)[way].double()
    for r in range(10):
        feature = sum(x[10 * d + r] - x[10 * d : 10 * d + 10].mean(0) for d in range(6)) / 6
        assert close(result["direction"][r], feature, dtype=torch.float64)


def test_null() -> None:
    """A random embedding holds no remainder: the probe is within its null, and no edit is followed."""
    built = planted.null(seed=1)
    model = pb.load(built.model, built.tokenizer)
    result = mod_features(model, classes={"numbers": list(range(3, 63)), "others": [0, 1, 2]}, draws=100)
    assert (result["p"] > 0.02).all()
    assert (result["null_mean"] - 0.1).abs().max() < 0.05
    assert result["follow"] < 0.3
    assert result.tables["transfer"][0]["p"] > 0.02


def test_bad_input() -> None:
    model = pb.load(twins.twin("gpt2"))
    with pytest.raises(pb.PatchbayError, match="modulus=10 with 30 numbers gives 3 full rounds"):
        mod_features(model, classes={"numbers": list(range(30))})
    with pytest.raises(pb.PatchbayError, match="the edit is read by a head"):
        mod_features(model, classes={"numbers": list(range(60))}, head="L1.mlp")  # type: ignore[arg-type]
    built = planted.successor()
    with pytest.raises(pb.PatchbayError, match="too few of the numbers"):
        mod_features(pb.load(built.model, built.tokenizer))

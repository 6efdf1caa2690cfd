"""Calibration: planted confidences are read back, equals bins by loops, a perfectly calibrated model is within its null."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.measure import _estimates as estimates
from tests.measure.test_text_loss import constant
from tests.measure.words import by_hand, reader
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.measure.calibration")


def items(n: int, right: int) -> list[dict[str, Any]]:
    """The same choice each time, right in some of the items."""
    return [{"prompt": f"item {i}", "choices": ["a", "b"], "answer": "a" if i < right else "b"} for i in range(n)]


def test_planted() -> None:
    """A model that gives "a" 3/4 and "b" 1/4: sure to 3/4; right in 15 of 20 it is calibrated, right in 5 it is off by a half."""
    model = constant({"a": float(torch.tensor(3.0).log()), "b": 0.0})
    good, bad = pb.measure.calibration(model, items(20, 15)), pb.measure.calibration(model, items(20, 5))
    assert close(good["confident"], torch.full((20,), 0.75).double(), dtype=torch.float32)
    assert close(float(good.values), 0.0, of=1.0)
    assert close(float(bad.values), 0.5)
    assert float(bad["p"]) < 0.01 < 0.5 < float(good["p"])
    assert close(float(bad["one_bin"]), 0.5)
    assert "low" not in bad  # a bootstrap of it would be biased
    with model.edited(pb.scale(model.logits, 3.0)):  # as a lower temperature: surer, and no answer another
        sharp = pb.measure.calibration(model, items(20, 15))
    assert torch.equal(sharp["right"], good["right"])
    assert close(float(sharp.values), 27 / 28 - 0.75)


@pytest.mark.parametrize("name", ["characters", "pairs"])
def test_reference(name: str) -> None:
    model = reader(name)
    some = [
        {"prompt": f"it {chr(97 + i)} on", "choices": [f" {chr(98 + i % 9)}", " no", " the"], "answer": i % 3}
        for i in range(24)
    ]
    found = pb.measure.calibration(model, some, bins=4)
    pairs = []
    for item in some:
        [own] = model.encode([item["prompt"]])
        logp = torch.tensor([by_hand(model, model.encode([item["prompt"] + c])[0], len(own)) for c in item["choices"]])
        pairs.append((float(logp.softmax(0).max()), float(int(logp.argmax()) == item["answer"])))
    pairs.sort()
    gaps = [abs(sum(right - sure for sure, right in pairs[i : i + 6])) for i in range(0, 24, 6)]
    assert close(float(found.values), sum(gaps) / 24)
    assert close(float(found["accuracy"]), sum(right for _, right in pairs) / 24)
    assert close(float(found["area"]), estimates.selective_area(found["confident"], found["right"]))


def test_null() -> None:
    """Right as often as it is sure, simulated: the null's mean error and 95th percentile are those of the drawn models."""
    confident = torch.rand(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = module._perfect(confident, 10, 0)
    assert float(drawn.mean()) == pytest.approx(0.056, abs=0.006)  # as it was measured for 300 uniform confidences
    assert float(drawn.quantile(0.95)) == pytest.approx(0.079, abs=0.008)
    found = [estimates.calibration_error(confident, (torch.rand(300, generator=torch.Generator().manual_seed(s), dtype=torch.float64) < confident).double()) for s in range(1, 101)]  # fmt: skip
    flagged = sum(float((drawn >= one).double().mean()) <= 0.05 for one in found)
    assert flagged <= 12


def test_the_fit_is_made_on_items_that_are_not_scored() -> None:
    """Overconfident by a factor of its odds: the fit takes that back, on the other half."""
    true = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    right = (torch.rand(2000, generator=torch.Generator().manual_seed(1), dtype=torch.float64) < true).double()
    over = (true.logit() * 3).sigmoid()
    assert estimates.calibration_error(over, right) > 0.1
    assert module.platt(over, right, 10, 0) < 0.06
    seen: list[int] = []
    inner = estimates.logistic

    def told(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return inner(x, y)

    module.estimates.logistic, kept = told, inner
    try:
        module.platt(over, right, 10, 0)
    finally:
        module.estimates.logistic = kept
    assert seen == [1000]


def test_too_few_items_are_refused() -> None:
    with pytest.raises(pb.PatchbayError, match="19 items in 10 bins: a calibration error needs 20 items"):
        pb.measure.calibration(reader("characters"), items(19, 5))

"""estimates: against plain loops, closed forms, and simulations of what they promise."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from patchbay.measure import _estimates as estimates
from patchbay.signal.port import PatchbayError
from tests.tolerance import close

stats = pytest.importorskip("scipy.stats", reason="scipy is the reference of these tests")


def some(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_auroc_is_the_share_of_pairs_and_does_not_see_monotone_maps() -> None:
    scores = (some(40) * 8).round()  # with ties
    labels = (some(40, 1) > 0.6).double()
    pairs = [(a > b) + 0.5 * (a == b) for a, x in zip(scores.tolist(), labels, strict=True) for b, y in zip(scores.tolist(), labels, strict=True) if x == 1 and y == 0]  # fmt: skip
    assert estimates.auroc(scores, labels) == pytest.approx(sum(pairs) / len(pairs))
    assert estimates.auroc(scores.exp() * 3 - 1, labels) == estimates.auroc(scores, labels)
    assert estimates.auroc(-scores, labels) == pytest.approx(1 - estimates.auroc(scores, labels))
    assert math.isnan(estimates.auroc(scores, torch.ones(40)))


def test_partial_auroc_is_half_by_chance_and_one_at_best() -> None:
    labels = torch.tensor([1.0] * 50 + [0.0] * 50)
    assert estimates.partial_auroc(labels, labels, 0.01) == pytest.approx(1.0)
    assert estimates.partial_auroc(torch.zeros(100), labels, 0.01) == pytest.approx(0.5)
    scores, half = some(200), (some(200, 1) > 0.5).double()
    assert estimates.partial_auroc(scores, half, 1.0) == pytest.approx(estimates.auroc(scores, half))  # the whole area


def test_matthews_is_its_closed_form() -> None:
    labels, said = (some(60) > 0.4).double(), (some(60, 3) > 0.5).double()
    n = {(a, b): float(((labels == a) & (said == b)).sum()) for a in (0, 1) for b in (0, 1)}
    top = n[1, 1] * n[0, 0] - n[0, 1] * n[1, 0]
    below = math.sqrt((n[1, 1] + n[0, 1]) * (n[1, 1] + n[1, 0]) * (n[0, 0] + n[0, 1]) * (n[0, 0] + n[1, 0]))
    assert estimates.matthews(labels, said) == pytest.approx(top / below)
    assert math.isnan(estimates.matthews(labels, torch.ones(60)))


def test_equal_confidences_share_a_bin() -> None:
    right = torch.tensor([1.0] * 112 + [0.0] * 88)
    constant = torch.full((200,), 0.5)
    assert estimates.calibration_error(constant, right) == pytest.approx(abs(float(right.mean()) - 0.5))
    split = sum(abs(float(right[i : i + 20].sum()) - 10) for i in range(0, 200, 20)) / 200
    assert split > estimates.calibration_error(constant, right)  # what bins by place would give


def test_calibration_error_is_the_gap_by_bins() -> None:
    confidence, right = some(100), (some(100, 1) > 0.5).double()
    order = confidence.argsort()
    expected = sum(abs(float((right - confidence)[order[i : i + 10]].sum())) for i in range(0, 100, 10)) / 100
    assert estimates.calibration_error(confidence, right) == pytest.approx(expected)
    assert estimates.calibration_error(confidence, right, 1) == pytest.approx(abs(float((right - confidence).mean())))
    with pytest.raises(PatchbayError, match=r"confidences lie in \[0, 1\]"):
        estimates.calibration_error(confidence + 0.5, right)


def test_selective_area_of_the_best_and_the_worst_ranking() -> None:
    c, n = 60, 100
    right = torch.tensor([1.0] * c + [0.0] * (n - c))
    best = (c + sum(c / i for i in range(c + 1, n + 1))) / n
    assert estimates.selective_area(right, right) == pytest.approx(best)
    worst = sum(max(0, i - (n - c)) / i for i in range(1, n + 1)) / n
    assert estimates.selective_area(1 - right, right) == pytest.approx(worst)
    assert (round(best, 4), round(worst, 4)) == (0.9045, 0.2365)
    assert estimates.selective_accuracy(right, right) == 1.0
    assert estimates.selective_accuracy(torch.ones(100), torch.tensor([0.0] * 10 + [1.0] * 90)) == pytest.approx(1 / 11)  # int(.1 n) + 1 items, in order  # fmt: skip


def test_expected_maximum_is_the_mean_over_subsets() -> None:
    values = some(8)
    subsets = [max(one) for one in itertools.combinations(values.tolist(), 3)]
    assert estimates.expected_maximum(values, 3) == pytest.approx(sum(subsets) / len(subsets))
    assert estimates.expected_maximum(values, 8) == float(values.max())
    assert estimates.expected_maximum(values, 1) == pytest.approx(float(values.mean()))
    drawn = torch.stack([torch.tensor(estimates.expected_maximum(some(30, seed), 25)) for seed in range(400)])
    assert float(drawn.mean()) == pytest.approx(25 / 26, abs=0.005)  # of uniform scores
    with pytest.raises(PatchbayError, match="k lies in 1 to n"):
        estimates.expected_maximum(values, 9)


def test_any_of_is_the_share_of_subsets_with_a_hit() -> None:
    hits = [1, 0, 0, 1, 0, 0, 0]
    subsets = [any(one) for one in itertools.combinations(hits, 3)]
    assert estimates.any_of(2, 7, 3) == pytest.approx(sum(subsets) / len(subsets))
    p, k, n = 0.1, 5, 12
    mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * estimates.any_of(c, n, k) for c in range(n + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k)  # unbiased


def test_kappa_and_logistic() -> None:
    assert estimates.kappa([[20, 5], [10, 15]]) == pytest.approx(0.4)
    assert math.isnan(estimates.kappa([[5, 0], [0, 0]]))
    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = torch.tensor([0.5, 1.0, -2.0], dtype=torch.float64)
    y = (some(4000, 2) < (truth[0] + x @ truth[1:]).sigmoid()).double()
    fit = estimates.logistic(x, y, ridge=0.0)
    assert torch.allclose(fit, truth, atol=0.2)
    p = (fit[0] + x @ fit[1:]).sigmoid()
    assert close(
        x.T @ (p - y), torch.zeros(2).double(), of=4000.0, dtype=torch.float64
    )  # the slope of the loss is 0 there
    apart = estimates.logistic(torch.tensor([[-1.0], [1.0]]), torch.tensor([0.0, 1.0]))
    assert bool(apart.isfinite().all())  # labels that a line separates


def test_an_interval_of_groups_is_wider_where_they_differ() -> None:
    groups = [i // 10 for i in range(100)]
    values = torch.tensor([float(g % 2) for g in groups]).double()[:, None]
    alone, together = (estimates.resampled(lambda x: float(x.mean()), values, groups=g, n=400) for g in (None, groups))
    assert alone.mean == together.mean == 0.5
    assert together.high - together.low > 2 * (alone.high - alone.low)
    one = estimates.resampled(lambda x: float(x.mean()), values[:10], groups=groups[:10])
    assert math.isnan(one.low)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    held = 0
    for seed in range(80):
        x = torch.randn(60, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1.0
        _, low, high = estimates.resampled(lambda x: float(x.mean()), x, n=100, seed=seed)
        held += low <= 1.0 <= high
    assert 0.86 <= held / 80 <= 1.0


def test_exchanged_finds_a_difference_and_is_uniform_without_one() -> None:
    def spread(x: torch.Tensor) -> float:
        return float(x[:, 0].std())

    base = torch.randn(40, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert estimates.exchanged(spread, base, base * 4, n=200) < 0.02
    assert estimates.exchanged(spread, base, base, n=50) == 1.0
    p = []
    for seed in range(60):
        pair = torch.randn(2, 20, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        p.append(estimates.exchanged(spread, pair[0], pair[1], n=99, seed=seed))
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_holm_is_the_step_down_rule() -> None:
    p = torch.tensor([0.01, 0.04, 0.03, float("nan"), 0.5]).double()
    held = estimates.holm(p)
    assert held[[0, 2, 1, 4]].tolist() == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert bool(held[3].isnan())


def test_many_sets_at_once_are_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits of resampled and of exchanged items: all at once, in pieces and one by one are the same to rounding; labels of one class have none."""
    draw = torch.Generator().manual_seed(3)
    inputs = torch.randn(30, 2, generator=draw, dtype=torch.float64)
    labels = (inputs[:, :1] + torch.randn(30, 1, generator=draw) > 0).double()
    items, groups = torch.cat([labels, inputs], 1), [i // 3 for i in range(30)]
    other = torch.cat([labels, inputs.flip(1)], 1)

    def found() -> list[float]:
        told = [estimates.resampled(estimates.coefficient, items, less=less, groups=of, n=40) for less in (None, other) for of in (None, groups)]  # fmt: skip
        return [x for one in told for x in one] + [estimates.exchanged(estimates.coefficient, items, other, n=40)]

    together = found()
    monkeypatch.setattr(estimates, "ROOM", 7 * items.numel())
    pieces = found()
    monkeypatch.setattr(estimates, "AT_ONCE", {})
    alone = found()
    for same in (together, pieces):
        assert close(torch.tensor(same, dtype=torch.float64), torch.tensor(alone, dtype=torch.float64))
    assert alone[0] == pytest.approx(float(estimates.standardised_logistic(items)[1]))
    monkeypatch.undo()
    one_class = torch.cat([torch.ones(30, 1), inputs], 1)
    sets = [items, one_class, items[:20], other]
    values = list(estimates.each(estimates.coefficient, sets))
    for at in (0, 2, 3):
        assert close(values[at], estimates.coefficient(sets[at]), of=1.0, dtype=torch.float64)
    assert math.isnan(values[1])


def test_a_difference_of_two_readings_draws_the_same_items_of_both() -> None:
    """A reading that is another plus one differs by one in every draw."""
    values = torch.randn(50, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = estimates.resampled(lambda x: float(x.mean()), values + 1.0, less=values, n=50)
    assert list(found) == pytest.approx([1.0, 1.0, 1.0])

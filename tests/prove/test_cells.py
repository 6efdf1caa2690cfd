"""Intervals and p values of many cells at once equal those of `maths`, cell by cell."""

from __future__ import annotations

import pytest
import torch

import patchbay as pb
from patchbay import maths
from patchbay.prove import _cells as cells
from tests.tolerance import close


def draw(n: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n", [2, 7, 40])
def test_intervals_equal_maths(n: int) -> None:
    values = draw(n, 3, 2)
    mean, low, high = cells.intervals(values)
    for i in range(3):
        for j in range(2):
            expected = maths.bootstrap_interval(values[:, i, j])
            found = [float(x[i, j]) for x in (mean, low, high)]
            assert close(found, list(expected), dtype=torch.float64, of=1.0)


def test_a_share_draws_both_sides_together() -> None:
    values, over = draw(12, 2), 2.0 + draw(12, seed=1)
    mean, low, high = cells.intervals(values, over, n=500, seed=3)
    drawn = torch.randint(12, (500, 12), generator=torch.Generator().manual_seed(3))
    for j in range(2):
        shares = torch.stack([values[row, j].mean() / over[row].mean() for row in drawn])
        ends = torch.quantile(shares, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        assert close(mean[j], values[:, j].mean() / over.mean(), of=1.0)
        assert close([float(low[j]), float(high[j])], ends, dtype=torch.float64, of=1.0)
    proportional = cells.intervals(0.3 * over[:, None], over)
    assert close(torch.cat(proportional), 0.3)


def test_prompts_without_a_value_are_left_out() -> None:
    values, over = draw(9, 3), 1.0 + draw(9, seed=1).abs()
    values[:4, 1] = torch.nan
    values[:, 2] = torch.nan
    mean, low, high = cells.intervals(values, over)
    assert close(mean[1], values[4:, 1].sum() / over[4:].sum(), of=1.0)
    assert low[1] < mean[1] < high[1]
    assert torch.stack([mean[2], low[2], high[2]]).isnan().all()
    p = cells.sign_flip_p(values)
    assert float(p[1]) == pytest.approx(maths.permutation_p(values[4:, 1], torch.zeros(5)))
    assert p[2].isnan()


def test_p_is_adjusted_for_the_number_of_cells() -> None:
    values = draw(12, 6) + torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 3.0])
    p, adjusted = cells.p_values(values, 0.0)
    assert torch.equal(p, cells.sign_flip_p(values))
    assert torch.equal(adjusted, maths.benjamini_hochberg(p))
    assert bool((adjusted > p).any())


def test_rounding_is_of_the_largest_score() -> None:
    assert cells.rounding(torch.tensor([1.0, 0.5]), torch.tensor([-8.0])) == pytest.approx(1.6e-5)


@pytest.mark.parametrize("n", [1, 3, 12, 20])
def test_p_equals_maths(n: int) -> None:
    values = draw(n, 4) + torch.tensor([0.0, 0.3, 1.0, 3.0])
    found = cells.sign_flip_p(values)
    for j in range(4):
        assert float(found[j]) == pytest.approx(
            maths.permutation_p(values[:, j], torch.zeros(n)), abs=2e-3, nan_ok=n == 1
        )


def test_rounding_is_no_effect() -> None:
    values = torch.full((8, 1), 1e-8)
    assert cells.sign_flip_p(values) == 2 / 2**8
    assert cells.sign_flip_p(values, floor=1e-6) == 1.0


def test_one_prompt_has_no_interval_and_no_evidence() -> None:
    mean, low, high = cells.intervals(torch.tensor([[2.0]]))
    assert mean == 2.0
    assert low.isnan()
    assert high.isnan()
    assert cells.sign_flip_p(torch.tensor([[2.0]])).isnan()
    assert maths.permutation_p(torch.tensor([2.0]), torch.tensor([1.0])) != maths.permutation_p(
        torch.ones(1), torch.ones(1)
    )  # NaN
    rare = torch.tensor([[1.0, 5.0], [2.0, torch.nan], [4.0, torch.nan]])  # the second cell is in one prompt alone
    mean, low, high = cells.intervals(rare)
    assert mean[1] == 5.0
    assert low.isnan().tolist() == high.isnan().tolist() == cells.sign_flip_p(rare).isnan().tolist() == [False, True]


def test_pieces_do_not_change_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    values = draw(6, 50)
    whole = cells.intervals(values), cells.sign_flip_p(values)
    monkeypatch.setattr(maths, "ROOM", 4000)
    pieces = cells.intervals(values), cells.sign_flip_p(values)
    assert all(close(a, b, dtype=torch.float64) for a, b in zip(whole[0], pieces[0], strict=True))
    assert torch.equal(whole[1], pieces[1])


def test_twins_are_checked() -> None:
    task = pb.Task("t", [[1, 2, 3], [4, 5]], [1, 2], [[3], [3]], corrupted=[[1, 2], [4, 5]], options={"aligned": False})
    model = type("Model", (), {"vocab_size": 9})()
    with pytest.raises(pb.PatchbayError, match=r"0 \(3 and 2 tokens\)"):
        cells.check_twins(model, task)
    with pytest.raises(pb.PatchbayError, match="no corrupted twins"):
        cells.check_twins(model, pb.Task("t", [[1, 2]], [1], [[3]]))
    assert list(cells.batches(task, 4)) == [[1], [0]]

"""Folds compute what they stand for, in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.features import folds
from tests.features.given import random
from tests.tolerance import close


def near(found: Tensor, expected: Tensor) -> bool:
    return bool(close(found, expected, dtype=torch.float64))


@pytest.fixture(params=["relu", "jumprelu"])
def it(request: pytest.FixtureRequest) -> pb.Dictionary:
    return random(form=request.param, subtract=True).double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(40, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def rebuilt(one: pb.Dictionary, x: Tensor) -> Tensor:
    return one.decode(one.encode(x), x)


def test_unit_rows(it: pb.Dictionary, x: Tensor) -> None:
    unit = folds.unit_rows(it)
    assert near(unit.W_dec.norm(dim=1), torch.ones(10, dtype=torch.float64))
    assert near(rebuilt(unit, x), rebuilt(it, x))
    assert near(unit.encode(x), it.encode(x) * it.W_dec.norm(dim=1))


def test_unit_rows_of_topk_would_choose_others(x: Tensor) -> None:
    with pytest.raises(pb.PatchbayError, match="other features would be chosen"):
        folds.unit_rows(random(form="topk", k=3))


def test_features_chosen_by_their_norm(x: Tensor) -> None:
    it = random(form="topk", k=3).double()
    n = it.W_dec.norm(dim=1)
    pre = it.pre(x) * n
    top = pre.topk(3, dim=-1)
    z = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
    found = folds.selected_by_norm(it)
    assert near(found.encode(x), z)
    assert near(rebuilt(found, x), (z / n) @ it.W_dec + it.b_dec)


def test_scaled_input(it: pb.Dictionary, x: Tensor) -> None:
    assert near(rebuilt(folds.scaled_input(it, 2.5), x), rebuilt(it, 2.5 * x) / 2.5)
    assert near(folds.scaled_input(it, 2.5).encode(x), it.encode(2.5 * x))


def test_whitened_input(it: pb.Dictionary, x: Tensor) -> None:
    matrix = torch.randn(6, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    mean = torch.arange(6.0, dtype=torch.float64)
    seen = (x - mean) @ matrix
    found = folds.whitened(it, matrix, mean)
    assert near(found.encode(x), it.encode(seen))
    assert near(rebuilt(found, x), rebuilt(it, seen) @ torch.linalg.inv(matrix) + mean)


def test_the_bias_of_what_is_read(it: pb.Dictionary, x: Tensor) -> None:
    assert near(rebuilt(folds.bias_in(it), x), rebuilt(it, x))
    assert not folds.bias_in(it).subtract


def test_behind_a_norms_gain(it: pb.Dictionary, x: Tensor) -> None:
    gain, bias = torch.rand(2, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.5
    assert near(folds.after_gain(it, gain, bias).encode(gain * x + bias), it.encode(x))
    with pytest.raises(pb.PatchbayError, match="gain is 0 at 1 coordinates"):
        folds.after_gain(it, torch.tensor([1.0, 0, 1, 1, 1, 1]))


def test_a_matrix_is_turned_by_its_width_and_a_square_one_as_it_is_meant() -> None:
    w = torch.arange(12.0).view(3, 4)
    assert torch.equal(folds.oriented(w, 3, "w", d_first=True, square=True), w)
    assert torch.equal(folds.oriented(w, 4, "w", d_first=True, square=False), w.T)
    assert torch.equal(folds.oriented(w, 3, "w", d_first=False, square=False), w.T)
    square = torch.arange(9.0).view(3, 3)
    assert torch.equal(folds.oriented(square, 3, "w", d_first=True, square=True), square.T)
    assert torch.equal(folds.oriented(square, 3, "w", d_first=True, square=False), square)
    with pytest.raises(pb.PatchbayError, match="none of its sides"):
        folds.oriented(w, 5, "w", d_first=True, square=False)

"""The law of losses by size and weight in training: a planted one is found, with ends that hold it; what is no law is refused."""

from __future__ import annotations

import pytest
import torch

from patchbay.corpus.mixture_law import fit
from patchbay.errors import PatchbayError
from tests.tolerance import close

SIZES = [1e5, 3e5, 1e6, 3e6, 1e7, 3e7]
WORTH = {0.1: 0.2, 0.5: 0.6, 1.0: 1.0}


def planted(
    noise: float, seed: int = 0, a: float = 0.3, c: float = 1.7, sizes: list[float] = SIZES
) -> dict[float, list[float]]:
    """Losses of a law with b_1 = 40 and those effective shares of its weights."""
    draw = torch.Generator().manual_seed(seed)
    return {
        p: [(c + 40.0 * (f * n) ** -a) * (1 + noise * float(torch.randn((), generator=draw))) for n in sizes]
        for p, f in WORTH.items()
    }


def test_a_planted_law_is_found() -> None:
    exact = fit(planted(0.0), SIZES, draws=1)
    assert close(
        exact.a, 0.3, noise=1e6, dtype=torch.float64
    )  # a search for a minimum knows it to the root of the rounding
    assert close(exact.c, 1.7, noise=1e7, dtype=torch.float64)
    for p, f in WORTH.items():
        assert close(exact.worth[p], f, noise=1e7, dtype=torch.float64)
        assert close(exact.loss(2e5, p), 1.7 + 40 * (f * 2e5) ** -0.3, noise=1e7, dtype=torch.float64)
    wide = [10 ** (4 + i / 2) for i in range(9)]
    found = [fit(planted(0.01, seed, c=0.0, sizes=wide), wide, draws=1) for seed in range(5)]  # one per cent of noise
    assert all(abs(one.a / 0.3 - 1) < 0.03 for one in found)
    assert all(abs(one.worth[p] - f) < 0.03 for one in found for p, f in WORTH.items())
    assert all(one.worth[1.0] == 1.0 for one in found)
    ends = fit(planted(0.003, 7), SIZES, draws=10).worth_ends
    assert ends is not None
    assert 0.05 < ends[0.1][0] < ends[0.1][1] < 0.4


@pytest.mark.slow  # eighty fits
def test_its_ends_hold_the_truth_about_as_often_as_they_say() -> None:
    inside = 0
    for seed in range(8):
        law = fit(planted(0.003, 100 + seed), SIZES, draws=10, seed=seed)
        assert law.worth_ends is not None
        low, high = law.worth_ends[0.1]
        inside += low <= 0.2 <= high
        assert law.worth_ends[1.0] == (1.0, 1.0)
    assert inside >= 5
    few = fit(planted(0.01, sizes=SIZES[:4]), SIZES[:4], draws=1)
    assert few.a_ends is few.worth_ends is None


def test_what_is_no_law_is_refused() -> None:
    for losses, sizes, says in (
        ({0.5: [3.0, 2.0, 1.0]}, [1, 2, 3], "needs the weight 1"),
        ({1.0: [3.0, 2.0]}, [1, 2], "three sizes or more"),
        ({1.0: [3.0, 2.0, float("nan")]}, [1, 2, 3], "no numbers"),
        ({1.0: [1.0, 2.0, 3.0]}, [1, 2, 3], "do not fall with size"),
    ):
        with pytest.raises(PatchbayError, match=says):
            fit(losses, sizes)

"""Paired runs: the formula as loops, a planted effect, a null that is none, and what pairs are refused."""

from __future__ import annotations

import random
import statistics

import pytest
import torch
from torch import Tensor

from patchbay.errors import PatchbayError
from patchbay.train._paired import paired, sign_p
from tests.tolerance import close


def arms(effect: float, *, n_runs: int = 5, n_documents: int = 40, seed: int = 0) -> dict[str, Tensor]:
    """Losses whose documents and seeds differ far more than the arms: only pairs show the effect."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shared = 3.0 + noise(1, n_documents) + 0.5 * noise(n_runs, 1)
    return {
        "plain": shared + 0.02 * noise(n_runs, n_documents),
        "sigmoid": shared + effect + 0.02 * noise(n_runs, n_documents),
        "shuffled": shared + 0.02 * noise(n_runs, n_documents),
    }


def test_planted() -> None:
    """An effect a tenth of what seeds differ by: its sign in every run, an interval that holds it, and the null far from it."""
    found = paired(arms(0.05), twin="plain", unit="nats", nulls=["shuffled"], seeds=[3, 4, 5, 6, 7])
    assert found.labels_of("condition") == ["sigmoid - plain", "shuffled - plain", "sigmoid - shuffled"]
    assert found.labels_of("run") == [3, 4, 5, 6, 7]
    for i in (0, 2):
        assert float(found["low"][i]) < 0.05 < float(found["high"][i])
        assert float(found["low"][i]) > 0.03
        assert int(found["above"][i]) == 5
        assert float(found["p"][i]) == 0.0625
    assert float(found["low"][1]) < 0.0 < float(found["high"][1])
    assert "5 of 5 runs above 0, 0 below, p 0.0625" in found.notes[0]


def test_reference() -> None:
    """Means and signs as plain loops over runs and documents; a run's interval is that of its own documents."""
    values = arms(0.01, n_runs=4, n_documents=7, seed=3)
    found = paired(values, twin="plain", unit="nats", draws=500)
    for i, name in enumerate(("sigmoid", "shuffled")):
        runs = []
        for run in range(4):
            gaps = [float(values[name][run, d]) - float(values["plain"][run, d]) for d in range(7)]
            runs.append(statistics.fmean(gaps))
            rng = random.Random(run)
            means = sorted(statistics.fmean(rng.choices(gaps, k=7)) for _ in range(4000))
            width = means[3899] - means[100]
            assert abs(float(found["run_low"][i, run]) - means[100]) < 0.15 * width
            assert abs(float(found["run_high"][i, run]) - means[3899]) < 0.15 * width
        assert close(found["by_run"][i], torch.tensor(runs, dtype=torch.float64), of=3.0, dtype=torch.float64)
        assert int(found["above"][i]) == sum(run > 0 for run in runs)
        assert int(found["below"][i]) == sum(run < 0 for run in runs)
        joint = [
            statistics.fmean(float(values[name][r, d] - values["plain"][r, d]) for r in range(4)) for d in range(7)
        ]
        assert min(joint) < float(found["low"][i]) < statistics.fmean(joint) < float(found["high"][i]) < max(joint)


@pytest.mark.parametrize(
    ("above", "below", "p"),
    [(5, 0, 0.0625), (3, 0, 0.25), (0, 5, 0.0625), (4, 1, 0.375), (2, 2, 1.0), (1, 0, 1.0), (8, 1, 20 / 512)],
)
def test_signs_as_counted_by_hand(above: int, below: int, p: float) -> None:
    assert sign_p(above, below) == p


def test_null() -> None:
    """Arms of one recipe: the interval over documents misses 0 no oftener than it should, and all five signs agree one time in 16."""
    missed, agreed = 0, 0
    for seed in range(60):
        found = paired(arms(0.0, seed=seed, n_documents=30), twin="plain", unit="nats", draws=200)
        missed += int((found["low"][0] > 0) | (found["high"][0] < 0))
        agreed += int(float(found["p"][0]) <= 0.0625)
    assert missed <= 9
    assert 0 < agreed <= 10


def test_arms_that_are_one_tie() -> None:
    values = arms(0.0)
    found = paired({"plain": values["plain"], "same": values["plain"].clone()}, twin="plain", unit="nats")
    assert int(found["above"]) == int(found["below"]) == 0
    assert bool(found["p"].isnan().all())


def test_few_runs_and_one_number_say_so() -> None:
    found = paired(arms(0.1, n_runs=3), twin="plain", unit="nats")
    assert "3 runs: signs alone reach no p below 0.25; 5 reach 0.0625" in found.notes
    single = paired({name: v.mean(1) for name, v in arms(0.1).items()}, twin="plain", unit="nats")
    assert bool(single["low"].isnan().all())
    assert "one number for a run: nothing is said of other documents" in single.notes
    assert float(single["p"][0]) == 0.0625


def test_what_makes_no_pairs_is_refused() -> None:
    values = arms(0.1)
    with pytest.raises(PatchbayError, match="no arm 'plane'; arms are plain, sigmoid, shuffled"):
        paired(values, twin="plane", unit="nats")
    with pytest.raises(PatchbayError, match=r"arm 'sigmoid' is \(4, 40\) beside \(5, 40\) of 'plain'"):
        paired(values | {"sigmoid": values["sigmoid"][:4]}, twin="plain", unit="nats")
    with pytest.raises(PatchbayError, match="two arms or more"):
        paired({"plain": values["plain"]}, twin="plain", unit="nats")
    with pytest.raises(PatchbayError, match="two arms or more, the twin no null arm"):
        paired(values, twin="plain", nulls=["plain"], unit="nats")
    values["sigmoid"][2, 1] = torch.nan
    with pytest.raises(PatchbayError, match="arm 'sigmoid', run 2, document 1 is nan: a run that diverged"):
        paired(values, twin="plain", unit="nats")

"""What identifies a metric: values by their numbers, functions by what they compute and read."""

from __future__ import annotations

from collections.abc import Callable

import torch

from patchbay.sweeps.identity import identity


def test_arrays_are_their_numbers() -> None:
    zeros, ones = torch.zeros(3), torch.ones(3)
    assert identity(zeros, "x") == identity(torch.zeros(3), "x")
    others = (ones, zeros.double(), zeros[:2], zeros[None], zeros.numpy())
    assert len({str(identity(one, "x")) for one in (zeros, *others)}) == 6


def test_functions_are_what_they_compute_and_close_over() -> None:
    def made(by: torch.Tensor) -> Callable[[float], torch.Tensor]:
        return lambda x: x * by

    assert identity(made(torch.ones(2)), "x") == identity(made(torch.ones(2)), "x")
    assert identity(made(torch.ones(2)), "x") != identity(made(torch.zeros(2)), "x")
    assert identity(lambda x: x + 1, "x") != identity(lambda x: x + 2, "x")

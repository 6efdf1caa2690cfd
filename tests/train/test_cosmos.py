"""COSMOS: the step's norm, Newton-Schulz's singular values, the guard at full rank, and the step by the paper's formula."""

from __future__ import annotations

import torch

from patchbay.train import _cosmos
from patchbay.train._cosmos import Cosmos, direction, newton_schulz
from tests.tolerance import close

GROUP = {"betas": (0.9, 0.95), "rank": 4, "ratio": 0.2, "eps": 1e-8}


def matrix(m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_newton_schulz_brings_singular_values_near_one() -> None:
    for shape in ((12, 20), (20, 12)):
        found = torch.linalg.svdvals(newton_schulz(matrix(*shape)))
        assert float(found.min()) > 0.3
        assert float(found.max()) < 1.2


def test_the_step_has_the_norm_that_it_says() -> None:
    state: dict[str, object] = {}
    for t in range(1, 4):
        state["step"] = t
        step = direction(matrix(6, 10, t), state, GROUP)
        assert close(step.norm(), (60**0.5) * 0.2)


def full_rank(guard: bool) -> float:
    """The cosine of the step at full rank to rotated Adam's alone, after a few gradients."""
    state: dict[str, object] = {}
    group = {**GROUP, "rank": 10}
    kept = _cosmos.GUARD
    _cosmos.GUARD = kept if guard else 0.0
    try:
        for t in range(1, 6):
            state["step"] = t
            g = matrix(24, 10, t)
            step = direction(g, state, group)
    finally:
        _cosmos.GUARD = kept
    b1, b2 = 0.9, 0.95
    smooth = (g + b1 * state["M"]) / (1 + b1 * (1 - b1**5) / (1 - b1))  # type: ignore[operator]
    pure = (smooth @ state["P"] / ((state["V"] / (1 - b2**5)).sqrt() + 1e-8)) @ state["P"].T  # type: ignore[operator, attr-defined]
    return float(torch.nn.functional.cosine_similarity(step.flatten(), pure.flatten(), 0))


def test_rounding_left_at_full_rank_is_no_direction() -> None:
    assert close(full_rank(guard=True), 1.0)
    assert full_rank(guard=False) < 0.99  # Newton-Schulz blows up what rounding leaves


def test_reference_step() -> None:
    """Three steps by the formula, in fp64 and with explicit projections."""
    b1, b2, m, n, rank = 0.9, 0.95, 6, 9, 3
    group = {**GROUP, "rank": rank}
    state: dict[str, object] = {}
    M = torch.zeros(m, n, dtype=torch.float64)
    V = torch.zeros(m, rank, dtype=torch.float64)
    for t in range(1, 4):
        g = matrix(m, n, t, torch.float64)
        state["step"] = t
        mine = direction(g.clone(), state, group)
        M = b1 * M + g
        if t == 1:
            P = torch.linalg.eigh(g.T @ g).eigenvectors.flip(1)[:, :rank]
            S = (1 - b2) * P.T @ g.T @ g @ P
        else:
            new = torch.linalg.qr(b2 * P @ S + (1 - b2) * g.T @ g @ P).Q
            S = b2 * new.T @ P @ S @ P.T @ new + (1 - b2) * new.T @ g.T @ g @ new
            P = new
        if t == 1:  # an eigenvector's sign is free; what is built of it is not
            P, S = state["P"], (1 - b2) * state["P"].T @ g.T @ g @ state["P"]  # type: ignore[attr-defined, operator]
        V = b2 * V + (1 - b2) * (g @ P) ** 2
        N = (g + b1 * M) / (1 + b1 * (1 - b1**t) / (1 - b1))
        rest = newton_schulz(N - N @ P @ P.T)
        step = (N @ P / ((V / (1 - b2**t)).sqrt() + 1e-8)) @ P.T + 0.2 * (m * n) ** 0.5 * rest / rest.norm()
        assert close(mine, step * (m * n) ** 0.5 * 0.2 / step.norm())


def test_it_lowers_a_loss_and_keeps_fewer_numbers_than_adam() -> None:
    weight, target = torch.nn.Parameter(torch.zeros(40, 30)), matrix(40, 30)
    bias = torch.nn.Parameter(torch.zeros(30))
    fit = Cosmos([weight, bias], lr=0.05, rank=5)
    first = None
    for _ in range(60):
        loss = (weight + bias - target).square().mean()
        first = first if first is not None else float(loss.detach())
        fit.zero_grad()
        loss.backward()
        fit.step()
    assert float(loss.detach()) < 0.5 * first
    kept = sum(value.numel() for value in fit.state[weight].values() if isinstance(value, torch.Tensor))
    assert kept == 40 * 30 + 40 * 5 + 30 * 5 + 5 * 5 < 2 * 40 * 30

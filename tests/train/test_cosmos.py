"""COSMOS: the step's norm, Newton-Schulz's singular values, the guard at full rank, and the step by the paper's formula."""

from __future__ import annotations

import math

import pytest
import torch

from patchbay.train import _cosmos
from patchbay.train._cosmos import Cosmos, direction, newton_schulz
from tests.tolerance import close

GROUP = {"betas": (0.9, 0.95), "rank": 4, "ratio": 0.2, "eps": 1e-8}


def matrix(m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_newton_schulz_brings_singular_values_near_one() -> None:
    """Between .68 and 1.14 from 0.0075 of the norm up, in the directions that they had; both ends are reached, and what is smaller is left below."""
    values = torch.logspace(math.log10(0.0075), 0, 200, dtype=torch.float64)
    seen = []
    for i in range(0, 200, 8):
        some = values[i : i + 8]
        U, V = (torch.linalg.qr(matrix(n, 9, i + n, torch.float64)).Q for n in (12, 20))
        least = (1 - some.square()[:, None]).clamp_min(0).sqrt()  # a ninth direction makes the norm 1
        for one, rest in zip(some, least[:, 0], strict=True):
            x = 3.0 * (one * torch.outer(U[:, 0], V[:, 0]) + rest * torch.outer(U[:, 1], V[:, 1]))
            for found in (newton_schulz(x), newton_schulz(x.T).T):
                seen.append(float(U[:, 0] @ found @ V[:, 0]))
                assert close(found @ V[:, 0], seen[-1] * U[:, 0], dtype=torch.float64, noise=512)
    assert 0.68 < min(seen) < 0.69
    assert 1.13 < max(seen) < 1.14
    tiny = newton_schulz(torch.diag(torch.tensor([1.0, 1e-4])))
    assert float(tiny[1, 1]) < 0.1


@pytest.mark.parametrize("ratio", [0.2, 0.7])
def test_the_step_has_the_norm_that_it_says(ratio: float) -> None:
    state: dict[str, object] = {}
    for t in range(1, 4):
        state["step"] = t
        step = direction(matrix(6, 10, t), state, {**GROUP, "ratio": ratio})
        assert close(step.norm(), (60**0.5) * ratio)


@pytest.mark.parametrize(("m", "n"), [(24, 10), (6, 9)], ids=["tall", "wide"])
def test_at_full_rank_the_step_is_that_of_one_sided_soap(m: int, n: int) -> None:
    """The right side's covariance kept whole, its directions turned by QR as SOAP turns them, Adam in them; the signs of directions cancel."""
    b1, b2 = 0.9, 0.95
    state: dict[str, object] = {}
    gram, first = torch.zeros(n, n, dtype=torch.float64), torch.zeros(m, n, dtype=torch.float64)
    second = torch.zeros(m, n, dtype=torch.float64)
    for t in range(1, 6):
        g = matrix(m, n, t, torch.float64)
        state["step"] = t
        mine = direction(g.clone(), state, {**GROUP, "rank": n})
        gram = b2 * gram + (1 - b2) * g.T @ g
        first = b1 * first + g
        # the first basis is any of the eigenvectors', which a wide matrix leaves free where its gradient is 0
        basis = state["P"].clone() if t == 1 else torch.linalg.qr(gram @ basis).Q  # type: ignore[attr-defined]
        second = b2 * second + (1 - b2) * (g @ basis).square()
        nesterov = (g + b1 * first) / (1 + b1 * sum(b1**k for k in range(t)))
        soap = (nesterov @ basis / ((second / (1 - b2**t)).sqrt() + 1e-8)) @ basis.T
        if t == 1:
            inside = basis.T @ g.T @ g @ basis
            assert close(inside, inside.diagonal().diag(), of=float(inside.max()), dtype=torch.float64)
        assert close(mine / mine.norm(), soap / soap.norm(), dtype=torch.float64, noise=512)


def test_adam_is_what_it_is_where_directions_are_channels() -> None:
    """Rows of one entry each have a diagonal covariance, whose directions are the channels: then it is Adam, and for other gradients it is not."""
    for each in (True, False):
        state: dict[str, object] = {}
        first, second = torch.zeros(12, 4, dtype=torch.float64), torch.zeros(12, 4, dtype=torch.float64)
        for t in range(1, 4):
            g = matrix(12, 4, t, torch.float64)
            if each:
                g *= torch.nn.functional.one_hot(torch.arange(12) % 4, 4)
            state["step"] = t
            mine = direction(g.clone(), state, {**GROUP, "rank": 4})
            first, second = 0.9 * first + g, 0.95 * second + 0.05 * g.square()
        adam = (g + 0.9 * first) / ((second / (1 - 0.95**3)).sqrt() + 1e-8)
        alike = float(torch.nn.functional.cosine_similarity(mine.flatten(), adam.flatten(), 0))
        assert alike > 1 - 1e-12 if each else alike < 0.99


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

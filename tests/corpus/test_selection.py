"""GOT-D: the gradient is a central difference of the cost, sums to 0, sees no constant; planted kinds are chosen, also the rare one."""

from __future__ import annotations

import random

import pytest
import torch

import patchbay as pb
from patchbay.corpus.selection import gradient, pick, select, states, transport
from tests.given import lent
from tests.tolerance import close


def clouds(seed: int, *centres: tuple[float, float, int]) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.cat(
        [torch.randn(n, 2, generator=draw, dtype=torch.float64) * 0.3 + torch.tensor([x, y]) for x, y, n in centres]
    )


def uneven(n: int, seed: int) -> torch.Tensor:
    w = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.2
    return w / w.sum()


def test_the_gradient_is_that_of_the_cost() -> None:
    """Mass moved to a text from all others alike, a little more and a little less."""
    pool, target = clouds(0, (0, 0, 6), (3, 1, 3)), clouds(1, (3, 1, 5))
    cost, a, b = torch.cdist(pool, target).square(), uneven(9, 2), uneven(5, 3)
    _, f = transport(cost, a, b)
    found, h = gradient(f), 1e-5
    for i in range(9):
        to = torch.full((9,), -1.0 / 8, dtype=torch.float64)
        to[i] = 1.0
        more, less = (transport(cost, a + sign * h * to, b)[0] for sign in (1, -1))
        assert float((more - less) / (2 * h)) == pytest.approx(float(found[i]), rel=0.01, abs=0.01)
    assert close(found.sum(), torch.zeros((), dtype=torch.float64), of=float(found.abs().sum()))
    assert close(gradient(f + 5.0), found, of=float(f.abs().max()) + 5.0)


def test_points_on_a_line_cost_what_sorting_says() -> None:
    """At a small reach the plan is the sorted one."""
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(6, generator=draw, dtype=torch.float64) for _ in range(2))
    even = torch.full((6,), 1 / 6, dtype=torch.float64)
    found, _ = transport((x[:, None] - y[None]).square(), even, even, reach=0.002, steps=20_000)
    assert float(found) == pytest.approx(float((x.sort().values - y.sort().values).square().mean()), abs=0.02)


def test_what_is_like_the_target_is_chosen_and_its_rare_kind_too() -> None:
    pool = clouds(0, (0, 0, 60), (4, 0, 10), (0, 4, 10))  # 60 of the pool's own, ten of each kind of the target
    target = clouds(1, (4, 0, 20), (0, 4, 5))
    found = select(pool, target, 16)
    kinds = [sum(60 <= i < 70 for i in found), sum(i >= 70 for i in found)]
    assert sum(kinds) == 16
    assert min(kinds) >= 2
    null = select(
        pool, clouds(2, (0, 0, 60), (4, 0, 10), (0, 4, 10)), 16
    )  # a target like the pool: nothing of a kind stands out
    assert sum(i >= 60 for i in null) < 12


def test_states_are_means_over_tokens_less_the_mean_of_all() -> None:
    model, texts = lent("llama"), [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    found = states(model, texts, layer=0, batch_size=2)
    rows = torch.stack(
        [pb.run(model, [ids], taps=["L0.resid_out"])["L0.resid_out"][0].double().mean(0) for ids in texts]
    )
    assert close(found.float(), (rows - rows.mean(0)).float(), of=float(rows.abs().max()))


def test_pool_and_target_are_centred_together() -> None:
    """Texts of the target's tokens are taken; by states that have means of their own, others are."""
    model, draw = lent("llama"), random.Random(0)
    mine, other = ([[draw.randrange(a, a + 8) for _ in range(8)] for _ in range(n)] for a, n in ((5, 12), (60, 6)))
    target = [[draw.randrange(60, 68) for _ in range(8)] for _ in range(12)]
    found = pick(model, mine + other, target, 6, layer=0)
    both = states(model, [*mine, *other, *target], layer=0)
    assert found == select(both[:18], both[18:], 6)
    assert set(found) == set(range(12, 18))
    assert set(select(states(model, mine + other, layer=0), states(model, target, layer=0), 6)) != set(found)


def test_even_weights_on_both_sides_leave_an_exact_plan_open() -> None:
    """Of two points each, every potential between two ends is optimal, and their gradients differ; at a small reach the plan's is one of them, far off or not."""
    cost = torch.tensor([[0.0, 3.0], [3.0, 0.0]], dtype=torch.float64)
    even = torch.full((2,), 0.5, dtype=torch.float64)
    value, f = transport(cost, even, even)
    for apart in (-3.0, 0.0, 3.0):  # f = (apart, 0), g = (- apart, 0): feasible, and of the optimum's value
        one, other = torch.tensor([apart, 0.0]), torch.tensor([-apart, 0.0])
        assert bool((one[:, None] + other[None] <= cost + 1e-12).all())
        assert float((one * 0.5).sum() + (other * 0.5).sum()) == 0.0
        assert float(gradient(one.double())[0]) == apart
    assert close(gradient(f), torch.zeros(2, dtype=torch.float64), of=3.0)  # the entropic one is in the middle
    assert float(value) == pytest.approx(0.0, abs=0.2)


def test_refusals() -> None:
    two = torch.zeros(2, 3, dtype=torch.float64)
    for call, says in (
        (lambda: select(two, torch.zeros(2, 4), 1), "states of one width"),
        (lambda: select(two, two, 3), "at most all of them"),
        (lambda: select(two, two, 1), "all above 0"),
        (lambda: states(lent("llama"), []), "no texts"),
        (lambda: pick(lent("llama"), [], [[5, 6]], 1), "a pool of 0 texts, a target of 1"),
        (lambda: pick(lent("llama"), [[5, 6], [7, 8]], [], 1), "a target of 0"),
    ):
        with pytest.raises(pb.PatchbayError, match=says):
            call()

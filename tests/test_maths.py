"""maths: against scipy, against plain loops, and by algebra."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchbay import maths
from patchbay.signal.port import PatchbayError
from tests.tolerance import close

stats = pytest.importorskip("scipy.stats", reason="scipy is the reference of these tests")
special = pytest.importorskip("scipy.special")


def some_logits(prompts: int = 7, vocab: int = 11, seed: int = 0) -> torch.Tensor:
    return torch.randn(prompts, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def test_logit_diff_is_right_minus_the_mean_of_wrong_and_ignores_padding():
    logits = some_logits(3)
    right, wrong = torch.tensor([0, 4, 9]), torch.tensor([[1, 2, -1], [3, -1, -1], [8, 7, 6]])
    for i, ids in enumerate([[1, 2], [3], [8, 7, 6]]):
        expected = float(logits[i, right[i]]) - sum(float(logits[i, j]) for j in ids) / len(ids)
        assert close(maths.logit_diff(logits, right, wrong)[i].item(), expected, of=1.0)
    single = maths.logit_diff(logits, right, wrong[:, 0])
    assert torch.equal(single, logits[range(3), right] - logits[range(3), wrong[:, 0]])


def test_padding_is_ignored_even_where_token_0_is_infinite():
    logits = torch.tensor([[-torch.inf, 1.0, 3.0]])
    assert maths.logit_diff(logits, torch.tensor([2]), torch.tensor([[1, -1]])).item() == 2.0


def test_probabilities_equal_scipy():
    logits = some_logits()
    right = torch.arange(7)
    expected = special.log_softmax(logits.double().numpy(), axis=1)[range(7), range(7)]
    assert close(maths.log_probability(logits, right), expected)
    assert close(maths.probability(logits, right), np.exp(expected), of=1.0)


def test_half_precision_logits_are_read_in_float32():
    logits = torch.full((1, 1000), 10.0, dtype=torch.bfloat16)
    assert close(maths.log_probability(logits, torch.tensor([3])).item(), -math.log(1000), of=1.0)


def test_rank_counts_ties_and_nan_against_the_right_token():
    logits = torch.tensor(
        [[3.0, 2.0, 1.0], [2.0, 2.0, 1.0], [1.0, 1.0, 1.0], [0.0, math.nan, -1.0], [math.nan, 0.0, 1.0]]
    )
    assert maths.rank(logits, torch.tensor([0, 0, 1, 0, 0])).tolist() == [0, 1, 2, 1, 2]


def test_accuracy_against_wrong_answers_and_against_the_vocabulary():
    logits = torch.tensor([[5.0, 1.0, 9.0], [5.0, 5.0, 0.0], [1.0, 2.0, 3.0]])
    right, wrong = torch.tensor([0, 0, 2]), torch.tensor([[1, -1], [1, 2], [0, 1]])
    assert maths.accuracy(logits, right, wrong).tolist() == [1.0, 0.0, 1.0]  # a tie loses
    assert maths.accuracy(logits, right).tolist() == [0.0, 0.0, 1.0]


def test_kl_equals_scipy_is_zero_on_itself_and_knows_impossible_tokens():
    p, q = some_logits(seed=1), some_logits(seed=2)
    expected = stats.entropy(special.softmax(p.double().numpy(), 1), special.softmax(q.double().numpy(), 1), axis=1)
    assert close(maths.kl(p, q), expected)
    assert (maths.kl(p, p) == 0).all()
    p = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    assert (maths.kl(p, p + 1e-7) >= 0).all()  # rounding alone would give -1e-8
    never = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert close(maths.kl(never, torch.zeros(1, 3)).item(), math.log(3 / 2), of=1.0)
    assert maths.kl(torch.zeros(1, 3), never).item() == math.inf


def test_kl_has_finite_gradients_with_masked_tokens():
    p = torch.tensor([[0.5, 0.0, -torch.inf]], requires_grad=True)
    maths.kl(p, torch.tensor([[0.0, 1.0, -torch.inf]])).sum().backward()
    assert p.grad is not None
    assert p.grad.isfinite().all()


def test_cosine_equals_scipy_broadcasts_and_survives_extremes():
    from scipy.spatial.distance import cosine

    a, b = torch.randn(5, 8), torch.randn(8)
    assert close(maths.cosine(a, b), [1 - cosine(row.numpy(), b.numpy()) for row in a], of=1.0)
    assert close(maths.cosine(1e15 * a, 1e-15 * a), 1.0, of=1.0)
    assert maths.cosine(torch.zeros(8), b).isnan()


def test_project_equals_least_squares_with_dependent_and_crooked_rows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    rows = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    basis = torch.stack(
        [rows[0], 2 * rows[0], rows[1], rows[0] - rows[1]]
    )  # rank 2; a plain QR would keep 4 directions
    solution = np.linalg.lstsq(basis.T.numpy(), x.T.numpy(), rcond=None)[0]
    inside = maths.project(x, basis)
    assert close(inside, (basis.T.numpy() @ solution).T, dtype=torch.float64)
    assert close((x - inside) @ basis.T, 0.0, of=x, dtype=torch.float64)
    assert close(maths.project(inside, basis), inside, dtype=torch.float64)
    assert maths.orthonormal(basis).shape == (2, 9)
    assert (maths.project(x, torch.zeros(1, 9, dtype=torch.float64)) == 0).all()
    assert close(maths.project(x, rows[0]), maths.project(x, rows[:1]), dtype=torch.float64)


def test_bootstrap_agrees_with_scipy_and_is_reproducible():
    values = torch.randn(60, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 1
    ours = maths.bootstrap_interval(values, n=8000)
    theirs = stats.bootstrap((values.numpy(),), np.mean, n_resamples=8000, method="percentile", random_state=0)
    assert close(ours.mean, values.mean().item(), of=1.0)
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.02)
    assert ours == maths.bootstrap_interval(values, n=8000)
    assert ours != maths.bootstrap_interval(values, n=8000, seed=1)
    assert maths.bootstrap_interval(values, level=0.5).high < ours.high


def test_bootstrap_blocks_give_every_draw():
    values = torch.arange(3_000_000.0)  # one draw per block
    interval = maths.bootstrap_interval(values, n=4)
    assert interval.low < interval.high
    assert abs(interval.mean - 1_499_999.5) < 1


def test_one_value_has_no_interval_and_nan_stays_nan():
    assert maths.bootstrap_interval(torch.tensor([2.0])).mean == 2.0
    assert math.isnan(maths.bootstrap_interval(torch.tensor([2.0])).low)
    assert all(math.isnan(x) for x in maths.bootstrap_interval(torch.tensor([2.0, math.nan])))


def test_paired_interval_is_the_interval_of_the_difference():
    a, b = torch.randn(20), torch.randn(20)
    assert maths.paired_interval(a, b) == maths.bootstrap_interval(a.double() - b.double())


def test_drawing_leaves_the_global_random_state():
    before = torch.get_rng_state()
    maths.bootstrap_interval(torch.randn(5, generator=torch.Generator().manual_seed(0)))
    maths.permutation_p(torch.arange(30.0), torch.zeros(30), n=100)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("count", [4, 9])
def test_permutation_p_is_exact_on_few_prompts(count):
    generator = torch.Generator().manual_seed(count)
    a, b = (torch.randn(count, generator=generator, dtype=torch.float64) for _ in "ab")
    theirs = stats.permutation_test(
        (a.numpy(), b.numpy()), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
    )
    assert maths.permutation_p(a + 0.5, b) == pytest.approx(
        stats.permutation_test(
            ((a + 0.5).numpy(), b.numpy()), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
        ).pvalue
    )
    assert maths.permutation_p(a, b) == pytest.approx(theirs.pvalue)


def test_permutation_p_by_sampling_is_near_the_exact_value():
    generator = torch.Generator().manual_seed(5)
    a = torch.randn(12, generator=generator) + 0.5
    exact = maths.permutation_p(a, torch.zeros(12), n=5000)  # 4096 patterns
    drawn = maths.permutation_p(a, torch.zeros(12), n=4000)
    assert drawn != exact
    assert drawn == pytest.approx(exact, abs=0.03)
    assert maths.permutation_p(a, a) == 1.0
    assert maths.permutation_p(torch.ones(40), torch.zeros(40), n=999) == pytest.approx(1 / 1000)


def test_benjamini_hochberg_equals_scipy_and_keeps_nan():
    p = torch.rand(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = stats.false_discovery_control(p.flatten().numpy()).reshape(4, 6)
    assert close(maths.benjamini_hochberg(p), expected, dtype=torch.float64)
    with_gap = torch.cat([p[0], torch.tensor([math.nan])])
    adjusted = maths.benjamini_hochberg(with_gap)
    assert close(adjusted[:6], stats.false_discovery_control(p[0].numpy()), dtype=torch.float64)
    assert adjusted[6].isnan()
    assert maths.benjamini_hochberg(torch.tensor([math.nan])).isnan().all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=20))
def test_spearman_equals_scipy_with_ties(pairs):
    a, b = torch.tensor(pairs, dtype=torch.float64).T
    if len(a.unique()) == 1 or len(b.unique()) == 1:
        assert math.isnan(maths.spearman(a, b))
    else:
        assert close(maths.spearman(a, b), stats.spearmanr(a.numpy(), b.numpy()).statistic, of=1.0)


def test_spearman_of_deals_is_spearman_of_each():
    a, b = torch.tensor([3.0, 1.0, 1.0, 7.0, 2.0, 7.0]), torch.tensor([0.5, 0.5, 2.0, 1.0, 9.0, -1.0])
    deals = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(seed)) for seed in range(20)])
    found = maths.spearman_of_deals(a, b, deals)
    each = torch.tensor([maths.spearman(a, b[deal]) for deal in deals], dtype=torch.float64)
    assert close(found, each, dtype=torch.float64)
    assert len(found.unique()) > 5


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: maths.rank(torch.zeros(3), torch.tensor([0])), r"\[prompt, vocab\].*\(3,\)"),
        (lambda: maths.rank(torch.zeros(1, 3), torch.tensor([3])), r"0\.\.2"),
        (lambda: maths.rank(torch.zeros(2, 3), torch.tensor([0, 3])), r"0\.\.2"),
        (lambda: maths.rank(torch.zeros(2, 3), torch.tensor([-1, 0])), r"0\.\.2"),
        (lambda: maths.logit_diff(torch.zeros(2, 3), torch.tensor([0, 0]), torch.tensor([1, -1])), "prompt 1 has no"),
        (lambda: maths.logit_diff(torch.zeros(1, 3), torch.tensor([0]), torch.tensor([3])), "below 3"),
        (lambda: maths.kl(torch.zeros(1, 3), torch.zeros(1, 4)), "equal shapes"),
        (lambda: maths.project(torch.zeros(3), torch.zeros(1, 4)), "one width"),
        (lambda: maths.bootstrap_interval(torch.zeros(0)), "at least one"),
        (lambda: maths.bootstrap_interval(torch.zeros(3), level=95), "level=95"),
        (lambda: maths.paired_interval(torch.zeros(3), torch.zeros(4)), "3 and 4"),
        (lambda: maths.benjamini_hochberg(torch.tensor([1.5])), r"\[0, 1\]"),
        (lambda: maths.spearman(torch.zeros(3), torch.zeros(4)), "3 and 4"),
    ],
)
def test_errors_say_what_was_found(call, says):
    with pytest.raises(PatchbayError, match=says):
        call()


def test_sign_flips_of_many_cells_are_those_of_each():
    """Exact and sampled, with a value missing, a cell without any, and rounding that counts as 0."""
    for count in (6, 15):
        values = torch.randn(count, 2, 3, generator=torch.Generator().manual_seed(count)) + 0.4
        found = maths.sign_flip_p(values)
        for i, j in np.ndindex(2, 3):
            assert found[i, j].item() == pytest.approx(maths.permutation_p(values[:, i, j], torch.zeros(count)))
    values[:, 0, 0], values[0, 0, 1], values[:, 0, 2] = torch.nan, torch.nan, 1e-8
    found = maths.sign_flip_p(values, floor=1e-6)
    assert found[0, 0].isnan()
    without = maths.permutation_p(values[1:, 0, 1], torch.zeros(count - 1))
    assert found[0, 1].item() == pytest.approx(without, abs=0.02)  # other coins
    assert found[0, 2] == 1.0


def test_the_least_p_of_sampled_flips_counts_the_prompts_as_they_are():
    """Forty prompts of one sign: none of 10,000 patterns of coins is as far from 0."""
    assert maths.sign_flip_p(torch.full((40, 1), 3.0)).item() == 1 / 10_001
    assert maths.permutation_p(torch.full((40,), 3.0), torch.zeros(40), n=500) == 1 / 501


def test_there_is_one_of_each_test_and_interval():
    names = ("bootstrap_interval", "paired_interval", "permutation_p", "benjamini_hochberg", "intervals", "sign_flip_p")
    room = Path(maths.__file__).parent
    found = [(path.name, name) for path in room.rglob("*.py") for name in names if f"def {name}(" in path.read_text()]
    assert sorted(found) == sorted(("maths.py", name) for name in names)


def test_beyond_draws_holds_one_more_draw_95_times_in_100() -> None:
    """Effects and random sets of one distribution: no difference lies inside the interval, of few draws as of many."""
    for draws in (3, 20):
        generator, inside = torch.Generator().manual_seed(0), 0
        for trial in range(400):
            means = 2.0 * torch.randn(draws + 1, 1, generator=generator, dtype=torch.float64)
            values = means + torch.randn(draws + 1, 40, generator=generator, dtype=torch.float64)
            found = maths.beyond_draws(values[0], values[1:], n=100, seed=trial)
            inside += found.low <= 0.0 <= found.high
        assert 0.92 <= inside / 400 <= 0.98


def test_beyond_draws_is_by_hand() -> None:
    own, drawn = torch.tensor([3.0] * 4), torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]]).expand(5, 4)
    found = maths.beyond_draws(own, drawn, n=100_000)
    # means 0 to 4 about 2, a spread of sqrt(2.5): Student's t with 4 degrees of freedom, for one more beside five
    half = float(stats.t.ppf(0.975, 4)) * (2.5 * (1 + 1 / 5)) ** 0.5
    assert found.mean == 1.0
    assert found[1:] == pytest.approx((1.0 - half, 1.0 + half), rel=0.02)
    noisy = own + torch.tensor([6.0, -6.0, 2.0, -2.0])  # the prompts' own spread comes on top
    wider = maths.beyond_draws(noisy, drawn, n=100_000)
    assert wider.high - wider.low > 1.1 * (found.high - found.low)
    same = torch.zeros(5, 4)  # draws that are all alike: the prompts' interval alone
    assert maths.beyond_draws(noisy, same) == pytest.approx(maths.bootstrap_interval(noisy), rel=0.05)
    alone = maths.beyond_draws(own, drawn[:1])
    assert alone.mean == 3.0
    assert alone.low != alone.low
    assert alone.high != alone.high
    with pytest.raises(PatchbayError, match=r"draws are \[draw, prompt\]"):
        maths.beyond_draws(own, drawn[:, :2])


def test_ties_are_ties_in_float32_too() -> None:
    """Slopes that are tenths: many patterns of signs give the very sum that is seen."""
    tenths = torch.randint(-9, 10, (9, 40), generator=torch.Generator().manual_seed(0))
    expected = maths.sign_flip_p(tenths.double())
    assert torch.equal(maths.sign_flip_p(tenths.float() / 10), expected)
    assert torch.equal(maths.sign_flip_p(tenths.float() * 0.7), expected)
    set_ = torch.tensor([0.1, 0.2, 0.3])
    again = (set_[1] + set_[2]) + set_[0]
    assert maths.draws_p(float(set_.sum()), torch.stack([again, again * 2, again * 0])) == 3 / 4


def test_draws_p_counts_the_call_itself() -> None:
    drawn = torch.tensor([-3.0, 0.0, 1.0, 2.0])
    assert maths.draws_p(5.0, drawn) == 1 / 5
    assert maths.draws_p(1.0, drawn) == 3 / 5, "an equal draw is as high"
    assert maths.draws_p(-2.5, drawn) == 4 / 5
    assert maths.draws_p(-2.5, drawn, two_sided=True) == 2 / 5


@pytest.mark.parametrize("two_sided", [False, True])
def test_draws_p_is_uniform_where_nothing_is(two_sided: bool) -> None:
    """Kolmogorov and Smirnov over 400 nulls: the largest gap to the uniform distribution on 1/20 .. 1 is below its 1 % limit."""
    draws = torch.randn(400, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p = torch.tensor([maths.draws_p(float(row[0]), row[1:], two_sided=two_sided) for row in draws]).sort().values
    assert p[0] >= 1 / 20
    steps = torch.arange(1, 21) / 20
    found = torch.stack([(p <= step + 1e-6).double().mean() for step in steps])
    assert (found - steps).abs().max() < 1.63 / 400**0.5


def test_bootstrap_interval_covers_the_mean_95_times_in_100() -> None:
    generator = torch.Generator().manual_seed(2)
    inside = 0
    for trial in range(400):
        found = maths.bootstrap_interval(torch.randn(60, generator=generator) + 1.0, n=400, seed=trial)
        inside += found.low <= 1.0 <= found.high
    assert 0.92 <= inside / 400 <= 0.98

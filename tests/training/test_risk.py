"""CVaR against solvers that know nothing of it, its gradient against differences, and its other forms against loops."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linprog, minimize_scalar

from affcache.training import risk
from affcache.training.risk import TailThreshold, cvar, rank_weights, tail_size, tail_within

Array = npt.NDArray[np.float64]

ALPHAS = st.floats(0.005, 1) | st.sampled_from([0.1, 0.25, 0.5, 1.0])
FEW_VALUES = st.sampled_from([-1.5, 0.0, 0.25, 2.0])  # ties
SIZES = st.integers(1, 200)
SMALLEST = 2.0**-60  # below, solvers that work to 1e-7 of 1 and float32 itself run out: test_huge_and_tiny_losses
SIZED = st.floats(SMALLEST, 50, width=32)
LOSSES = SIZES.flatmap(lambda n: arrays(np.float32, n, elements=SIZED | st.sampled_from([0, 2])))
SIGNED = SIZES.flatmap(lambda n: arrays(np.float32, n, elements=SIZED | st.floats(-50, -SMALLEST, width=32)))
SEEDS = st.integers(0, 2**32 - 1)
MANY = settings(deadline=None, max_examples=800)
SOME = settings(deadline=None, max_examples=250)


def shares_of(losses: npt.NDArray[np.float32], seed: int) -> npt.NDArray[np.float32]:
    """Draw weights for losses: any, equal, many of them 0; never all."""
    random = np.random.default_rng(seed)
    weights = random.choice([0, 1, random.random()], len(losses)) * random.random(len(losses)).round(seed % 4)
    weights[random.integers(len(losses))] = 0.5
    return weights.astype(np.float32)


def form(t: float, losses: Array, alpha: float, shares: Array) -> float:
    return t + float((np.maximum(losses - t, 0) * shares).sum() / shares.sum()) / alpha


def lowest_form(losses: Array, alpha: float, shares: Array) -> float:
    """Search the lowest t + mean(relu(losses - t)) / alpha: a scalar solver, on losses scaled to at most 1."""
    scale = max(float(np.abs(losses).max()), SMALLEST)
    scaled = losses / scale
    found = minimize_scalar(
        lambda t: form(t, scaled, alpha, shares),
        bounds=(float(scaled.min()) - 1e-3, float(scaled.max()) + 1e-3),
        method="bounded",
        options={"xatol": 1e-11, "maxiter": 1000},
    )
    return float(found.fun) * scale


def dual(losses: Array, alpha: float, shares: Array) -> tuple[float, Array]:
    """Solve max of q @ losses, 0 <= q <= shares / alpha, sum(q) = 1, as a linear programme."""
    scale = max(float(np.abs(losses).max()), SMALLEST)
    limits = np.stack([np.zeros_like(losses), shares / shares.sum() / alpha], axis=1)
    found = linprog(-losses / scale, A_eq=np.ones((1, len(losses))), b_eq=[1.0], bounds=limits)
    assert found.success, found.message
    return -found.fun * scale, found.x


def assert_near(value: torch.Tensor, expected: float, losses: npt.NDArray[np.float32]) -> None:
    """Equal to 1e-6 of the value, or of the largest loss where signs may cancel."""
    largest = max(float(np.abs(losses).max()), SMALLEST)
    relative_to = abs(expected) if (losses >= 0).all() else largest
    assert float(value) == pytest.approx(expected, rel=0, abs=1e-6 * relative_to + 1e-9 * largest)


def exact(losses: list[float], alpha: float) -> float:
    """The mean of the worst alpha * n losses, the last by its fraction, in exact arithmetic."""
    left = tail = Fraction(alpha) * len(losses)
    total = Fraction(0)
    for loss in sorted(losses, reverse=True):
        weight = min(Fraction(1), left)
        total += weight * Fraction(loss)
        left -= weight
    return float(total / tail)


# the value


@MANY
@given(LOSSES | SIGNED, ALPHAS)
def test_cvar_is_the_lowest_form_over_all_thresholds(losses: npt.NDArray[np.float32], alpha: float) -> None:
    expected = lowest_form(losses.astype(float), alpha, np.ones(len(losses)))
    assert_near(cvar(torch.from_numpy(losses), alpha), expected, losses)


@MANY
@given(LOSSES | SIGNED, ALPHAS, SEEDS)
def test_weighted_cvar_is_the_lowest_weighted_form(losses: npt.NDArray[np.float32], alpha: float, seed: int) -> None:
    shares = shares_of(losses, seed)
    expected = lowest_form(losses.astype(float), alpha, shares.astype(float))
    assert_near(cvar(torch.from_numpy(losses), alpha, torch.from_numpy(shares)), expected, losses)


@SOME
@given(LOSSES | SIGNED, ALPHAS, SEEDS, st.booleans())
def test_cvar_is_the_highest_mean_of_the_dual(
    losses: npt.NDArray[np.float32], alpha: float, seed: int, weighted: bool
) -> None:
    shares = shares_of(losses, seed) if weighted else np.ones_like(losses)
    expected, _ = dual(losses.astype(float), alpha, shares.astype(float))
    assert_near(cvar(torch.from_numpy(losses), alpha, torch.from_numpy(shares) if weighted else None), expected, losses)


@SOME
@given(st.lists(st.floats(-50, 50) | FEW_VALUES, min_size=1, max_size=60), st.floats(1e-3, 1))
def test_cvar_equals_the_sorted_mean_in_exact_arithmetic(losses: list[float], alpha: float) -> None:
    value = float(cvar(torch.tensor(losses, dtype=torch.float64), alpha))
    assert value == pytest.approx(exact(losses, alpha), rel=1e-10, abs=1e-10)


@SOME
@given(LOSSES, ALPHAS)
def test_equal_weights_are_no_weights_and_a_weight_of_two_is_a_loss_twice(
    losses: npt.NDArray[np.float32], alpha: float
) -> None:
    tensor = torch.from_numpy(losses)
    torch.testing.assert_close(cvar(tensor, alpha, torch.full_like(tensor, 0.3)), cvar(tensor, alpha))
    weights = 1.0 + torch.arange(len(tensor)) % 2
    twice = tensor.repeat_interleave(weights.long())
    torch.testing.assert_close(cvar(tensor, alpha, weights), cvar(twice, alpha))


def test_weighted_cvar_of_float64_losses_is_that_of_float64() -> None:
    losses = torch.arange(10, dtype=torch.float64)
    assert float(cvar(losses, 0.37, torch.ones_like(losses))) == pytest.approx(exact(losses.tolist(), 0.37), rel=1e-12)


@SOME
@given(st.lists(st.integers(-9, 9), min_size=1, max_size=40), st.randoms(use_true_random=False), ALPHAS)
def test_cvar_forgets_order_and_shape_and_falls_with_alpha(losses: list[int], random, alpha: float) -> None:
    tensor, shuffled = torch.tensor(losses, dtype=torch.float64), list(losses)
    random.shuffle(shuffled)
    assert float(cvar(torch.tensor(shuffled, dtype=torch.float64), alpha)) == float(cvar(tensor, alpha))
    assert float(cvar(tensor.reshape(1, -1, 1), alpha)) == float(cvar(tensor, alpha))
    assert float(cvar(tensor, alpha / 2)) >= float(cvar(tensor, alpha)) - 1e-12
    assert float(tensor.mean()) - 1e-12 <= float(cvar(tensor, alpha)) <= float(tensor.max()) + 1e-12


def test_rows_of_a_matrix_count_as_single_losses_and_one_number_is_its_own_cvar() -> None:
    losses = torch.arange(24.0).reshape(2, 12)
    assert float(cvar(losses, 0.25)) == pytest.approx((23 + 22 + 21 + 20 + 19 + 18) / 6)
    assert float(cvar(losses.T, 0.25, torch.ones(12, 2))) == pytest.approx((23 + 22 + 21 + 20 + 19 + 18) / 6)
    assert float(cvar(torch.tensor(7.0), 0.5)) == 7
    assert float(cvar(torch.tensor(7.0), 0.5, torch.tensor(0.1))) == 7


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50))
def test_alpha_1_is_the_mean_to_the_bit(losses: list[float]) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        tensor = torch.tensor(losses, dtype=dtype)
        assert cvar(tensor, 1).equal(tensor.mean())


def test_a_tail_of_one_loss_or_less_is_the_largest_loss() -> None:
    losses = torch.tensor([1.0, 7.0, 3.0, 5.0])
    assert [float(cvar(losses, alpha)) for alpha in (1e-300, 1e-9, 0.1, 0.25)] == [7, 7, 7, 7]
    assert float(cvar(losses, 0.375)) == pytest.approx((7 + 0.5 * 5) / 1.5)
    assert float(cvar(losses, 0.25, torch.tensor([1.0, 0.0, 1.0, 1.0]))) == pytest.approx(5), "7 counts for nothing"


@pytest.mark.parametrize("scale", [1e38, 1e10, 1e-10, 1e-30])
def test_huge_and_tiny_losses(scale: float) -> None:
    losses = torch.tensor([1.0, 3.0, 2.0, 0.5, 0.0], dtype=torch.float64).mul(scale).float()
    expected = (3 + 2 + 0.5 * 1) / 2.5 * scale
    assert float(cvar(losses, 0.5)) == pytest.approx(expected, rel=1e-6)
    assert float(cvar(losses, 0.5, torch.full((5,), scale**0.5))) == pytest.approx(expected, rel=1e-6)


# the gradient


def gradient_of(function: Callable[[torch.Tensor], torch.Tensor], losses: torch.Tensor) -> torch.Tensor:
    leaf = losses.clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0]


@settings(deadline=None, max_examples=200)
@given(SIZES, SEEDS, ALPHAS, st.booleans())
def test_the_gradient_is_the_duals_weights(count: int, seed: int, alpha: float, weighted: bool) -> None:
    losses = np.random.default_rng(seed).permutation(count) + 1.0  # distinct: far from ties
    shares = shares_of(losses.astype(np.float32), seed).astype(float) if weighted else np.ones(count)
    gradient = gradient_of(
        lambda x: cvar(x, alpha, torch.from_numpy(shares) if weighted else None), torch.from_numpy(losses)
    )
    np.testing.assert_allclose(gradient, dual(losses, alpha, shares)[1], atol=1e-6)
    assert float(gradient.sum()) == pytest.approx(1, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), SEEDS, st.floats(0.01, 1), st.booleans())
def test_the_gradient_is_that_of_differences(count: int, seed: int, alpha: float, weighted: bool) -> None:
    losses = torch.from_numpy(np.random.default_rng(seed).permutation(count) + 1.0)
    shares = torch.from_numpy(shares_of(losses.float().numpy(), seed)) if weighted else None

    def value(x: torch.Tensor) -> torch.Tensor:
        return cvar(x, alpha, shares)

    step = 1e-4 * torch.eye(count, dtype=torch.float64)
    differences = torch.stack([(value(losses + one) - value(losses - one)) / 2e-4 for one in step])
    torch.testing.assert_close(gradient_of(value, losses), differences, rtol=1e-8, atol=1e-8)


@settings(deadline=None)
@given(st.lists(FEW_VALUES, min_size=1, max_size=30), ALPHAS, st.booleans())
def test_with_ties_the_gradient_is_still_a_set_of_weights(losses: list[float], alpha: float, weighted: bool) -> None:
    tensor = torch.tensor(losses, dtype=torch.float64)
    shares = torch.ones_like(tensor) if weighted else None
    gradient = gradient_of(lambda x: cvar(x, alpha, shares), tensor)
    assert float(gradient.sum()) == pytest.approx(1, abs=1e-12)
    assert (gradient >= 0).all()
    assert float(gradient.max()) <= 1 / max(1.0, alpha * len(losses)) + 1e-6
    assert float(gradient @ tensor) == pytest.approx(float(cvar(tensor, alpha, shares)), abs=1e-9)


# the rest of the function, and tails by rank


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("alpha", [0, -0.5, 1.0001, 2, math.nan, math.inf])
def test_alpha_out_of_range_and_no_losses_are_refused(alpha: float, weighted: bool) -> None:
    with pytest.raises(ValueError, match=r"alpha is .*; expected more than 0 and at most 1"):
        cvar(torch.ones(3), alpha, torch.ones(3) if weighted else None)
    with pytest.raises(ValueError, match="no losses; expected at least one"):
        cvar(torch.ones(0), 0.5, torch.ones(0) if weighted else None)


@pytest.mark.parametrize("weights", [[1.0, -1e-9, 1.0], [0.0, 0.0, 0.0], [1.0, math.nan, 1.0]])
def test_weights_that_are_no_shares_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights below 0, not a number, or all 0"):
        cvar(torch.ones(3), 0.5, torch.tensor(weights))


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1), ()])
def test_weights_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"weights have shape .*; expected that of the losses, \(3,\)"):
        cvar(torch.ones(3), 0.5, torch.ones(shape))


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1])
def test_a_loss_that_is_not_a_number_is_not_hidden(alpha: float) -> None:
    losses = torch.tensor([1.0, math.nan, 9.0, 2.0])
    assert cvar(losses, alpha).isnan()
    assert cvar(losses, alpha, torch.ones(4)).isnan()
    infinite = torch.tensor([1.0, math.inf, 9.0, 2.0])
    assert float(cvar(infinite, alpha)) == float(cvar(infinite, alpha, torch.ones(4))) == math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [0.3, 0.5, 1])
@pytest.mark.parametrize("weighted", [False, True])
def test_weights_of_half_precision_losses_are_not_rounded(dtype: torch.dtype, alpha: float, weighted: bool) -> None:
    losses = torch.from_numpy(np.random.default_rng(0).exponential(size=999)).to(dtype)
    weights = torch.ones(999) if weighted else None
    found, expected = cvar(losses, alpha, weights), cvar(losses.double(), alpha, weights)
    assert found.dtype == dtype
    assert float(found) == pytest.approx(float(expected), rel=torch.finfo(dtype).eps)


def test_a_product_off_by_rounding_is_a_whole_tail() -> None:
    assert 100 * 0.07 != 7, "the case is there: 7.000000000000001"
    assert [tail_size(100, 0.07), tail_size(32, 0.5), tail_size(33, 0.5), tail_size(4, 0.1)] == [7, 16, 16.5, 0.4]
    gradient = gradient_of(lambda x: cvar(x, 0.07), torch.arange(100.0))
    assert gradient.count_nonzero() == 7, "no eighth loss with a weight of 1e-15"


@given(st.integers(1, 5000), st.data())
def test_a_share_that_is_a_whole_number_of_losses_gives_it(count: int, data: st.DataObject) -> None:
    tail = data.draw(st.integers(1, count))
    assert tail_size(count, tail / count) == tail


@given(st.integers(1, 60), st.floats(0.01, 1))
def test_rank_weights_are_whole_ones_a_fraction_and_nothing(count: int, alpha: float) -> None:
    tail = max(1.0, tail_size(count, alpha))
    expected = [min(1.0, max(0.0, tail - rank)) / tail for rank in range(count)]
    for dtype in (torch.float32, torch.float64):
        weights = rank_weights(count, tail_size(count, alpha), torch.empty(0, dtype=dtype))
        torch.testing.assert_close(weights, torch.tensor(expected, dtype=dtype))


def test_stacked_rank_weights_are_each_heads_own() -> None:
    found = risk.stacked_rank_weights(4, [1.0, 0.375, 0.1], torch.empty(0, dtype=torch.float64))
    assert found.tolist() == [[0.25, 0.25, 0.25, 0.25], [2 / 3, 1 / 3, 0, 0], [1, 0, 0, 0]]


# tails of heads side by side, within groups, and over batches


@SOME
@given(st.integers(1, 4), st.integers(1, 40), SEEDS)
def test_heads_side_by_side_have_the_tails_of_each_alone(heads: int, count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    losses = torch.from_numpy(random.normal(size=(heads, count)).round(seed % 3))
    shares = torch.from_numpy(random.integers(0, 3, (heads, count)).astype(float))
    shares[:, 0] = 1
    alphas = random.uniform(0.02, 1, heads).astype(np.float32)
    tails = risk.weighted_tail(losses, torch.from_numpy(alphas), shares)
    for head in range(heads):
        expected = float(cvar(losses[head], float(alphas[head]), shares[head]))
        assert float((losses[head] * tails[head]).sum()) == pytest.approx(expected, abs=1e-9)
        assert float(tails[head].sum()) == pytest.approx(1)


@SOME
@given(st.integers(1, 3), st.integers(1, 60), st.integers(1, 8), SEEDS)
def test_tails_within_groups_are_the_mean_of_each_groups_cvar(heads: int, count: int, most: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    losses = torch.from_numpy(random.normal(size=(heads, count)).round(1 + seed % 3))
    groups = torch.from_numpy(random.integers(0, most, (heads, count)))
    alphas = torch.from_numpy(random.uniform(0.02, 1, heads))
    weights = tail_within(losses, alphas, groups, most)
    for head in range(heads):
        own = [losses[head][groups[head] == group].tolist() for group in range(most)]
        expected = np.mean([exact(one, max(float(alphas[head]), 1 / len(one))) for one in own if one])
        assert float((losses[head] * weights[head]).sum()) == pytest.approx(float(expected), abs=1e-9)
        assert float(weights[head].sum()) == pytest.approx(1)


@SOME
@given(st.integers(1, 30), st.lists(st.integers(1, 12), min_size=1, max_size=6), SEEDS)
def test_the_tracked_threshold_minimises_the_form_over_the_window(window: int, sizes: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    alphas = random.choice([0.1, 0.5, 1.0, random.uniform(0.02, 1)], 2)
    tracked = TailThreshold(2, window, torch.empty(0, dtype=torch.float64))
    seen: list[Array] = []  # (H, 2, n) losses and shares, the latest batch first
    for size in sizes:
        losses, shares = random.normal(size=(2, size)).round(1), random.integers(0, 4, (2, size)) + 0.25
        seen.insert(0, np.stack([losses, shares], axis=1))
        batch = (torch.from_numpy(losses), torch.from_numpy(alphas), torch.from_numpy(shares))
        tracked.update(*batch)
        found = tracked.cvar(*batch)
        for head in range(2):
            recent, weights = np.concatenate(seen, axis=2)[head, :, :window]
            lowest = min(form(t, recent, alphas[head], weights) for t in recent)
            threshold = float(tracked.value[head])
            assert form(threshold, recent, alphas[head], weights) == pytest.approx(lowest, abs=1e-9)
            assert float(found[head]) == pytest.approx(form(threshold, losses[head], alphas[head], shares[head]))


@SOME
@given(st.integers(1, 40), SEEDS, st.floats(0.03125, 1, width=32))
def test_a_window_of_one_batch_gives_that_batchs_cvar(count: int, seed: int, alpha: float) -> None:
    random = np.random.default_rng(seed)
    tracked = TailThreshold(1, count, torch.empty(0, dtype=torch.float64))
    for _ in range(3):  # nothing is left of the batches before
        losses, shares = (torch.from_numpy(x) for x in (random.normal(size=(1, count)), random.random((1, count))))
        level = torch.tensor([alpha], dtype=torch.float64)
        tracked.update(losses, level, shares)
        torch.testing.assert_close(tracked.cvar(losses, level, shares)[0], cvar(losses, alpha, shares))
        found = gradient_of(lambda x: tracked.cvar(x, level, shares).sum(), losses)  # noqa: B023
        torch.testing.assert_close(found, gradient_of(lambda x: cvar(x, alpha, shares), losses))  # noqa: B023

"""CVaR against brute force, against its dual, and its gradient; the losses per frame against their formulas."""

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from affcache.losses import binary_cross_entropy, cross_entropy
from affcache.risk import cvar, tail_size

ALPHAS = st.floats(1e-3, 1)
FEW_VALUES = st.sampled_from([-1.5, 0.0, 0.25, 2.0])  # ties
LOSSES = st.lists(st.floats(-50, 50) | FEW_VALUES, min_size=1, max_size=60)
MANY = settings(deadline=None, max_examples=300)


def brute_force(losses: list[float], alpha: float) -> float:
    """The mean of the worst alpha * n losses, the last by its fraction, in exact arithmetic."""
    left = tail = Fraction(alpha) * len(losses)
    total = Fraction(0)
    for loss in sorted(losses, reverse=True):
        weight = min(Fraction(1), left)
        total += weight * Fraction(loss)
        left -= weight
    return float(total / tail)


def dual(losses: npt.NDArray[np.float64], alpha: float) -> float:
    """min over t of t + mean(relu(losses - t)) / alpha: convex, piecewise linear, so lowest at one of the losses."""
    return min(float(t + np.maximum(losses - t, 0).mean() / alpha) for t in losses)


@MANY
@given(LOSSES, ALPHAS)
@example([1.0, 1.0, 1.0], 0.5)
@example([3.0], 0.01)
@example([1.0, 2.0, 3.0, 4.0], 0.25)
def test_cvar_equals_the_sorted_mean_and_the_dual(losses: list[float], alpha: float) -> None:
    value = float(cvar(torch.tensor(losses, dtype=torch.float64), alpha))
    assert value == pytest.approx(brute_force(losses, alpha), rel=1e-10, abs=1e-10)
    assert value == pytest.approx(dual(np.array(losses), alpha), rel=1e-10, abs=1e-10)


@MANY
@given(st.lists(st.integers(-9, 9), min_size=1, max_size=40), st.randoms(use_true_random=False), ALPHAS)
def test_cvar_forgets_order_and_shape_and_falls_with_alpha(losses: list[int], random, alpha: float) -> None:
    tensor = torch.tensor(losses, dtype=torch.float64)
    shuffled = list(losses)
    random.shuffle(shuffled)
    assert float(cvar(torch.tensor(shuffled, dtype=torch.float64), alpha)) == float(cvar(tensor, alpha))
    assert float(cvar(tensor.reshape(1, -1, 1), alpha)) == float(cvar(tensor, alpha))
    assert float(cvar(tensor, alpha / 2)) >= float(cvar(tensor, alpha)) - 1e-12
    assert float(tensor.mean()) - 1e-12 <= float(cvar(tensor, alpha)) <= float(tensor.max()) + 1e-12


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50))
def test_alpha_1_is_the_mean_to_the_bit(losses: list[float]) -> None:
    for dtype in (torch.float32, torch.float64):
        tensor = torch.tensor(losses, dtype=dtype)
        assert cvar(tensor, 1).equal(tensor.mean())
        assert cvar(tensor, 1.0).equal(tensor.mean())


def test_a_tail_of_one_loss_or_less_is_the_largest_loss() -> None:
    losses = torch.tensor([1.0, 7.0, 3.0, 5.0])
    assert [float(cvar(losses, alpha)) for alpha in (1e-9, 0.1, 0.25)] == [7, 7, 7]
    assert float(cvar(losses, 0.375)) == pytest.approx((7 + 0.5 * 5) / 1.5)


def expected_weights(losses: torch.Tensor, alpha: float) -> torch.Tensor:
    """1 / tail for each whole loss of the tail, the rest for the next, by falling loss."""
    tail = max(1.0, alpha * len(losses))
    weights = torch.zeros_like(losses)
    for rank, index in enumerate(losses.argsort(descending=True)):
        weights[index] = min(1.0, max(0.0, tail - rank)) / tail
    return weights


@settings(deadline=None, max_examples=100)
@given(st.permutations(range(12)), st.integers(1, 12), ALPHAS)
def test_the_gradient_is_the_tails_weights(order: list[int], count: int, alpha: float) -> None:
    losses = torch.tensor(order[:count], dtype=torch.float64, requires_grad=True)  # distinct: far from ties
    (gradient,) = torch.autograd.grad(cvar(losses, alpha), losses)
    torch.testing.assert_close(gradient, expected_weights(losses.detach(), alpha), rtol=1e-9, atol=1e-9)
    assert float(gradient.sum()) == pytest.approx(1, abs=1e-12)
    assert torch.autograd.gradcheck(lambda x: cvar(x, alpha), (losses,))


@settings(deadline=None)
@given(st.lists(FEW_VALUES, min_size=1, max_size=30), ALPHAS)
def test_with_ties_the_gradient_is_still_a_set_of_weights(losses: list[float], alpha: float) -> None:
    tensor = torch.tensor(losses, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(cvar(tensor, alpha), tensor)
    assert float(gradient.sum()) == pytest.approx(1, abs=1e-12)
    assert (gradient >= 0).all()
    assert float(gradient.max()) <= 1 / max(1.0, alpha * len(losses)) + 1e-9
    # what the weights pick is the value itself
    assert float(gradient @ tensor.detach()) == pytest.approx(float(cvar(tensor.detach(), alpha)), abs=1e-9)


def test_rows_of_a_matrix_count_as_single_losses() -> None:
    losses = torch.arange(24.0).reshape(2, 12)
    assert float(cvar(losses, 0.25)) == pytest.approx((23 + 22 + 21 + 20 + 19 + 18) / 6)


@pytest.mark.parametrize("alpha", [0, -0.5, 1.0001, math.nan, math.inf])
def test_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha is .*; expected more than 0 and at most 1"):
        cvar(torch.ones(3), alpha)


def test_no_losses_are_refused() -> None:
    with pytest.raises(ValueError, match="no losses; expected at least one"):
        cvar(torch.ones(0), 0.5)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1])
def test_a_loss_that_is_not_a_number_is_not_hidden(alpha: float) -> None:
    assert cvar(torch.tensor([1.0, math.nan, 9.0, 2.0]), alpha).isnan()


def test_a_product_off_by_rounding_is_a_whole_tail() -> None:
    assert 100 * 0.07 != 7, "the case is there: 7.000000000000001"
    assert tail_size(100, 0.07) == 7
    assert tail_size(3, 0.1) == pytest.approx(0.3)
    assert tail_size(32, 0.5) == 16
    assert tail_size(33, 0.5) == 16.5
    losses = torch.arange(100.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(cvar(losses, 0.07), losses)
    assert gradient.count_nonzero() == 7, "no eighth loss with a weight of 1e-15"


@given(st.integers(1, 5000), st.data())
def test_a_share_that_is_a_whole_number_of_losses_gives_it(count: int, data: st.DataObject) -> None:
    tail = data.draw(st.integers(1, count))
    assert tail_size(count, tail / count) == tail


def test_cross_entropies_equal_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 7, 3, 3, 1, 5])
    probabilities = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    torch.testing.assert_close(cross_entropy(logits, labels), -probabilities[range(6), labels].log())
    units = (torch.rand(6, 8, generator=generator) < 0.4).long()
    present = 1 / (1 + (-logits).exp())
    expected = -torch.where(units == 1, present, 1 - present).log()
    torch.testing.assert_close(binary_cross_entropy(logits, units), expected)
    assert torch.isfinite(binary_cross_entropy(torch.tensor([[-1e4, 1e4]]), torch.tensor([[1, 0]]))).all()

"""SAM against a quadratic worked by hand, and the promises on its state, schedulers and BatchNorm."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

from affcache.training.heads import MLPHead
from affcache.training.sam import SAM, frozen_batch_norm

Parts = tuple[nn.Module, SAM, torch.Tensor, torch.Tensor]


def make(seed: int = 0, rho: float = 0.05, dropout: float = 0.3) -> Parts:
    """A small head with BatchNorm and dropout, AdamW inside SAM, and frames to learn."""
    torch.manual_seed(seed)
    head = MLPHead(5, 3, hidden_layers=2, hidden_width=8, dropout=dropout)
    optimiser = SAM(AdamW(head.parameters(), lr=0.01, weight_decay=0.1), rho=rho)
    return head, optimiser, torch.randn(24, 5), torch.randint(3, (24,))


def train(parts: Parts, steps: int, seed: int = 7, after: Callable[[], None] = lambda: None) -> list[float]:
    """Make explicit SAM steps; return the losses of the first passes."""
    head, optimiser, embeddings, labels = parts
    torch.manual_seed(seed)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(head(embeddings), labels)
        loss.backward()
        with optimiser.perturbed(), frozen_batch_norm(head):
            nn.functional.cross_entropy(head(embeddings), labels).backward()
        optimiser.step()
        optimiser.zero_grad()
        after()
        losses.append(loss.item())
    return losses


def same_state(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(a.equal(b) for a, b in pairs)


def quadratic(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """f = x^2 / 2 + y^2, with gradient (x, 2y)."""
    return (x**2 / 2 + y**2).sum()


def test_a_quadratic_by_hand() -> None:
    # at (3, 2) the gradient is (3, 4), its norm 5 over both tensors together;
    # rho 0.5 moves to (3, 2) + 0.5 * (0.6, 0.8) = (3.3, 2.4), where the gradient is (3.3, 4.8);
    # plain descent with rate 0.1 from (3, 2) gives (3 - 0.33, 2 - 0.48) = (2.67, 1.52)
    x, y = (nn.Parameter(torch.tensor([value], dtype=torch.float64)) for value in (3, 2))
    optimiser = SAM(SGD([x, y], lr=0.1), rho=0.5)
    quadratic(x, y).backward()
    with optimiser.perturbed():
        assert (x.grad, y.grad) == (None, None)
        assert (x.item(), y.item()) == pytest.approx((3.3, 2.4), abs=1e-12)
        quadratic(x, y).backward()
    assert (x.item(), y.item()) == (3, 2)
    assert (x.grad.item(), y.grad.item()) == pytest.approx((3.3, 4.8), abs=1e-12)
    optimiser.step()
    assert (x.item(), y.item()) == pytest.approx((2.67, 1.52), abs=1e-12)


def test_two_parameter_groups_share_one_norm_and_keep_their_rates() -> None:
    # as above; the second group has rate 0.2: 2 - 0.2 * 4.8 = 1.04
    x, y = (nn.Parameter(torch.tensor([value], dtype=torch.float64)) for value in (3, 2))
    optimiser = SAM(SGD([{"params": [x]}, {"params": [y], "lr": 0.2}], lr=0.1), rho=0.5)
    quadratic(x, y).backward()
    with optimiser.perturbed():
        quadratic(x, y).backward()
    optimiser.step()
    assert (x.item(), y.item()) == pytest.approx((2.67, 1.04), abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20),
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=20, max_size=20),
    st.floats(0, 10),
)
def test_parameters_come_back_to_the_bit_and_moved_by_rho(values: list[float], slopes: list[float], rho: float) -> None:
    parameter = nn.Parameter(torch.tensor(values))
    before = parameter.detach().clone()
    gradient = torch.tensor(slopes[: len(values)])
    parameter.grad = gradient.clone()
    optimiser = SAM(SGD([parameter], lr=0.1), rho=rho)
    with optimiser.perturbed():
        moved = parameter.detach().double() - before.double()
        # rounding of the sum in float32 is relative to the parameter
        least = torch.finfo(torch.float32).tiny  # below it float32 has fewer digits
        assert float(moved.norm()) <= rho * (1 + 1e-5) + 1e-6 * float(before.double().norm()) + least
        if gradient.double().norm() > 1e-6:
            direction = gradient.double() / gradient.double().norm()
            assert float(moved @ direction) == pytest.approx(rho, rel=1e-4, abs=1e-6 * float(before.norm() + 1))
    assert parameter.equal(before)


def test_a_zero_gradient_moves_nothing() -> None:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.zeros(3)
    with SAM(SGD([parameter], lr=0.1), rho=0.5).perturbed():
        assert parameter.equal(torch.ones(3))


def test_parameters_without_a_gradient_stay() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimiser = SAM(AdamW([used, unused], lr=0.1), rho=0.5)
    used.sum().backward()
    with optimiser.perturbed():
        assert unused.equal(torch.ones(2))
        assert not used.equal(torch.ones(2))
        used.sum().backward()
    optimiser.step()
    assert unused.equal(torch.ones(2))
    assert not used.equal(torch.ones(2))
    with SAM(SGD([unused], lr=0.1)).perturbed():
        assert unused.equal(torch.ones(2)), "no gradient anywhere"


def test_an_error_inside_perturbed_restores_the_parameters() -> None:
    head, optimiser, embeddings, labels = make()
    before = copy.deepcopy(head)
    nn.functional.cross_entropy(head.eval()(embeddings), labels).backward()

    def second_pass() -> None:
        with optimiser.perturbed(), frozen_batch_norm(head):
            assert not same_state(head, before)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        second_pass()
    assert same_state(head, before)
    assert all(m.track_running_stats for m in head.modules() if isinstance(m, nn.BatchNorm1d))


@pytest.mark.parametrize("base", [lambda p: AdamW(p, lr=0.01), lambda p: SGD(p, lr=0.1, momentum=0.9)])
def test_rho_0_is_the_base_optimiser(base: Callable[..., Optimizer]) -> None:
    def trained(wrap: Callable[[Optimizer], Optimizer]) -> nn.Module:
        torch.manual_seed(0)
        head = MLPHead(5, 3, hidden_layers=1, hidden_width=8, dropout=0.2)
        optimiser = wrap(base(head.parameters()))
        embeddings, labels = torch.randn(16, 5), torch.randint(3, (16,))

        def closure() -> torch.Tensor:
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(head(embeddings), labels)
            loss.backward()
            return loss

        for _ in range(5):
            optimiser.step(closure)
        return head

    assert same_state(trained(lambda optimiser: SAM(optimiser, rho=0)), trained(lambda optimiser: optimiser))


def test_the_closure_form_equals_the_explicit_form() -> None:
    explicit, closed = make(dropout=0), make(dropout=0)
    losses = train(explicit, 4)
    head, optimiser, embeddings, labels = closed
    calls: list[float] = []

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        second_pass = len(calls) % 2 == 1
        with frozen_batch_norm(head if second_pass else nn.Identity()):
            loss = nn.functional.cross_entropy(head(embeddings), labels)
        loss.backward()
        calls.append(loss.item())
        return loss

    found = [optimiser.step(closure).item() for _ in range(4)]
    assert found == losses
    assert len(calls) == 8
    assert same_state(head, explicit[0])


def test_saved_in_the_middle_and_loaded_equals_an_uninterrupted_run() -> None:
    whole = make()
    train(whole, 3, seed=1)
    rest = train(whole, 3, seed=2)

    first = make()
    train(first, 3, seed=1)
    state = copy.deepcopy((first[0].state_dict(), first[1].state_dict()))
    second = make(seed=5, rho=9)  # another head, another radius: all of it is in the state
    second[0].load_state_dict(state[0])
    second[1].load_state_dict(state[1])
    assert train((second[0], second[1], *whole[2:]), 3, seed=2) == rest
    assert same_state(second[0], whole[0])
    assert second[1].rho == whole[1].rho
    assert second[1].param_groups is second[1].base.param_groups, "still one set of groups after loading"


@pytest.mark.parametrize("scheduled", [lambda sam: sam, lambda sam: sam.base], ids=["on SAM", "on its base"])
def test_a_scheduler_acts_on_it(scheduled: Callable[[SAM], Optimizer]) -> None:
    parts = make()
    scheduler = StepLR(scheduled(parts[1]), step_size=1, gamma=0.5)
    rates: list[float] = []
    train(parts, 3, after=lambda: (scheduler.step(), rates.append(parts[1].base.param_groups[0]["lr"])))
    assert rates == [0.005, 0.0025, 0.00125]
    assert parts[1].param_groups[0]["lr"] == rates[-1]


def test_a_schedule_down_to_zero_stops_the_parameters() -> None:
    parts = make()
    scheduler = CosineAnnealingLR(parts[1], T_max=1, eta_min=0)
    train(parts, 1, after=scheduler.step)
    before = copy.deepcopy(parts[0])
    train(parts, 1)
    assert all(a.equal(b) for a, b in zip(parts[0].parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("rho", [-0.1, float("nan")])
def test_a_radius_below_zero_is_refused(rho: float) -> None:
    with pytest.raises(ValueError, match=r"rho is .*; expected at least 0"):
        SAM(SGD([nn.Parameter(torch.ones(1))], lr=0.1), rho=rho)


# BatchNorm in the second pass


def test_frozen_statistics_stay_while_batches_normalise_themselves() -> None:
    layer = nn.BatchNorm1d(4)
    batch = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)) * 3 + 5
    expected = layer(batch)  # counts the batch once
    before = copy.deepcopy(layer.state_dict())
    with frozen_batch_norm(nn.Sequential(layer)):
        found = layer(batch)
        assert found.equal(expected)
        assert abs(float(found.detach().mean())) < 1e-5, "normalised by the batch, not by the running statistics"
    assert all(layer.state_dict()[name].equal(value) for name, value in before.items())
    assert int(layer.num_batches_tracked) == 1
    layer(batch)
    assert int(layer.num_batches_tracked) == 2, "and it counts again afterwards"


def test_a_step_counts_its_batch_once() -> None:
    parts = make()
    layers = [m for m in parts[0].modules() if isinstance(m, nn.BatchNorm1d)]
    train(parts, 5)
    assert [int(layer.num_batches_tracked) for layer in layers] == [5, 5]


def test_layers_that_never_track_are_left_alone() -> None:
    layer = nn.BatchNorm1d(4, track_running_stats=False)
    with frozen_batch_norm(layer):
        layer(torch.randn(3, 4))
    assert layer.track_running_stats is False


def test_parameters_with_a_class_are_what_an_optimiser_of_them_is() -> None:
    found = []
    for wrapped in (True, False):
        torch.manual_seed(0)
        head, options = nn.Linear(3, 2), {"lr": 0.01, "weight_decay": 0.1}
        if wrapped:
            optimiser = SAM(AdamW(head.parameters(), **options), rho=0.05, adaptive=True)
        else:
            optimiser = SAM(head.parameters(), AdamW, rho=0.05, adaptive=True, **options)
        inputs = torch.randn(8, 3)

        def closure(head: nn.Module = head, optimiser: SAM = optimiser, inputs: torch.Tensor = inputs) -> torch.Tensor:
            optimiser.zero_grad()
            loss = head(inputs).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            optimiser.step(closure)
        found.append(head.weight.detach())
    assert found[0].equal(found[1])


def test_a_group_that_is_added_is_perturbed_and_stepped_too() -> None:
    x, y, z = (nn.Parameter(torch.tensor([value])) for value in (3.0, 4.0, 0.0))
    optimiser = SAM(SGD([x], lr=0.1), rho=0.5)
    optimiser.add_param_group({"params": [y], "lr": 0.2})
    optimiser.add_param_group({"params": [z], "rho": 0.0})
    assert [group["rho"] for group in optimiser.param_groups] == [0.5, 0.5, 0.0]
    assert optimiser.param_groups is optimiser.base.param_groups
    (x.square() / 2 + y.square() / 2 + z).sum().backward()
    norm = (9 + 16 + 1) ** 0.5
    with optimiser.perturbed():
        assert [p.item() for p in (x, y, z)] == pytest.approx([3 + 0.5 * 3 / norm, 4 + 0.5 * 4 / norm, 0])
        (x.square() / 2 + y.square() / 2 + z).sum().backward()
    optimiser.step()
    assert [p.item() for p in (x, y, z)] == pytest.approx([3 - 0.1 * (3 + 1.5 / norm), 4 - 0.2 * (4 + 2 / norm), -0.1])


@pytest.mark.parametrize("wrong", [(0.5,), (AdamW,), (SGD, "lr")])
def test_what_is_no_optimiser_is_said(wrong: tuple[Any, ...]) -> None:
    base = SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(TypeError, match=r"expected SAM\(optimiser, rho=...\) or SAM\(parameters, class"):
        SAM(base, wrong[0], **dict.fromkeys(wrong[1:], 0.1))
    with pytest.raises(TypeError, match="expected SAM"):
        SAM([nn.Parameter(torch.ones(1))])

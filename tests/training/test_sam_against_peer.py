"""SAM and ASAM step for step against pytorch_optimizer's, heads side by side against heads apart; all in float64."""

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import pytorch_optimizer
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from affcache.training.heads import MLPHead
from affcache.training.sam import SAM, frozen_batch_norm
from affcache.training.stacked.parts import clip_stacked_gradients, write_stacked_worst_point

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 100
BASES: list[tuple[type[Optimizer], dict[str, Any]]] = [
    (AdamW, {"lr": 0.003, "weight_decay": 0.1}),
    (SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
]
Scheduled = Callable[[Optimizer], LRScheduler] | None


def head_and_frames(seed: int = 0) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    head = MLPHead(5, 3, hidden_layers=2, hidden_width=8, dropout=0).double()
    return head, torch.randn(STEPS, 16, 5, dtype=torch.float64), torch.randint(3, (STEPS, 16))


def train(make: Callable[..., Optimizer], limit: float | None = None, scheduled: Scheduled = None) -> list[nn.Module]:
    """Train a head, batch after batch; return it as it was after every fifth step."""
    head, embeddings, labels = head_and_frames()
    optimiser = make(head)
    scheduler = scheduled(optimiser) if scheduled else None
    states = []
    for step, (batch, classes) in enumerate(zip(embeddings, labels, strict=True), 1):

        def second_pass() -> None:
            with frozen_batch_norm(head):
                nn.functional.cross_entropy(head(batch), classes).backward()  # noqa: B023
            if limit:
                clip_grad_norm_(head.parameters(), limit)

        nn.functional.cross_entropy(head(batch), classes).backward()
        if isinstance(optimiser, SAM):
            with optimiser.perturbed():
                second_pass()
            optimiser.step()
        elif isinstance(optimiser, pytorch_optimizer.SAM):
            optimiser.step(second_pass)
        else:
            optimiser.step()
        optimiser.zero_grad()
        if scheduler:
            scheduler.step()
        if step % 5 == 0:
            states.append(copy.deepcopy(head))
    return states


def assert_same_path(found: list[nn.Module], expected: list[nn.Module], within: float) -> None:
    for one, other in zip(found, expected, strict=True):
        for value, reference in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
            torch.testing.assert_close(value, reference, rtol=0, atol=within)


def squared_norm(groups: list[dict[str, Any]], *_: Any, weight_adaptive: bool = False) -> torch.Tensor:
    """The peer's squared norm, in the dtype of the parameters."""
    parts = [
        (p.grad * p.abs() if group["adaptive"] and weight_adaptive else p.grad).square().sum()
        for group in groups
        for p in group["params"]
        if p.grad is not None
    ]
    return torch.stack(parts).sum().reshape(1)


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the peer compute its norms in float64: from version 4 on it rounds them to float32."""
    module = sys.modules[pytorch_optimizer.SAM.__module__]
    monkeypatch.setattr(module, "get_global_gradient_norm", squared_norm, raising=False)


# The peer's definitions are ours: rho * g / (|g| + 1e-12) with one norm over all groups, and for ASAM
# rho * w^2 g / (|w g| + 1e-12), biases and BatchNorm's parameters included and without ASAM's additive constant.


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize(
    ("limit", "scheduled"),
    [(None, None), (0.2, lambda optimiser: CosineAnnealingLR(optimiser, T_max=20, eta_min=1e-5))],
)
@pytest.mark.parametrize(("base", "options"), BASES)
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_hundred_steps_are_the_peers(
    adaptive: bool, base: type[Optimizer], options: dict[str, Any], limit: float | None, scheduled: Scheduled
) -> None:
    def ours(head: nn.Module) -> Optimizer:
        return SAM(base(head.parameters(), **options), rho=0.3, adaptive=adaptive)

    def peers(head: nn.Module) -> Optimizer:
        return pytorch_optimizer.SAM(head.parameters(), base, rho=0.3, adaptive=adaptive, **options)

    assert_same_path(train(ours, limit, scheduled), train(peers, limit, scheduled), within=1e-9)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_peer_as_it_is_differs_by_its_float32_norm_alone(adaptive: bool) -> None:
    def ours(head: nn.Module) -> Optimizer:
        return SAM(SGD(head.parameters(), lr=0.05), rho=0.05, adaptive=adaptive)

    def peers(head: nn.Module) -> Optimizer:
        return pytorch_optimizer.SAM(head.parameters(), SGD, rho=0.05, adaptive=adaptive, lr=0.05)

    assert_same_path(train(ours), train(peers), within=1e-7)


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("adaptive", [False, True])
def test_groups_keep_their_radius_and_rate_under_one_norm(adaptive: bool) -> None:
    def groups(head: nn.Module) -> list[dict[str, Any]]:
        parameters = list(head.parameters())
        return [{"params": parameters[:3], "rho": 0.5, "lr": 0.01}, {"params": parameters[3:]}]

    def ours(head: nn.Module) -> Optimizer:
        return SAM(SGD(groups(head), lr=0.1), rho=0.05, adaptive=adaptive)

    def peers(head: nn.Module) -> Optimizer:
        return pytorch_optimizer.SAM(groups(head), SGD, rho=0.05, adaptive=adaptive, lr=0.1)

    assert_same_path(train(ours), train(peers), within=1e-9)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(("base", "options"), BASES)
def test_rho_0_is_the_plain_optimiser_to_the_bit(
    base: type[Optimizer], options: dict[str, Any], adaptive: bool
) -> None:
    found = train(lambda head: SAM(base(head.parameters(), **options), rho=0, adaptive=adaptive))
    assert_same_path(found, train(lambda head: base(head.parameters(), **options)), within=0)


# heads side by side

HEADS, WIDTHS = 4, [(5, 7), (7, 3)]
SHAPES = [shape for width, outputs in WIDTHS for shape in ((width, outputs), (1, outputs))]
LENGTHS = [one * other for one, other in SHAPES]


def stacked_parameters() -> torch.Tensor:
    """Draw weights (D, C) and biases (1, C) of two layers in a row for each head, with gradients of unlike sizes."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([0.1, 0.5, 1.0, 3.0], dtype=torch.float64)[:, None]
    return sizes * torch.randn(HEADS, sum(LENGTHS), generator=generator, dtype=torch.float64)


def layers_of(rows: torch.Tensor) -> list[torch.Tensor]:
    """Return what lies in rows (H, P): weights (H, D, C) and biases (H, 1, C)."""
    return [part.unflatten(1, shape) for part, shape in zip(rows.split(LENGTHS, dim=1), SHAPES, strict=True)]


def loss_of(parameters: Sequence[torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    """The losses, summed up, of two-layer perceptrons on a batch (H, B, D) for each."""
    first, first_bias, second, second_bias = parameters
    outputs = torch.tanh(inputs @ first + first_bias) @ second + second_bias
    return (outputs - inputs[:, :, :3].sin()).square().mean((1, 2)).sum()


def stacked_step(rows: nn.Parameter, base: Optimizer, rhos: torch.Tensor, adaptive: bool, inputs: torch.Tensor) -> None:
    loss_of(layers_of(rows), inputs).backward()
    near = torch.empty_like(rows)
    write_stacked_worst_point(rows.detach(), rows.grad, rhos, near, adaptive=adaptive, pieces=LENGTHS)
    near.requires_grad_()
    loss_of(layers_of(near), inputs).backward()
    rows.grad = near.grad
    base.step()
    rows.grad = None


def step_alone(parameters: list[nn.Parameter], optimiser: SAM, inputs: torch.Tensor) -> None:
    loss_of(parameters, inputs).backward()
    with optimiser.perturbed():
        loss_of(parameters, inputs).backward()
    optimiser.step()
    optimiser.zero_grad()


def inputs_of(step: int) -> torch.Tensor:
    return torch.randn(HEADS, 12, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


@pytest.mark.parametrize(("base", "options"), BASES)
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("rhos", [[0.3] * HEADS, [0.0, 0.05, 0.3, 1.0]])
def test_heads_side_by_side_step_as_heads_apart(
    base: type[Optimizer], options: dict[str, Any], adaptive: bool, rhos: list[float]
) -> None:
    together = nn.Parameter(stacked_parameters())
    apart = [[nn.Parameter(p.clone()) for p in layers_of(together.detach()[[head]])] for head in range(HEADS)]
    stacked = base([together], **options)
    single = [SAM(base(p, **options), rho=rho, adaptive=adaptive) for p, rho in zip(apart, rhos, strict=True)]
    for step in range(STEPS):
        stacked_step(together, stacked, torch.tensor(rhos, dtype=torch.float64), adaptive, inputs_of(step))
        for head in range(HEADS):
            step_alone(apart[head], single[head], inputs_of(step)[[head]])
    for parameter, *alone in zip(layers_of(together.detach()), *apart, strict=True):
        torch.testing.assert_close(parameter, torch.cat(alone).detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("broken", [1e100, float("nan")])
def test_a_head_that_breaks_leaves_the_others_to_the_bit(adaptive: bool, broken: float) -> None:
    ends = []
    for factor in (1.0, broken):
        rows = nn.Parameter(stacked_parameters())
        base = AdamW([rows], lr=0.003)
        for step in range(3):
            inputs = inputs_of(step)
            inputs[2] *= factor
            stacked_step(rows, base, torch.full((HEADS,), 0.3, dtype=torch.float64), adaptive, inputs)
        ends.append(rows.detach())
    whole, other = ends
    assert whole[[0, 1, 3]].equal(other[[0, 1, 3]])
    assert all(not one.equal(two) for one, two in zip(layers_of(whole[[2]]), layers_of(other[[2]]), strict=True))


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100))
def test_stacked_gradients_are_clipped_as_torch_clips_each_head(seed: int, limit: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([0.0, 0.1, 1.0, 100.0], dtype=torch.float64)[:, None]
    gradients = sizes * torch.randn(HEADS, 30, generator=generator, dtype=torch.float64)
    clipped = gradients.clone()
    clip_stacked_gradients(clipped, limit)
    for head, norm in enumerate(gradients.norm(dim=1).tolist()):
        alone = nn.Parameter(torch.empty(30, dtype=torch.float64))
        alone.grad = gradients[head].clone()
        clip_grad_norm_([alone], limit)
        # torch adds 1e-6 to the norm before it divides
        torch.testing.assert_close(clipped[head], alone.grad, rtol=1e-6 / max(norm, limit) + 1e-12, atol=0)
        if norm < limit * (1 - 1e-9):
            assert clipped[head].equal(gradients[head])

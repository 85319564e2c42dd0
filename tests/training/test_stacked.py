"""Heads side by side against modules and autograd in float64; dropout by counts and finite differences; bfloat16."""

import copy
import math
from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.nn import functional

from affcache.training.heads import MLPHead
from affcache.training.sam import frozen_batch_norm
from affcache.training.stacked.heads import StackedHeads
from affcache.training.stacked.parts import HeadParameters, Point, write_stacked_worst_point

D, C, WIDTH = 5, 3, 7
SHAPES = [(heads, layers) for heads in (1, 3) for layers in (0, 1, 3)]


def make_heads(
    count: int, layers: int, *, inputs: int = D, width: int = WIDTH, dtype: torch.dtype = torch.float64
) -> list[MLPHead]:
    """Heads in which every part differs from its neutral value, the running statistics too."""
    torch.manual_seed(count + 10 * layers)
    heads = []
    for _ in range(count):
        head = MLPHead(inputs, C, hidden_layers=layers, hidden_width=width, dropout=0).to(dtype)
        for norm in (m for m in head.modules() if isinstance(m, nn.BatchNorm1d)):
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.5, 2)
            norm.num_batches_tracked.fill_(6)
        heads.append(head)
    return heads


def stack(heads: Sequence[MLPHead], dropout: float = 0.0, products: torch.dtype | None = None) -> StackedHeads:
    return StackedHeads(heads, dropout=[dropout] * len(heads), products=products)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def by_autograd(
    head: MLPHead, embeddings: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The module's training logits and the gradients of its parameters."""
    head.zero_grad()
    logits = head.train()(embeddings)
    logits.backward(gradient)
    return logits.detach(), {name: p.grad for name, p in head.named_parameters()}


def gradients_of(stacked: StackedHeads, index: int) -> dict[str, torch.Tensor]:
    """The gradients of one of the heads under the module's names."""
    named = HeadParameters.of(stacked.shape, stacked.gradients).named()
    return {name: gradient[index] for name, gradient in named.items()}


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def all_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_state(stacked: StackedHeads, heads: Sequence[MLPHead]) -> None:
    for index, head in enumerate(heads):
        state = stacked.state_dict(index)
        assert set(state) == set(head.state_dict())
        for name, expected in head.state_dict().items():
            torch.testing.assert_close(state[name], expected, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def apart(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance between tensors as a share of the expected one's norm."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def assert_step_as_by_autograd(stacked: StackedHeads, heads: Sequence[MLPHead], batch: int, seed: int) -> None:
    embeddings, gradient = draw(len(heads), batch, D, seed=seed), draw(len(heads), batch, C, seed=100 + seed)
    logits = stacked.forward(embeddings)
    stacked.backward(gradient)
    for index, head in enumerate(heads):
        expected, expected_gradient = by_autograd(head, embeddings[index], gradient[index])
        close(logits[index], expected)
        all_close(gradients_of(stacked, index), expected_gradient)


# Against autograd


@pytest.mark.parametrize(("count", "layers"), SHAPES)
@pytest.mark.parametrize(("width", "batch"), [(WIDTH, 6), (WIDTH, 2), (2, 3), (11, 33)])
def test_logits_gradients_and_statistics_are_those_of_the_modules(
    count: int, layers: int, width: int, batch: int
) -> None:
    heads = make_heads(count, layers, width=width)
    stacked = stack(heads)
    for step in range(3):  # the running statistics carry on
        assert_step_as_by_autograd(stacked, heads, batch, seed=step)
        assert_same_state(stacked, heads)
    assert stacked.batches == [9 if layers else 3] * count


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_batches_of_changing_size_follow_one_another(layers: int) -> None:
    heads = make_heads(2, layers)
    stacked = stack(heads)
    for step, batch in enumerate((9, 4, 2, 40, 9)):
        assert_step_as_by_autograd(stacked, heads, batch, seed=step)
    assert_same_state(stacked, heads)


def moved_along(head: MLPHead, rho: float) -> MLPHead:
    """A copy at SAM's worst point nearby, by the gradients that the module has."""
    norm = torch.cat([p.grad.flatten() for p in head.parameters()]).norm()
    moved = copy.deepcopy(head)
    with torch.no_grad():
        for parameter, original in zip(moved.parameters(), head.parameters(), strict=True):
            parameter.add_(original.grad, alpha=rho / float(norm))
    return moved


def written_out(stacked: StackedHeads, rho: torch.Tensor) -> Point:
    """SAM's worst point nearby, from gradients that are all written."""
    nearby = torch.empty_like(stacked.parameters)
    write_stacked_worst_point(stacked.parameters, stacked.gradients, rho, nearby, pieces=stacked.shape.lengths)
    return stacked.point(nearby)


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize(("width", "batch"), [(WIDTH, 6), (WIDTH, 2), (11, 33)])
def test_a_second_pass_at_the_worst_point_is_that_of_moved_modules(
    factored: bool, layers: int, width: int, batch: int
) -> None:
    heads, rho = make_heads(3, layers, width=width), torch.tensor([0.3, 0.0, 1.0], dtype=torch.float64)
    stacked = stack(heads)
    for step in range(2):
        embeddings, gradient = draw(3, batch, D, seed=step), draw(3, batch, C, seed=10 + step)
        stacked.forward(embeddings)
        stacked.backward(gradient, factored=factored)
        before, second_gradient = stacked.parameters.clone(), draw(3, batch, C, seed=20 + step)
        point = stacked.worst_point(rho) if factored else written_out(stacked, rho)
        logits = stacked.forward(embeddings, count_batch=False, at=point)
        stacked.backward(second_gradient)
        for index, head in enumerate(heads):
            by_autograd(head, embeddings[index], gradient[index])
            moved = moved_along(head, float(rho[index]))
            with frozen_batch_norm(moved):
                expected, expected_gradient = by_autograd(moved, embeddings[index], second_gradient[index])
            close(logits[index], expected)
            all_close(gradients_of(stacked, index), expected_gradient)
        assert stacked.parameters.equal(before), "they stay where they are"
        assert_same_state(stacked, heads)
    assert stacked.batches == [8 if layers else 2] * 3, "second passes aren't counted"


def test_one_radius_is_every_heads() -> None:
    stacked, embeddings = stack(make_heads(2, 2)), draw(2, 8, D)
    stacked.forward(embeddings)
    stacked.backward(draw(2, 8, C, seed=1), factored=True)
    rest = [stacked.worst_point(rho).parameters.rest.clone() for rho in (0.5, torch.tensor([0.5, 0.5]))]
    close(rest[0], rest[1])
    assert not rest[0].allclose(stacked.point(stacked.parameters).parameters.rest)


def test_the_worst_point_under_dropout_is_that_of_the_thinned_heads_gradient() -> None:
    stacked, embeddings, gradient = stack(make_heads(2, 2), dropout=0.5), draw(2, 9, D), draw(2, 9, C, seed=1)
    logits = []
    for factored in (True, False):
        stacked.forward(embeddings, generators(1, 2), count_batch=False)
        stacked.backward(gradient, factored=factored)
        rho = torch.tensor([0.3, 0.6], dtype=torch.float64)
        point = stacked.worst_point(rho) if factored else written_out(stacked, rho)
        logits.append(stacked.forward(embeddings, generators(3, 4), count_batch=False, at=point))
    close(logits[0], logits[1])


def test_a_gradient_of_zero_moves_nothing() -> None:
    stacked, embeddings = stack(make_heads(2, 2)), draw(2, 8, D)
    logits = stacked.forward(embeddings)
    stacked.backward(torch.zeros(2, 8, C, dtype=torch.float64), factored=True)
    assert stacked.forward(embeddings, at=stacked.worst_point(0.5)).equal(logits)


def test_embeddings_far_from_zero_cost_the_worst_point_no_precision() -> None:
    # the gradient's factors are then large numbers whose products all but cancel
    exact, logits = make_heads(2, 2, inputs=64, width=48), []
    for dtype in (torch.float64, torch.float32):
        stacked = stack([copy.deepcopy(head).to(dtype) for head in exact])
        embeddings = (draw(2, 32, 64) + 100).to(dtype)
        stacked.forward(embeddings)
        stacked.backward(draw(2, 32, C, seed=1).to(dtype), factored=True)
        point = stacked.worst_point(0.5)
        logits.append(stacked.forward(embeddings, at=point).double())
        assert float(point.changes[0].right.mean(2).abs().max()) < 1e-4
    assert apart(logits[1], logits[0]) < 1e-4, "measured: 2e-5; 8e-4 without taking the mean off"


def test_a_bias_before_batch_norm_has_no_gradient() -> None:
    (head,) = make_heads(1, 2)
    stacked = stack([head])
    embeddings, gradient = draw(1, 16, D), draw(1, 16, C, seed=1)
    stacked.forward(embeddings)
    stacked.backward(gradient)
    by_autograd(head, embeddings[0], gradient[0])
    for name, parameter in head.named_parameters():
        part = gradients_of(stacked, 0)[name]
        if name in ("layers.0.bias", "layers.4.bias"):
            assert not part.any()
            assert float(parameter.grad.abs().max()) < 1e-14
        else:
            assert float(part.abs().min()) > 1e-6, "every other parameter has one"


def test_embeddings_far_from_zero_cost_no_more_precision_than_in_the_modules() -> None:
    # as those of CLIP are: what all faces share is larger than what tells them apart
    exact = make_heads(3, 3, inputs=64, width=48)
    single = [copy.deepcopy(head).float() for head in exact]
    stacked = stack(single)
    embeddings = (draw(3, 32, 64) + 20).float()
    gradient = draw(3, 32, C, seed=1, dtype=torch.float32)
    logits = stacked.forward(embeddings)
    stacked.backward(gradient)
    for index, (head, double) in enumerate(zip(single, exact, strict=True)):
        truth, true_gradient = by_autograd(double, embeddings[index].double(), gradient[index].double())
        by_modules, gradient_by_modules = by_autograd(head, embeddings[index], gradient[index])
        assert apart(logits[index], truth) < 3 * apart(by_modules, truth)
        truth, found = flat(true_gradient), flat(gradients_of(stacked, index))
        assert apart(found, truth) < 3 * apart(flat(gradient_by_modules), truth)


# Side by side


@pytest.mark.parametrize("dropout", [(0.0, 0.0, 0.0), (0.6, 0.0, 0.3)])
def test_a_head_among_others_trains_as_it_does_alone(dropout: tuple[float, ...]) -> None:
    heads = make_heads(3, 2)
    together = StackedHeads(heads, dropout=dropout)
    alone = [StackedHeads([head], dropout=[p]) for head, p in zip(heads, dropout, strict=True)]
    of_all, of_each = generators(5, 6, 7), generators(5, 6, 7)
    for step in range(3):
        embeddings, gradient = draw(3, 8, D, seed=step), draw(3, 8, C, seed=10 + step)
        logits = together.forward(embeddings, of_all)
        together.backward(gradient)
        together.parameters.sub_(together.gradients, alpha=0.1)
        for index, single in enumerate(alone):
            part = slice(index, index + 1)
            close(logits[part], single.forward(embeddings[part], of_each[part]))
            single.backward(gradient[part])
            close(together.gradients[part], single.gradients)
            single.parameters.sub_(single.gradients, alpha=0.1)
            for name, part in together.state_dict(index).items():
                close(part, single.state_dict(0)[name])


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("products", [None, torch.bfloat16])
def test_a_heads_state_goes_to_a_module_and_back(layers: int, products: torch.dtype | None) -> None:
    source = stack(make_heads(3, layers, dtype=torch.float32), products=products)
    source.forward(draw(3, 8, D, dtype=torch.float32))
    module = MLPHead(D, C, hidden_layers=layers, hidden_width=WIDTH)
    module.load_state_dict(source.state_dict(1))
    assert all(part.dtype == module.state_dict()[name].dtype for name, part in source.state_dict(1).items())
    target = stack([MLPHead(D, C, hidden_layers=layers, hidden_width=WIDTH) for _ in range(3)], products=products)
    others = [{name: part.clone() for name, part in target.state_dict(index).items()} for index in (0, 1)]
    target.load_state_dict(2, module.state_dict())
    for name, part in source.state_dict(1).items():
        assert target.state_dict(2)[name].equal(part), name
        assert all(target.state_dict(index)[name].equal(others[index][name]) for index in (0, 1)), name
    assert target.batches == ([0, 0, 7] if layers else [0, 0, 0])
    embeddings = draw(8, D, seed=1, dtype=torch.float32)
    taken = MLPHead(D, C, hidden_layers=layers, hidden_width=WIDTH)
    taken.load_state_dict(target.state_dict(2))
    assert taken.eval()(embeddings).equal(module.eval()(embeddings))
    batch = embeddings.expand(3, -1, -1)
    torch.testing.assert_close(target.forward(batch)[2], source.forward(batch)[1])


# Dropout


def bare(count: int, width: int, dropout: Sequence[float], layers: int = 1) -> StackedHeads:
    """Heads that show what is dropped: units are 1 before dropout, and the logits are the last layer's units."""
    heads = [MLPHead(D, width, hidden_layers=layers, hidden_width=width).double() for _ in range(count)]
    for head in heads:
        for norm in (m for m in head.modules() if isinstance(m, nn.BatchNorm1d)):
            nn.init.zeros_(norm.weight)
            nn.init.ones_(norm.bias)
        for linear in (m for m in head.modules() if isinstance(m, nn.Linear)):
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)
    return StackedHeads(heads, dropout=dropout)


def test_units_drop_with_their_heads_probability_and_the_others_make_up_for_it() -> None:
    probabilities = (0.0, 0.6, 0.1, 0.9)
    units = bare(4, 64, probabilities).forward(draw(4, 500, D), generators(1, 2, 3, 4))  # (H, B, W)
    for head, p in enumerate(probabilities):
        dropped = units[head] == 0
        six_sigma = 6 * math.sqrt(p * (1 - p) / dropped.numel())
        assert abs(float(dropped.double().mean()) - p) <= six_sigma
        for axis in (0, 1):  # no unit and no frame is special
            counted = 500 if axis == 0 else 64
            assert float((dropped.double().mean(axis) - p).abs().max()) <= 6 * math.sqrt(p * (1 - p) / counted)
        assert float((units[head][~dropped] * (1 - p) - 1).abs().max()) < 2e-4
        assert abs(float(units[head].mean()) - 1) <= six_sigma / (1 - p) + 2e-4, "the expectation is kept"


def test_what_drops_is_independent_from_layer_to_layer_head_to_head_and_step_to_step() -> None:
    stacked = bare(2, 64, (0.5, 0.5), layers=2)
    # the second layer normalises the first one's units: 1 where they are, -1 where they are dropped; 100 is added
    normalise = {"layers.5.weight": torch.ones(64), "layers.5.bias": torch.full((64,), 100.0)}
    for head in range(2):
        stacked.load_state_dict(head, stacked.state_dict(head) | normalise)
    drops = generators(1, 2)
    steps = [stacked.forward(draw(2, 300, D), drops) for _ in range(2)]
    stay = [units != 0 for units in steps]  # (H, B, W) in the second layer
    stay_below = [units > 200 for units in steps]  # in the first, seen where they stay in the second
    pairs = [(stay_below[0], stay[0]), (stay[0][:1], stay[0][1:]), (stay[0], stay[1])]
    pairs += [(stay[0][:, 1:], stay[0][:, :-1]), (stay[0][..., 1:], stay[0][..., :-1])]  # frames, units
    for one, other in pairs:
        assert float(one[other].double().mean()) == pytest.approx(0.5, abs=0.03), "six times sqrt(0.25 / 9600)"


def test_the_generators_decide_what_drops() -> None:
    stacked = stack(make_heads(2, 2), dropout=0.5)
    embeddings = draw(2, 8, D)
    first = stacked.forward(embeddings, generators(1, 2))
    assert stacked.forward(embeddings, generators(1, 2)).equal(first)
    other = stacked.forward(embeddings, generators(1, 3))
    assert other[0].equal(first[0])
    assert not other[1].equal(first[1])
    drops = generators(1, 2)
    assert not stacked.forward(embeddings, drops).equal(stacked.forward(embeddings, drops)), "they move on"
    torch.manual_seed(4)
    by_torchs_own = stacked.forward(embeddings)
    torch.manual_seed(4)
    assert stacked.forward(embeddings).equal(by_torchs_own)


def test_a_head_without_dropout_beside_one_with_it_drops_nothing() -> None:
    heads = make_heads(2, 3)
    stacked = StackedHeads(heads, dropout=[0.0, 0.6])
    embeddings, gradient = draw(2, 12, D), draw(2, 12, C, seed=1)
    logits = stacked.forward(embeddings, generators(1, 2))
    stacked.backward(gradient)
    expected = [by_autograd(head, embeddings[i], gradient[i]) for i, head in enumerate(heads)]
    close(logits[0], expected[0][0])
    all_close(gradients_of(stacked, 0), expected[0][1])
    assert not logits[1].allclose(expected[1][0], rtol=0.1)


@pytest.mark.parametrize("layers", [1, 3])
def test_the_gradient_under_dropout_is_the_difference_quotient(layers: int) -> None:
    stacked = StackedHeads(make_heads(3, layers), dropout=[0.0, 0.6, 0.3])
    embeddings, gradient = draw(3, 10, D), draw(3, 10, C, seed=1)

    def losses() -> torch.Tensor:
        return (stacked.forward(embeddings, generators(1, 2, 3), count_batch=False) * gradient).sum((1, 2))

    losses()
    stacked.backward(gradient)
    step = 1e-6
    quotients = torch.empty_like(stacked.gradients)
    for column in range(stacked.parameters.shape[1]):  # in all heads at once: none depends on another
        kept = stacked.parameters[:, column].clone()
        stacked.parameters[:, column] = kept + step
        above = losses()
        stacked.parameters[:, column] = kept - step
        quotients[:, column] = (above - losses()) / (2 * step)
        stacked.parameters[:, column] = kept
    torch.testing.assert_close(stacked.gradients, quotients, rtol=1e-6, atol=1e-6)


# Products in bfloat16


def test_products_in_bfloat16_stay_near_those_in_float32() -> None:
    heads = make_heads(3, 3, inputs=64, width=96, dtype=torch.float32)
    full, low = stack(heads), stack(heads, products=torch.bfloat16)
    embeddings = draw(3, 48, 64, dtype=torch.float32)
    outcomes = []
    for stacked in (full, low):
        logits = stacked.forward(embeddings)
        stacked.backward(functional.softmax(logits, dim=-1) - 0.5)
        assert (stacked.parameters.dtype, stacked.gradients.dtype, logits.dtype) == (torch.float32,) * 3
        outcomes.append((logits, stacked.gradients))
    (logits, gradients), (low_logits, low_gradients) = outcomes
    assert 1e-3 < apart(low_logits, logits) < 0.02, "measured: 0.007; a bfloat16 has 8 bits"
    assert 1e-3 < apart(low_gradients, gradients) < 0.1, "measured: 0.044"
    for name, part in full.state_dict(0).items():
        assert apart(low.state_dict(0)[name], part) < 1e-3, name  # measured: at most 0.0003, in running statistics
    assert low.parameters.equal(full.parameters)
    low.load_state_dict(0, full.state_dict(0))
    for name, part in full.state_dict(0).items():
        assert low.state_dict(0)[name].equal(part), f"{name} is evaluated as it is, in float32"
    low.parameters.add_(low.gradients)  # as an optimiser does, in place
    moved = stack(heads, products=torch.bfloat16)
    for head in range(3):
        moved.load_state_dict(head, low.state_dict(head))
    assert low.forward(embeddings).equal(moved.forward(embeddings))
    assert not low.forward(embeddings).allclose(outcomes[1][0], rtol=0.1)

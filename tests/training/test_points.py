"""Outer products against the matrices they stand for, and points that hold changes of weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from affcache.training.heads import MLPHead
from affcache.training.stacked.parts import HeadParameters, HeadShape, OuterProducts, Point

SIZES = st.integers(1, 6)
SOME = settings(deadline=None, max_examples=50)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@SOME
@given(SIZES, SIZES, SIZES, SIZES, SIZES)
def test_outer_products_are_the_matrix_they_stand_for(heads: int, width: int, inputs: int, batch: int, n: int) -> None:
    products = OuterProducts(draw(heads, width, batch), draw(heads, inputs, batch, seed=1))
    matrix = torch.stack([one @ other.T for one, other in zip(products.left, products.right, strict=True)])
    hidden, gradient = draw(heads, inputs, n, seed=2), draw(heads, width, n, seed=3)
    torch.testing.assert_close(products.times(hidden), matrix @ hidden)
    torch.testing.assert_close(products.transposed_times(gradient), matrix.mT @ gradient)
    torch.testing.assert_close(products.squared_norm(), matrix.square().sum((1, 2)))


def test_each_head_is_scaled_by_its_own_factor() -> None:
    products = OuterProducts(draw(3, 4, 2), draw(3, 5, 2, seed=1))
    scale = torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64)
    scaled = products.scaled(scale)
    torch.testing.assert_close(
        scaled.left @ scaled.right.mT, scale[:, None, None] * (products.left @ products.right.mT)
    )


@pytest.mark.parametrize("known", [False, True])
def test_a_point_with_changes_multiplies_as_the_changed_weights(known: bool) -> None:
    shape = HeadShape(inputs=5, layers=2, width=4, outputs=3)
    parameters = HeadParameters.of(shape, draw(2, sum(shape.lengths)))
    changes = [OuterProducts(draw(2, 4, 6, seed=2), draw(2, size, 6, seed=3)) for size in (5, 4)]
    changed = [w + c.left @ c.right.mT for w, c in zip(parameters.weights, changes, strict=True)]
    batches, gradient = (draw(2, 5, 7, seed=4), draw(2, 4, 7, seed=5)), draw(2, 4, 7, seed=6)
    first = parameters.weights[0] @ batches[0] if known else None
    point = Point(parameters, parameters.weights, changes=changes, first_product=first)
    for layer in range(2):
        torch.testing.assert_close(point.product(layer, batches[layer]), changed[layer] @ batches[layer])
        torch.testing.assert_close(point.transposed_product(layer, gradient), changed[layer].mT @ gradient)
    if known:
        assert not point.product(0, draw(2, 5, 7, seed=9)).allclose(changed[0] @ draw(2, 5, 7, seed=9)), "it is for one"


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_parameters_cover_the_buffer_under_the_modules_names(layers: int) -> None:
    head = MLPHead(5, 3, hidden_layers=layers, hidden_width=4)
    shape = HeadShape.of(head)
    assert shape == HeadShape(5, layers, 4 if layers else 0, 3)
    flat = torch.zeros(2, sum(parameter.numel() for parameter in head.parameters()))
    assert sum(shape.lengths) == flat.shape[1]
    views = HeadParameters.of(shape, flat)
    named = views.named()
    assert {name: view.shape[1:] for name, view in named.items()} == {n: p.shape for n, p in head.named_parameters()}
    for view in named.values():
        view += 1
    assert bool((flat == 1).all()), "each value in one view"
    views.rest.zero_()
    assert int((flat == 1).sum()) == 2 * shape.hidden_weights == sum(weight.numel() for weight in views.weights)


def test_the_lengths_are_those_of_the_views_in_their_order() -> None:
    shape = HeadShape(inputs=5, layers=2, width=4, outputs=3)
    flat = torch.arange(float(sum(shape.lengths)))[None]
    starts = sorted((int(view.flatten()[0]), view.numel()) for view in HeadParameters.of(shape, flat).named().values())
    assert [length for _, length in starts] == shape.lengths


def test_rounded_weights_multiply_exact_changes() -> None:
    shape = HeadShape(inputs=5, layers=1, width=4, outputs=3)
    flat = draw(2, sum(shape.lengths), dtype=torch.float32)
    parameters, exact = HeadParameters.of(shape, flat), flat[:, : shape.hidden_weights]
    rounded = torch.empty_like(exact, dtype=torch.bfloat16)
    change = OuterProducts(1e-4 * draw(2, 4, 6, dtype=torch.float32), draw(2, 5, 6, seed=1, dtype=torch.float32))
    point = Point(parameters, shape.weights(rounded), rounding=(exact, rounded))
    point.round()
    hidden = torch.eye(5).expand(2, -1, -1)  # exact in bfloat16: products are the weights themselves
    torch.testing.assert_close(point.product(0, hidden), parameters.weights[0].bfloat16().float(), rtol=0, atol=0)
    moved = Point(parameters, point.weights, changes=[change]).product(0, hidden) - point.product(0, hidden)
    torch.testing.assert_close(moved, change.left @ change.right.mT, rtol=1e-3, atol=1e-6)
    flat.mul_(2)
    point.round()
    torch.testing.assert_close(point.product(0, hidden), parameters.weights[0].bfloat16().float(), rtol=0, atol=0)

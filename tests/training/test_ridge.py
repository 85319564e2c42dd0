"""The ridge head against scikit-learn's, against worked cases, and what must not change it."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from affcache.errors import InputError
from affcache.training.data import AS_STORED, Scaler
from affcache.training.ridge import STRENGTHS, RidgePath

Solution = tuple[torch.Tensor, torch.Tensor]


def made_up(frames: int = 200, width: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Correlated float32 embeddings of unlike scales, 3 targets that depend on them, and weights, a tenth of them 0."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator)
    embeddings = (torch.randn(frames, width, generator=generator) @ mix + 2) * torch.logspace(-2, 2, width)
    noise = torch.randn(frames, 3, generator=generator)
    targets = embeddings @ torch.randn(width, 3, generator=generator) / embeddings.std() + noise
    weights = torch.rand(frames, generator=generator) * 3
    weights[::10] = 0
    return embeddings, targets, weights


def by_sklearn(
    embeddings: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None, strength: float
) -> Solution:
    """Weight (C, D) and bias (C,) in float64, from scikit-learn's Ridge on features standardised by numpy."""
    x, y = embeddings.double().numpy(), targets.double().numpy()
    w = np.ones(len(x)) if weights is None else weights.double().numpy()
    mean = np.average(x, axis=0, weights=w)
    deviation = np.sqrt(np.average((x - mean) ** 2, axis=0, weights=w))
    deviation[deviation == 0] = 1
    ridge = Ridge(alpha=strength * w.sum(), solver="svd").fit((x - mean) / deviation, y, sample_weight=w)
    weight = ridge.coef_ / deviation
    return torch.from_numpy(weight), torch.from_numpy(ridge.intercept_ - weight @ mean)


def path_of(
    embeddings: Any,
    targets: torch.Tensor,
    weights: torch.Tensor | None = None,
    scaler: Scaler = AS_STORED,
    block: int = 16384,
) -> RidgePath:
    """The path of frames that lie in memory: a tensor, an array or a memory map (n, D)."""
    weights = torch.ones(len(embeddings)) if weights is None else weights
    embeddings = embeddings if isinstance(embeddings, torch.Tensor) else torch.from_numpy(np.array(embeddings))
    blocks = (embeddings[at : at + block] for at in range(0, len(targets), block))
    return RidgePath.from_blocks(blocks, embeddings.shape[1], targets, weights, scaler)


def assert_same(found: Solution, expected: Solution, tolerance: float = 1e-6) -> None:
    """Compare heads by relative distance, each output for itself."""
    weight, bias = (tensor.double() for tensor in found)
    expected_weight, expected_bias = (tensor.double() for tensor in expected)
    assert weight.shape == expected_weight.shape
    distance = (weight - expected_weight).norm(dim=1)  # (C,)
    assert (distance <= tolerance * expected_weight.norm(dim=1)).all()
    torch.testing.assert_close(bias, expected_bias, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("strength", [1e-4, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_scikit_learns_ridge_on_standardised_features(strength: float, weighted: bool) -> None:
    embeddings, targets, some = made_up()
    weights = some if weighted else None
    found = path_of(embeddings, targets, weights).solution(strength)
    assert [tensor.dtype for tensor in found] == [torch.float32, torch.float32]
    assert_same(found, by_sklearn(embeddings, targets, weights, strength))


def test_a_case_worked_by_hand() -> None:
    embeddings, targets = torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor([[1.0], [2.0], [6.0]])
    deviation = math.sqrt(8 / 3)  # x - mean is -2, 0, 2; y - mean is -2, -1, 3; k = 10 / (3 deviation)
    weight, bias = path_of(embeddings, targets).solution(0.5)
    assert float(weight) == pytest.approx(10 / 3 / deviation / 1.5 / deviation)
    assert float(bias) == pytest.approx(3 - 2 * float(weight))


@pytest.mark.parametrize("block", [1, 7, 199, 200, 1000])
def test_the_size_of_blocks_changes_nothing(block: int) -> None:
    embeddings, targets, weights = made_up()
    weights[:14] = 0  # whole blocks without weight
    whole = path_of(embeddings, targets, weights)
    assert_same(path_of(embeddings, targets, weights, block=block).solution(1e-4), whole.solution(1e-4))


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567])
def test_a_constant_feature_gets_no_weight(value: float) -> None:
    embeddings, targets, weights = made_up()
    without = path_of(embeddings, targets, weights).solution(1e-3)
    column = torch.full((len(embeddings), 1), value)
    weight, bias = path_of(torch.cat([embeddings, column], 1), targets, weights, block=33).solution(1e-3)
    assert weight[:, -1].tolist() == [0, 0, 0]
    assert_same((weight[:, :-1], bias), without)


def test_a_feature_that_varies_only_where_the_weight_is_0_counts_as_constant() -> None:
    embeddings, targets, weights = made_up()
    embeddings[:, 0] = 0.1
    embeddings[weights == 0, 0] = 5
    assert path_of(embeddings, targets, weights).solution(1.0)[0][:, 0].tolist() == [0, 0, 0]


def test_a_feature_that_barely_varies_still_counts() -> None:
    embeddings = torch.full((1000, 1), 1.0)
    embeddings[3] = 1 + torch.finfo(torch.float32).eps  # one step of float32 in one frame
    targets = (embeddings != 1).float()
    weight, bias = path_of(embeddings, targets).solution(1e-9)
    assert float(weight) == pytest.approx(1 / torch.finfo(torch.float32).eps)
    assert float(bias) == pytest.approx(-float(weight))


def test_frames_of_equal_embeddings_predict_the_mean_target() -> None:
    weight, bias = path_of(torch.full((4, 2), 0.3), torch.tensor([[1.0], [0], [0], [3]])).solution(0.01)
    assert weight.tolist() == [[0, 0]]
    assert bias.tolist() == [1]


@pytest.mark.parametrize("first", [0.0, -1e4])
def test_a_mean_far_from_zero_costs_no_accuracy(first: float) -> None:
    generator = torch.Generator().manual_seed(1)
    centred = torch.randn(3000, 5, generator=generator, dtype=torch.float64)
    targets = centred @ torch.randn(5, 2, generator=generator, dtype=torch.float64)
    embeddings = 1e3 + 1e-2 * centred
    embeddings[:64] += first  # a first block unlike the others
    path = path_of(embeddings, targets, block=64)
    assert_same(path.solution(1e-3), by_sklearn(embeddings, targets, None, 1e-3))


def test_the_mean_prediction_is_the_mean_target_though_weights_are_rounded() -> None:
    centred = torch.randn(500, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    embeddings = torch.tensor([1e3, 2e3]) + 1e-2 * centred
    targets = centred @ torch.tensor([[2.0], [-1.0]], dtype=torch.float64)  # weights 200, -100: the bias nearly 0
    weight, bias = (tensor.double() for tensor in path_of(embeddings, targets).solution(1e-4))
    residual = embeddings @ weight.T + bias - targets
    # rounding the bias is left; the weights', up to 8e-6 * 1e3 and 4e-6 * 2e3, must not show
    assert residual.mean().abs() <= torch.finfo(torch.float32).eps * bias.abs() + 1e-9


@pytest.mark.parametrize("strength", [1e-4, 1.0])
def test_more_features_than_frames(strength: float) -> None:
    embeddings, targets, _ = made_up(frames=9, width=40)
    path = path_of(embeddings, targets)
    assert_same(path.solution(strength), by_sklearn(embeddings, targets, None, strength))
    assert (path.eigenvalues >= 0).all()


def test_eigenvalues_are_1_on_average() -> None:
    embeddings, targets, weights = made_up()
    assert float(path_of(embeddings, targets, weights).eigenvalues.mean()) == pytest.approx(1)


def test_float16_is_read_as_the_numbers_it_holds_from_tensor_array_and_map(tmp_path: Path) -> None:
    embeddings, targets, weights = made_up()
    half = embeddings.half()
    expected = path_of(half.double(), targets, weights, block=64).solution(0.1)
    np.save(tmp_path / "embeddings.npy", half.numpy())
    mapped = np.load(tmp_path / "embeddings.npy", mmap_mode="r")
    for given_as in (half, half.numpy(), mapped):
        found = path_of(given_as, targets, weights, block=64).solution(0.1)
        assert found[0].equal(expected[0])
        assert found[1].equal(expected[1])


@pytest.mark.parametrize("normalize", ["none", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_are_left_as_they_were(normalize: str, dtype: torch.dtype) -> None:
    inputs = [tensor.to(dtype) for tensor in made_up()]
    before = [tensor.clone() for tensor in inputs]
    path_of(*inputs, scaler=Scaler(normalize))
    assert all(tensor.equal(copy) for tensor, copy in zip(inputs, before, strict=True))


def test_l2_is_the_head_of_embeddings_of_length_1() -> None:
    embeddings, targets, weights = made_up()
    embeddings[5] = 0
    scaled = torch.nn.functional.normalize(embeddings.double(), dim=1)
    found = path_of(embeddings, targets, weights, scaler=Scaler("l2")).solution(0.1)
    assert_same(found, by_sklearn(scaled, targets, weights, 0.1))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 4), min_size=30, max_size=30), st.integers(1, 40), st.floats(1e-3, 1e3), st.data())
def test_whole_weights_are_repeated_frames_in_any_order(
    counts: list[int], block: int, scale: float, data: st.DataObject
) -> None:
    counts[:2] = [1, 2]  # never fewer than two frames
    embeddings, targets, _ = made_up(frames=30, width=4)
    rows = [row for row, count in enumerate(counts) for _ in range(count)]
    shuffled = torch.tensor(data.draw(st.permutations(rows)))
    repeated = path_of(embeddings[shuffled], targets[shuffled], block=block)
    weighted = path_of(embeddings, targets, torch.tensor(counts) * scale, block=block)
    assert_same(repeated.solution(0.01), weighted.solution(0.01), tolerance=1e-5)  # scale * count rounds to float32


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(1e-3, 1e3), min_size=12, max_size=12), st.sampled_from(STRENGTHS))
def test_the_unit_of_a_feature_does_not_matter(units: list[float], strength: float) -> None:
    embeddings, targets, weights = (tensor.double() for tensor in made_up())
    unit = torch.tensor(units, dtype=torch.float64)
    weight, bias = path_of(embeddings, targets, weights).solution(strength)
    rescaled, same_bias = path_of(embeddings * unit, targets, weights).solution(strength)
    assert_same((rescaled * unit, same_bias), (weight, bias), tolerance=1e-5)


def test_strengths_rise_in_half_decades_and_weights_shrink() -> None:
    assert len(STRENGTHS) == 13
    assert STRENGTHS[0] == pytest.approx(1e-4)
    assert STRENGTHS[-1] == pytest.approx(1e2)
    embeddings, targets, _ = made_up()
    path = path_of(embeddings, targets)
    deviation = embeddings.std(dim=0, correction=0)
    sizes = [float((path.solution(strength)[0] * deviation).norm()) for strength in STRENGTHS]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.1 * sizes[0]


@pytest.mark.parametrize("weights", [[0.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
def test_fewer_than_two_frames_are_refused(weights: list[float]) -> None:
    embeddings, targets, _ = made_up(frames=3)
    with pytest.raises(InputError, match=r"at least 2 frames .* there are [01]\. Expected .* Check that"):
        path_of(embeddings, targets, torch.tensor(weights))
    for few in (0, 1):
        with pytest.raises(InputError, match=f"there are {few}"):
            path_of(embeddings[:few], targets[:few])


@pytest.mark.parametrize("strength", [0, -1, math.nan, math.inf])
def test_strength_out_of_range_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match="expected a finite number above 0"):
        path_of(torch.randn(4, 2), torch.ones(4, 1)).solution(strength)


def test_where_one_way_to_the_eigenvectors_fails_another_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(90, 12, generator=random), torch.randn(90, 3, generator=random)
    expected = path_of(*inputs).solution(0.1)

    def fail(matrix: torch.Tensor) -> None:
        raise torch.linalg.LinAlgError("The algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    assert_same(path_of(*inputs).solution(0.1), expected)

"""The losses per frame and the terms of whole batches, against torch, torchvision, numpy and plain loops."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from affcache.tasks.losses import (
    binary_cross_entropy,
    concordance,
    cross_entropy,
    pairwise_auc_loss,
    squared_error,
)
from affcache.tasks.tasks import TASKS
from affcache.training.objective import ClassCounts, Objective, PlainObjective
from affcache.training.settings import FitSettings

SEEDS = st.integers(0, 2**32 - 1)
SOME = settings(deadline=None, max_examples=100)
AUC_FORMS = [(0.6, 2), (0.0, 1), (1.0, 1), (1.5, 3)]


def frames(seed: int = 0, batch: int = 6, outputs: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw float64 logits (B, C), classes (B,) and units (B, C)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, outputs, generator=generator, dtype=torch.float64)
    units = (torch.rand(batch, outputs, generator=generator) < 0.4).long()
    return logits, torch.randint(outputs, (batch,), generator=generator), units


def test_cross_entropies_equal_their_formulas() -> None:
    logits, labels, units = frames()
    probabilities = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    torch.testing.assert_close(cross_entropy(logits, labels), -probabilities[range(6), labels].log())
    present = 1 / (1 + (-logits).exp())
    expected = -torch.where(units == 1, present, 1 - present).log()
    torch.testing.assert_close(binary_cross_entropy(logits, units), expected)
    assert torch.isfinite(binary_cross_entropy(torch.tensor([[-1e4, 1e4]]), torch.tensor([[1, 0]]))).all()


@SOME
@given(SEEDS, st.integers(1, 9), st.integers(2, 12), st.floats(0, 0.99))
def test_smoothed_cross_entropy_is_torchs(seed: int, batch: int, outputs: int, smoothing: float) -> None:
    logits, labels, units = frames(seed, batch, outputs)
    expected = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(cross_entropy(logits, labels, label_smoothing=smoothing), expected)
    targets = units.double() * (1 - smoothing) + smoothing / 2
    expected = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    torch.testing.assert_close(binary_cross_entropy(logits, units, label_smoothing=smoothing), expected)


@SOME
@given(SEEDS, st.integers(1, 9), st.integers(2, 12), st.sampled_from([0.0, 0.1, 0.9]), st.booleans())
def test_the_gradient_of_cross_entropy_is_softmax_less_targets(
    seed: int, batch: int, outputs: int, smoothing: float, adjusted: bool
) -> None:
    logits, labels, _ = frames(seed, batch, outputs)
    prior = logits.mean(0) if adjusted else torch.zeros(outputs, dtype=torch.float64)
    logits.requires_grad_()
    losses = cross_entropy(logits + prior, labels, label_smoothing=smoothing)
    (gradients,) = torch.autograd.grad(losses.sum(), logits)
    torch.testing.assert_close(gradients, softmax_less_targets(logits.detach() + prior, labels, smoothing))


def softmax_less_targets(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """The gradient of each loss with respect to its own logits (B, C), worked out."""
    outputs = logits.shape[-1]
    targets = (1 - smoothing) * functional.one_hot(labels, outputs).double() + smoothing / outputs
    return logits.softmax(-1) - targets


def test_the_gradient_of_cross_entropy_smooths_each_head_by_its_own() -> None:
    logits, labels, _ = frames(batch=10)
    logits, labels = logits.view(2, 5, 8).requires_grad_(), labels.view(2, 5)
    losses = cross_entropy(logits, labels, label_smoothing=torch.tensor([[0.0], [0.3]], dtype=torch.float64))
    (gradients,) = torch.autograd.grad(losses.sum(), logits)
    for head, one in enumerate((0.0, 0.3)):
        torch.testing.assert_close(losses[head], cross_entropy(logits[head], labels[head], label_smoothing=one))
        expected = softmax_less_targets(logits[head].detach(), labels[head], one)
        torch.testing.assert_close(gradients[head], expected)


@SOME
@given(SEEDS, st.floats(0, 5))
def test_the_focal_loss_of_units_is_torchvisions(seed: int, gamma: float) -> None:
    logits, _, units = frames(seed)
    expected = sigmoid_focal_loss(logits, units.double(), alpha=-1, gamma=gamma)
    torch.testing.assert_close(binary_cross_entropy(logits, units, focal_gamma=gamma), expected)


@SOME
@given(SEEDS, st.floats(0, 5), st.sampled_from([0.0, 0.1, 0.5]))
def test_the_focal_loss_of_classes_is_its_formula(seed: int, gamma: float, smoothing: float) -> None:
    logits, labels, _ = frames(seed)
    losses = cross_entropy(logits, labels, focal_gamma=gamma, label_smoothing=smoothing)
    for row, label, loss in zip(logits.tolist(), labels.tolist(), losses.tolist(), strict=True):
        shares = [math.exp(value) / sum(map(math.exp, row)) for value in row]
        smooth = -sum(
            (smoothing / len(row) + (1 - smoothing) * (index == label)) * math.log(p) for index, p in enumerate(shares)
        )
        assert loss == pytest.approx((1 - shares[label]) ** gamma * smooth, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_certain_frames_have_finite_focal_gradients(gamma: float) -> None:
    logits = torch.tensor([[300.0, -300.0], [-300.0, 300.0]], requires_grad=True)
    losses = [
        cross_entropy(logits, torch.tensor([0, 0]), focal_gamma=gamma).sum(),
        binary_cross_entropy(logits, torch.tensor([[1, 0], [1, 0]]), focal_gamma=gamma).sum(),
    ]
    assert [loss.item() for loss in losses] == pytest.approx([600, 600])
    for loss in losses:
        assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_certain_units_have_finite_focal_gradients_for_gamma_below_1() -> None:
    logits = torch.tensor([[100.0]], requires_grad=True)
    binary_cross_entropy(logits, torch.tensor([[1]]), focal_gamma=0.5).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("loss", [cross_entropy, binary_cross_entropy])
def test_options_of_heads_side_by_side_are_each_heads_own(loss) -> None:
    logits = torch.stack([frames(seed)[0] for seed in range(3)])  # (H, B, C)
    labels = torch.stack([frames(seed)[1 if loss is cross_entropy else 2] for seed in range(3)])
    smoothing, gamma = [0.0, 0.1, 0.3], [2.0, 0.0, 0.5]
    axes = labels.dim() - 1  # of a head's losses
    of_heads = [torch.tensor(knob, dtype=torch.float64).view(3, *[1] * axes) for knob in (smoothing, gamma)]
    together = loss(logits, labels, label_smoothing=of_heads[0], focal_gamma=of_heads[1])
    for head in range(3):
        options = {"label_smoothing": smoothing[head], "focal_gamma": gamma[head]}
        torch.testing.assert_close(together[head], loss(logits[head], labels[head], **options))


# what the objective makes of class counts


def test_balanced_classes_at_alpha_1_are_torchs_weighted_cross_entropy() -> None:
    logits, labels, _ = frames(batch=40)
    counts = torch.tensor([400, 30, 20, 10, 95, 80, 31, 7])
    expected = functional.cross_entropy(logits, labels, weight=1 / counts.double())
    assert_loss("expr", FitSettings(alpha=1, class_weights="balanced"), counts, logits, labels, expected)


@pytest.mark.parametrize("knobs", [{}, {"label_smoothing": 0.1}, {"focal_gamma": 2.0}])
def test_logit_adjustment_adds_the_log_prior_of_the_counts(knobs: dict[str, float]) -> None:
    recipe = FitSettings(alpha=1, logit_adjustment=0.7, **knobs)  # type: ignore[arg-type]
    logits, labels, _ = frames(batch=40)
    counts = torch.tensor([399, 29, 19, 9, 94, 79, 30, 6])
    prior = (counts + 1.0).double() / (counts + 1.0).sum()
    expected = cross_entropy(logits + 0.7 * prior.log(), labels, **knobs).mean()
    if not knobs:
        torch.testing.assert_close(expected, functional.cross_entropy(logits + 0.7 * prior.log(), labels))
    assert_loss("expr", recipe, counts, logits, labels, expected)
    assert not expected.allclose(cross_entropy(logits, labels, **knobs).mean())

    logits, _, units = frames(batch=40, outputs=12)
    present = torch.arange(12) * 10
    pairs = torch.stack([200 - present, present], dim=1).flatten()  # absent and present of each unit
    odds = (present + 1.0).double() / (201.0 - present)
    expected = binary_cross_entropy(logits + 0.7 * odds.log(), units, **knobs).mean()
    if not knobs:
        by_torch = functional.binary_cross_entropy_with_logits(logits + 0.7 * odds.log(), units.double())
        torch.testing.assert_close(expected, by_torch)
    assert_loss("au", replace(recipe, task="au"), pairs, logits, units, expected)
    assert not expected.allclose(binary_cross_entropy(logits, units, **knobs).mean())


def assert_loss(
    task: str, recipe: FitSettings, counts: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, loss: torch.Tensor
) -> None:
    """Assert what loss both objectives have."""
    plain = PlainObjective(TASKS[task], recipe, ClassCounts(counts), logits)
    torch.testing.assert_close(plain(logits, labels, torch.zeros(0)), loss)
    stacked = Objective(TASKS[task], [recipe], ClassCounts(counts), logits)
    torch.testing.assert_close(stacked(logits[None], labels[None], torch.zeros(0))[0], loss)


# the pairwise AUC term


def auc_by_loops(logits: torch.Tensor, units: torch.Tensor, margin: float, power: float) -> float:
    """The mean over columns of the mean over pairs of a present and an absent frame, 0 where there is none."""
    columns = []
    for scores, labels in zip(logits.T.tolist(), units.T.tolist(), strict=True):
        pairs = [
            max(0.0, margin - (present - absent)) ** power
            for (present, yes), (absent, no) in product(zip(scores, labels, strict=True), repeat=2)
            if yes == 1 and no == 0
        ]
        if pairs:
            columns.append(sum(pairs) / len(pairs))
    return sum(columns) / units.shape[1]


@SOME
@given(SEEDS, st.integers(1, 12), st.integers(1, 12), st.sampled_from(AUC_FORMS))
def test_the_auc_term_is_the_mean_over_pairs_and_columns(seed: int, batch: int, outputs: int, form) -> None:
    stacked = [frames(seed + head, batch, outputs) for head in range(2)]
    logits, units = (torch.stack([one[part] for one in stacked]) for part in (0, 2))
    logits = logits.round(decimals=1)  # also ties
    found = pairwise_auc_loss(logits, units, margin=form[0], power=form[1])
    expected = [auc_by_loops(*pair, *form) for pair in zip(logits, units, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_auc_term_has_the_published_defaults_and_is_0_with_a_gap_of_the_margin() -> None:
    logits, units = torch.tensor([[0.25], [0.0]]), torch.tensor([[1], [0]])
    assert float(pairwise_auc_loss(logits, units)) == pytest.approx((0.6 - 0.25) ** 2)
    assert float(pairwise_auc_loss(logits + torch.tensor([[0.36], [0.0]]), units)) == 0


def test_columns_with_one_kind_of_frame_count_0_in_the_auc_term() -> None:
    logits, _, units = frames(batch=7, outputs=4)
    units[:, 1], units[:, 2] = 0, 1
    both = [column for column in range(4) if 0 < int(units[:, column].sum()) < 7]
    assert both == [0, 3]
    logits.requires_grad_()
    value = pairwise_auc_loss(logits, units, margin=20)  # every pair is short of it
    torch.testing.assert_close(value, pairwise_auc_loss(logits[:, both], units[:, both], margin=20) * 2 / 4)
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.any(dim=0).tolist() == [True, False, False, True]


@pytest.mark.parametrize("present", [0, 1])
def test_a_batch_of_one_kind_has_no_auc_term_and_no_gradient(present: int) -> None:
    logits = frames()[0].requires_grad_()
    value = pairwise_auc_loss(logits, torch.full((6, 8), present))
    assert value.item() == 0
    assert torch.autograd.grad(value, logits)[0].equal(torch.zeros(6, 8, dtype=torch.float64))


# valence and arousal


@SOME
@given(SEEDS, st.integers(2, 50))
def test_concordance_is_lins_formula(seed: int, batch: int) -> None:
    random = np.random.default_rng(seed)
    outputs, labels = random.normal(size=(2, 3, batch, 2)) + random.normal(size=(2, 3, 1, 2))
    found = concordance(torch.from_numpy(outputs), torch.from_numpy(labels))
    for head, column in product(range(3), range(2)):
        x, y = outputs[head, :, column], labels[head, :, column]
        covariance = np.cov(x, y, bias=True)
        gap = x.mean() - y.mean()
        expected = 2 * np.corrcoef(x, y)[0, 1] * x.std() * y.std() / (covariance.trace() + gap**2)
        assert float(found[head, column]) == pytest.approx(float(expected), rel=1e-9)


def test_concordance_of_known_cases() -> None:
    labels = frames()[0] - frames()[0].mean(0)
    ones = torch.ones(8, dtype=torch.float64)
    torch.testing.assert_close(concordance(labels, labels), ones)
    torch.testing.assert_close(concordance(-labels, labels), -ones)
    assert (concordance(labels + 1, labels) < 1).all(), "unlike correlation it sees a shift"
    assert (concordance(labels * 2, labels) < 1).all(), "and a scale"
    torch.testing.assert_close(concordance(2 * labels, labels), 0.8 * ones)  # 2 * 2 / (4 + 1)


@pytest.mark.parametrize("frames", [7, 32, 1001])
@pytest.mark.parametrize("value", [0.1, 0.3, -0.7])
def test_equal_constants_have_no_concordance_though_their_means_are_rounded(frames: int, value: float) -> None:
    same = torch.full((frames, 2), value)
    assert concordance(same, same.clone()).tolist() == [0, 0]
    barely = same.clone()
    barely[0] += 0.001
    torch.testing.assert_close(concordance(barely, barely), torch.ones(2), rtol=1e-3, atol=0)


@pytest.mark.parametrize("label", [0.0, 0.5, -0.25])
def test_constants_have_no_concordance_and_a_finite_gradient(label: float) -> None:
    for outputs in (torch.full((8, 1), 0.5), torch.tensor([0.25, 0.75] * 4)[:, None]):
        outputs.requires_grad_()
        value = concordance(outputs, torch.full((8, 1), label))
        assert value.item() == 0
        assert torch.autograd.grad(value.sum(), outputs)[0].isfinite().all()


def test_squared_error_is_left_unaveraged() -> None:
    outputs, labels = torch.tensor([[0.5, -1.0]]), torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    assert squared_error(outputs, labels).equal(torch.tensor([[0.25, 4.0]]))

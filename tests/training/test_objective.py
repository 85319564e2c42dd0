"""The objective of H heads against plain loops over frames, gradients included; the tracked threshold; the counts."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from affcache.tasks.knobs import KNOBS_OF_LOSSES
from affcache.tasks.losses import LOSSES, cross_entropy
from affcache.tasks.task import Task
from affcache.tasks.tasks import TASKS
from affcache.training.objective import WINDOW, ClassCounts, Objective, PlainObjective
from affcache.training.risk import TailThreshold, cvar
from affcache.training.settings import FitSettings

H, BATCH, VIDEOS = 3, 16, 5
LIKE = torch.zeros(0, dtype=torch.float64)
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def recipes(task: str, **values: Any) -> list[FitSettings]:
    """One recipe a head: a tuple gives each head its own value."""
    heads = [{k: v[h] if isinstance(v, tuple) else v for k, v in values.items()} for h in range(H)]
    return [replace(FitSettings(task=task, batch_size=BATCH), **one) for one in heads]


def draw_labels(task: Task, *shape: int, generator: torch.Generator) -> torch.Tensor:
    """Labels as unevenly spread as real ones."""
    if task.name == "expr":
        return torch.multinomial(torch.arange(1.0, 9).expand(shape[0], 8) ** 2, shape[1], True, generator=generator)
    uniform = torch.rand(*shape, task.outputs, generator=generator, dtype=torch.float64)
    return (uniform < torch.linspace(0.1, 0.7, 12)).long() if task.name == "au" else 2 * uniform - 1


def draw(task: Task, seed: int = 0, batch: int = BATCH) -> Batch:
    """Logits (H, B, C), labels (H, B) or (H, B, C), and videos (H, B) of a batch for each head."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(H, batch, task.outputs, generator=generator, dtype=torch.float64)
    labels = draw_labels(task, H, batch, generator=generator)
    return logits, labels, torch.randint(VIDEOS, (H, batch), generator=generator)


# The objective in plain loops


def frame_losses(
    task: Task, recipe: FitSettings, counts: ClassCounts | None, logits: torch.Tensor, labels: torch.Tensor
) -> list[tuple[torch.Tensor, int, int]]:
    """Each loss of a batch (B, C) with its class and its frame."""
    losses = []
    prior = torch.zeros(24) if counts is None else counts.counts + 1.0
    smooth, gamma, strength = recipe.label_smoothing, recipe.focal_gamma, recipe.logit_adjustment
    for frame in range(len(logits)):
        if task.name == "expr":
            label = int(labels[frame])
            powers = [(logits[frame, k] + strength * (prior[k] / prior.sum()).log()).exp() for k in range(8)]
            shares = [power / sum(powers) for power in powers]
            loss = -sum((smooth / 8 + (1 - smooth) * (k == label)) * shares[k].log() for k in range(8))
            losses.append((loss * (1 - shares[label]) ** gamma, label, frame))
            continue
        for unit in range(task.outputs):
            if task.name == "va":
                losses.append(((logits[frame, unit] - labels[frame, unit]) ** 2, 0, frame))
                continue
            present = int(labels[frame, unit])
            odds = strength * (prior[2 * unit + 1] / prior[2 * unit]).log()
            share = 1 / (1 + (-logits[frame, unit] - odds).exp())
            target = (1 - smooth) * present + smooth / 2
            loss = -target * share.log() - (1 - target) * (1 - share).log()
            miss = 1 - share if present else share
            losses.append((loss * miss**gamma, 2 * unit + present, frame))
    return losses


def worst_share(losses: list[torch.Tensor], alpha: float, shares: list[float]) -> torch.Tensor:
    """The mean of the worst losses that hold alpha of all shares, or the largest one."""
    left = limit = alpha * sum(shares)
    total = torch.zeros((), dtype=torch.float64)
    for index in sorted(range(len(losses)), key=lambda index: -losses[index].item()):
        part = min(shares[index], left)
        total, left = total + part * losses[index], left - part
    return total / limit


def batch_term(
    task: Task, recipe: FitSettings, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    if task.name == "va":
        agreement = []
        for unit in range(2):
            x, y = logits[:, unit], labels[:, unit]
            (mean_x, mean_y), share = ((one * weights).sum() / weights.sum() for one in (x, y)), weights / weights.sum()
            covariance = (share * (x - mean_x) * (y - mean_y)).sum()
            variances = (share * ((x - mean_x) ** 2 + (y - mean_y) ** 2)).sum()
            agreement.append(2 * covariance / (variances + (mean_x - mean_y) ** 2))
        return 1 - sum(agreement) / 2
    of_units = []
    for unit in range(12):
        present, absent = (torch.nonzero((labels[:, unit] == state) & (weights > 0)).flatten() for state in (1, 0))
        pairs = [(one, other) for one in present for other in absent]
        short = [
            (recipe.auc_margin - logits[one, unit] + logits[other, unit]).clamp(min=0) ** 2 for one, other in pairs
        ]
        counts = [weights[one] * weights[other] for one, other in pairs]
        if pairs:
            of_units.append(sum(count * each for count, each in zip(counts, short, strict=True)) / sum(counts))
    return sum(of_units) / task.outputs


def by_loops(
    task: Task,
    recipe: FitSettings,
    counts: ClassCounts | None,
    logits: torch.Tensor,
    labels: torch.Tensor,
    videos: Any,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    weights = torch.ones(len(labels), dtype=torch.float64) if weights is None else weights
    losses = frame_losses(task, recipe, counts, logits, labels)
    groups: dict[int, list[tuple[torch.Tensor, float]]] = {}
    for loss, label, frame in losses:
        share = float(weights[frame])
        share /= int(counts.counts[label]) if recipe.class_weights == "balanced" and counts else 1
        group = {"batch": 0, "class": label, "video": int(videos[frame])}[recipe.cvar_within]
        groups.setdefault(group, []).append((loss, share))
    tails = []
    for members in groups.values():
        of_group, shares = [loss for loss, _ in members], [share for _, share in members]
        tails.append(worst_share(of_group, recipe.alpha, shares))
    risk = sum(tails) / len(tails)
    weight = {"expr": 0.0, "au": recipe.auc_weight, "va": recipe.ccc_weight}[task.name]
    return (1 - weight) * risk + (weight * batch_term(task, recipe, logits, labels, weights) if weight else 0)


ALPHAS = (0.3, 1.0, 0.04)
RECIPES: list[tuple[str, dict[str, Any]]] = [
    (task, values)
    for task in ("expr", "au")
    for values in (
        {"alpha": 0.5},
        {"alpha": ALPHAS},
        {"alpha": ALPHAS, "label_smoothing": (0.0, 0.1, 0.4), "focal_gamma": (2.0, 0.0, 0.5)},
        {"alpha": ALPHAS, "logit_adjustment": (1.0, 0.0, 0.5), "label_smoothing": (0.1, 0.0, 0.0)},
        {"alpha": ALPHAS, "class_weights": "balanced", "focal_gamma": 1.0},
        {"alpha": 1.0, "class_weights": "balanced"},
        {"alpha": ALPHAS, "cvar_within": "class"},
        {"alpha": ALPHAS, "cvar_within": "video", "label_smoothing": 0.2},
    )
] + [
    ("au", {"alpha": ALPHAS, "auc_weight": (0.2, 0.0, 0.7), "auc_margin": 0.9}),
    ("au", {"alpha": ALPHAS, "auc_weight": 0.3, "class_weights": "balanced", "cvar_within": "batch"}),
    ("va", {"alpha": ALPHAS, "ccc_weight": (0.0, 0.5, 0.9)}),
    ("va", {"alpha": ALPHAS, "ccc_weight": 0.0}),
    ("va", {"alpha": ALPHAS, "ccc_weight": 0.4, "cvar_within": "video"}),
]


@pytest.mark.parametrize(
    ("name", "values"), RECIPES, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_the_objective_and_its_gradient_are_those_of_plain_loops(name: str, values: dict[str, Any]) -> None:
    task, settings = TASKS[name], recipes(name, **values)
    counts = ClassCounts.of(task, draw(task, seed=9, batch=300)[1])
    objective = Objective(task, settings, counts, LIKE, VIDEOS)
    for seed, batch in ((1, BATCH), (2, 7)):  # the last batch is smaller
        logits, labels, videos = draw(task, seed, batch)
        logits.requires_grad_()
        loss = objective(logits, labels, videos)
        expected = torch.stack(
            [by_loops(task, settings[head], counts, logits[head], labels[head], videos[head]) for head in range(H)]
        )
        assert loss.shape == (H,)
        torch.testing.assert_close(loss, expected)
        gradient, expected_gradient = (torch.autograd.grad(one.sum(), logits)[0] for one in (loss, expected))
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-9)
        assert objective(logits, labels, videos, first_pass=False).equal(loss)
        direct = objective.with_gradient(logits.detach(), labels, videos)
        torch.testing.assert_close(direct, (loss.detach(), gradient))
        assert not any(tensor.requires_grad for tensor in direct)
        for head in range(H):
            plain = PlainObjective(task, settings[head], counts, LIKE)
            alone = logits[head].detach().requires_grad_()
            of_head = plain(alone, labels[head], videos[head])
            torch.testing.assert_close(of_head, expected[head])
            found = torch.autograd.grad(of_head, alone)[0]
            torch.testing.assert_close(found, expected_gradient[head], rtol=1e-6, atol=1e-9)
            assert plain(alone, labels[head], videos[head], first_pass=False).equal(of_head)


@pytest.mark.parametrize("name", ["expr", "au", "va"])
@pytest.mark.parametrize("values", [{"alpha": ALPHAS}, {"alpha": 1.0}, {"class_weights": "balanced"}])
@pytest.mark.parametrize("share", [0.0, (0.3, 0.0, 0.8)])
def test_frames_with_weights_are_those_of_plain_loops(name: str, values: dict[str, Any], share: Any) -> None:
    terms = {"ccc_weight": share, "auc_weight": share if name == "au" else 0.0}
    task, settings = TASKS[name], recipes(name, **values, **terms)
    counts = ClassCounts.of(task, draw(task, seed=9, batch=300)[1])
    logits, labels, videos = draw(task)
    weights = torch.rand(H, BATCH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights[:, 3] = 0  # exactly as if it weren't there
    logits.requires_grad_()
    loss = Objective(task, settings, counts, LIKE)(logits, labels, videos, weights)
    of_heads = zip(settings, logits, labels, videos, weights, strict=True)
    expected = torch.stack([by_loops(task, recipe, counts, *of_head) for recipe, *of_head in of_heads])
    torch.testing.assert_close(loss, expected)
    gradient, expected_gradient = (torch.autograd.grad(one.sum(), logits)[0] for one in (loss, expected))
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-9)
    assert not gradient[:, 3].any()
    for head in range(H):
        plain = PlainObjective(task, settings[head], counts, LIKE)
        of_head = plain(logits[head], labels[head], videos[head], weights[head])
        torch.testing.assert_close(of_head, expected[head])
        left = [i for i in range(BATCH) if i != 3]
        without = plain(logits[head, left], labels[head, left], videos[head, left], weights[head, left])
        torch.testing.assert_close(without, of_head)


@pytest.mark.parametrize(("name", "weights"), [("expr", "none"), ("au", "balanced"), ("va", "none")])
def test_with_one_batch_seen_the_tracked_tail_of_weighted_frames_is_the_batchs_own(name: str, weights: str) -> None:
    task, common = TASKS[name], {"alpha": ALPHAS, "class_weights": weights, "ccc_weight": 0.0}
    counts = ClassCounts.of(task, draw(task, seed=9, batch=300)[1])
    of_frames = torch.rand(H, BATCH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tracked, own = (
        Objective(task, recipes(name, cvar_level=level, **common), counts, LIKE).with_gradient(*draw(task), of_frames)
        for level in ("set", "batch")
    )
    torch.testing.assert_close(tracked, own)


@pytest.mark.parametrize("name", ["expr", "au", "va"])
def test_alpha_1_is_the_mean_to_the_bit(name: str) -> None:
    task = TASKS[name]
    logits, labels, videos = draw(task)
    objective = Objective(task, recipes(name, alpha=1.0, ccc_weight=0.0), None, LIKE)
    expected = task.losses(logits, labels).flatten(1).mean(1)
    assert objective(logits, labels, videos).equal(expected)
    assert objective.with_gradient(logits, labels, videos)[0].allclose(expected, rtol=1e-15)
    plain = PlainObjective(task, FitSettings(task=name, alpha=1.0, ccc_weight=0.0), None, LIKE)
    for head in range(H):
        assert plain(logits[head], labels[head], videos[head]).allclose(expected[head], rtol=1e-15)


def test_a_knob_of_0_is_passed_on_where_a_losses_default_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(logits: torch.Tensor, labels: torch.Tensor, *, label_smoothing: Any = 0.5) -> torch.Tensor:
        return cross_entropy(logits, labels) + label_smoothing

    monkeypatch.setitem(LOSSES, "classes", {"shifted": shifted})
    monkeypatch.setitem(KNOBS_OF_LOSSES, "classes", {"shifted": frozenset({"label_smoothing"})})
    task, (logits, labels, videos) = TASKS["expr"], draw(TASKS["expr"])
    for smoothing in (0.0, 0.25):
        settings = recipes("expr", alpha=1.0, label_smoothing=smoothing)
        expected = cross_entropy(logits, labels).mean(1) + smoothing
        torch.testing.assert_close(Objective(task, settings, None, LIKE)(logits, labels, videos), expected)
        plain = PlainObjective(task, settings[0], None, LIKE)
        torch.testing.assert_close(plain(logits[0], labels[0], videos[0]), expected[0])


def test_videos_are_needed_only_within_videos() -> None:
    logits, labels, videos = draw(TASKS["au"])
    plain = Objective(TASKS["au"], recipes("au"), None, LIKE)
    assert plain(logits, labels, None).equal(plain(logits, labels, videos))


# The tracked threshold


TRACKED = [("expr", "none"), ("expr", "balanced"), ("au", "none"), ("au", "balanced"), ("va", "none")]


def form(threshold: float, losses: np.ndarray, alpha: float, shares: np.ndarray) -> float:
    """What Rockafellar and Uryasev minimise: t + mean(relu(losses - t)) / alpha."""
    return float(threshold + np.average(np.maximum(losses - threshold, 0), weights=shares) / alpha)


@pytest.mark.parametrize(("name", "weights"), TRACKED)
def test_with_one_batch_seen_the_tracked_tail_is_the_batchs_own(name: str, weights: str) -> None:
    task, common = TASKS[name], {"alpha": ALPHAS, "class_weights": weights}
    counts = ClassCounts.of(task, draw(task, seed=9, batch=300)[1])
    logits, labels, videos = draw(task)
    logits.requires_grad_()
    outcomes = []
    for level in ("set", "batch"):
        objectives = [Objective(task, recipes(name, cvar_level=level, **common), counts, LIKE) for _ in range(2)]
        loss = objectives[0](logits, labels, videos)
        outcomes.append((loss, torch.autograd.grad(loss.sum(), logits)[0]))
        direct = objectives[1].with_gradient(logits.detach(), labels, videos)
        torch.testing.assert_close(direct, (loss.detach(), outcomes[-1][1]))
        assert level == "batch" or objectives[1].state()["value"].any(), "the threshold has seen the batch"
    torch.testing.assert_close(outcomes[0], outcomes[1])


@pytest.mark.parametrize(("name", "weights"), TRACKED)
def test_the_threshold_is_the_windows_minimiser_of_the_form(name: str, weights: str) -> None:
    task, batch = TASKS[name], 4
    settings = recipes(name, alpha=ALPHAS, cvar_level="set", class_weights=weights, ccc_weight=0.0)
    settings = [replace(one, batch_size=batch) for one in settings]
    counts = ClassCounts.of(task, draw(task, seed=9, batch=300)[1])
    objective = Objective(task, settings, counts, LIKE)
    window = WINDOW * batch * task.losses_per_frame
    seen, stand_for = (torch.zeros(H, 0, dtype=torch.float64) for _ in range(2))
    for step in range(WINDOW + 9):
        logits, labels, videos = draw(task, step, batch)
        loss = objective(logits, labels, videos)
        now = task.losses(logits, labels).flatten(1)
        shares = torch.ones_like(now)
        if counts is not None and weights == "balanced":
            shares = 1 / counts.counts[task.class_of(labels)].flatten(1).double()
        seen, stand_for = torch.cat([seen, now], 1)[:, -window:], torch.cat([stand_for, shares], 1)[:, -window:]
        assert objective.threshold is not None
        for head, alpha in enumerate(ALPHAS):
            tracked = float(objective.threshold.value[head])
            losses, of_window = seen[head].numpy(), stand_for[head].numpy()
            if weights == "none":
                assert tracked == -np.quantile(-losses, alpha, method="inverted_cdf")
            expected = form(tracked, now[head].numpy(), alpha, shares[head].numpy())
            assert float(loss[head]) == pytest.approx(expected, rel=1e-9)
            if step in (0, 5, WINDOW - 1, WINDOW, WINDOW + 8):
                lowest = min(form(t, losses, alpha, of_window) for t in losses)
                assert form(tracked, losses, alpha, of_window) == pytest.approx(lowest, rel=1e-12)


def test_a_threshold_over_one_batch_forgets_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    alpha, shares = torch.tensor(ALPHAS, dtype=torch.float64), torch.ones(H, 10, dtype=torch.float64)
    threshold = TailThreshold(H, 10, LIKE)
    for _ in range(4):
        losses = torch.randint(6, (H, 10), generator=generator).double()  # ties
        threshold.update(losses, alpha, shares)
        expected = torch.stack([cvar(losses[head], ALPHAS[head]) for head in range(H)])
        torch.testing.assert_close(threshold.cvar(losses, alpha, shares), expected)


def test_a_second_pass_uses_the_threshold_and_leaves_it() -> None:
    objective = Objective(TASKS["expr"], recipes("expr", cvar_level="set"), None, LIKE)
    for step in range(3):
        objective(*draw(TASKS["expr"], step))
    before = {name: part.clone() for name, part in objective.state().items()}
    logits, labels, videos = draw(TASKS["expr"], 7)
    loss = objective(logits, labels, videos, first_pass=False)
    assert all(part.equal(before[name]) for name, part in objective.state().items())
    for head in range(H):
        losses = TASKS["expr"].losses(logits[head], labels[head]).numpy()
        assert float(loss[head]) == pytest.approx(form(float(before["value"][head]), losses, 0.5, np.ones(BATCH)))
    assert not objective(logits, labels, videos).equal(loss), "a first pass takes the batch in"


@pytest.mark.parametrize(("name", "weights"), TRACKED)
def test_each_heads_threshold_is_that_of_the_head_alone(name: str, weights: str) -> None:
    task, settings = TASKS[name], recipes(name, alpha=ALPHAS, cvar_level="set", class_weights=weights)
    settings = [replace(one, batch_size=4) for one in settings]
    counts = ClassCounts.of(task, draw(task, seed=9, batch=300)[1])
    together = Objective(task, settings, counts, LIKE)
    alone = [PlainObjective(task, one, counts, LIKE) for one in settings]
    for step in range(WINDOW + 9):
        logits, labels, videos = draw(task, step, 4)
        logits.requires_grad_()
        for first_pass in (True, False):
            loss = together(logits, labels, videos, first_pass=first_pass)
            own = [one(logits[h], labels[h], videos[h], first_pass=first_pass) for h, one in enumerate(alone)]
            torch.testing.assert_close(torch.stack(own), loss)
            gradients = [torch.autograd.grad(one.sum(), logits)[0] for one in (torch.stack(own), loss)]
            torch.testing.assert_close(gradients[0], gradients[1])
    for part, tensor in together.state().items():
        torch.testing.assert_close(torch.cat([one.state()[part].reshape(-1) for one in alone]), tensor.reshape(-1))
    fresh = PlainObjective(task, settings[0], counts, LIKE)
    fresh.load_state({part: tensor.clone() for part, tensor in alone[0].state().items()})
    for step in range(3):
        of_head = [part[0] for part in draw(task, 90 + step, 4)]
        assert fresh(*of_head).equal(alone[0](*of_head))


@pytest.mark.parametrize(("name", "weights"), TRACKED)
def test_a_loaded_state_continues_to_the_bit(name: str, weights: str) -> None:
    task, settings = TASKS[name], recipes(name, alpha=ALPHAS, cvar_level="set", class_weights=weights)
    counts = ClassCounts.of(task, draw(task, seed=9, batch=300)[1])
    whole, resumed, fresh = (Objective(task, settings, counts, LIKE) for _ in range(3))
    for step in range(4):
        whole(*draw(task, step))
    resumed.load_state({name: part.clone() for name, part in whole.state().items()})
    # second passes come first: they see the threshold as it was kept, one of them the loss right at it
    for step, first_pass in (*((step, False) for step in range(5)), (5, True), (6, True), (7, False)):
        logits, labels, videos = draw(task, step)
        logits.requires_grad_()
        losses = [one(logits, labels, videos, first_pass=first_pass) for one in (whole, resumed, fresh)]
        gradients = [torch.autograd.grad(loss.sum(), logits)[0] for loss in losses]
        assert losses[1].equal(losses[0])
        assert gradients[1].equal(gradients[0])
        assert not losses[2].equal(losses[0])
    assert all(part.equal(resumed.state()[name]) for name, part in whole.state().items())


def test_without_a_tracked_threshold_there_is_no_state() -> None:
    objective = Objective(TASKS["expr"], recipes("expr"), None, LIKE)
    assert objective.state() == {}
    objective.load_state({})


# Counts


def test_classes_are_counted() -> None:
    labels = torch.tensor([3, 3, 0, 5, 3])
    counts = ClassCounts.of(TASKS["expr"], labels)
    assert counts is not None
    assert counts.counts.tolist() == [1, 0, 0, 3, 0, 1, 0, 0]
    units = torch.zeros(4, 12, dtype=torch.int64)
    units[:3, 1] = units[:, 11] = 1
    counts = ClassCounts.of(TASKS["au"], units)
    assert counts is not None
    assert counts.counts.view(12, 2).tolist() == [[4, 0], [1, 3], *[[4, 0]] * 9, [0, 4]]  # absent, present
    assert ClassCounts.of(TASKS["va"], torch.zeros(4, 2)) is None


def test_balanced_weights_are_scikit_learns_up_to_their_scale() -> None:
    labels = torch.tensor([0] * 50 + [2] * 5 + [3] * 20 + [7])
    counts = ClassCounts.of(TASKS["expr"], labels)
    assert counts is not None
    weights = counts.balanced()
    present = [0, 2, 3, 7]
    expected = compute_class_weight("balanced", classes=np.array(present), y=labels.numpy())
    np.testing.assert_allclose(weights[present] / weights[0], expected / expected[0])
    assert weights[[1, 4, 5, 6]].tolist() == [0] * 4
    totals = weights * counts.counts
    torch.testing.assert_close(totals[present], totals[0].expand(4))


def test_log_priors_are_of_shares_and_of_odds_with_counts_from_1() -> None:
    expr = torch.tensor([9, 0, 1, 2, 3, 4, 5, 8])
    np.testing.assert_allclose(TASKS["expr"].log_prior(expr), np.log(np.array([10, 1, 2, 3, 4, 5, 6, 9]) / 40))
    au = torch.tensor([[7, 1], [0, 8], *[[3, 5]] * 10]).flatten()
    np.testing.assert_allclose(TASKS["au"].log_prior(au), np.log([2 / 8, 9 / 1, *[6 / 4] * 10]))

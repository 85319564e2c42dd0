"""The registered tasks, and that a further one needs an entry in TASKS and nothing else."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import torch
from typer.testing import CliRunner

from affcache.cli.app import app
from affcache.errors import ConfigError
from affcache.scoring.score import score
from affcache.store.reading import EmbeddingStore
from affcache.tasks.kinds import Classes, Units, Values
from affcache.tasks.label_files import read_label_file
from affcache.tasks.losses import LOSSES
from affcache.tasks.task import Task
from affcache.tasks.tasks import TASKS, find_task
from affcache.training.fit import fit
from affcache.training.risk import cvar
from tests.conftest import MakeData, write_labels


def ccc(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> float:
    """The concordance correlation coefficient, 2 cov / (var + var + (difference of means)^2)."""
    covariance = ((x - x.mean()) * (y - y.mean())).mean()
    return float(2 * covariance / (x.var() + y.var() + (x.mean() - y.mean()) ** 2))


@pytest.fixture
def va_data(learnable: MakeData) -> tuple[Path, Path]:
    """A store and valence-arousal labels that follow from its embeddings, with -5 on every tenth frame."""
    path, annotations = learnable(videos=10)
    store = EmbeddingStore.open(path)
    values = np.tanh(store.features[:, :2].astype(float))
    values[::10] = -5
    for index, name in enumerate(store.video_names):
        rows = values[store.video_start[index] : store.video_start[index + 1]]
        split = "validation" if index % 3 == 2 else "train"
        write_labels(annotations, "va", split, {name: [f"{v:.3f},{a:.3f}" for v, a in rows]})
    return path, annotations


def test_valence_and_arousal_fit_and_score(va_data: tuple[Path, Path], tmp_path: Path) -> None:
    store, annotations = va_data
    run = tmp_path / "run"
    recipe = {"epochs": 8, "hidden_layers": 1, "hidden_width": 32, "dropout": 0, "rho": 0.02, "lr": 0.01}
    fitted = fit(task="va", store=store, annotations=annotations, run=run, **recipe)
    assert fitted.metric == "mean_ccc"
    assert fitted.value > 0.8
    assert fitted.frames == 7 * 40 * 9 / 10
    assert fitted.tail == 32 * 2 * 0.5
    assert "mean_ccc" in json.loads((run / "history.jsonl").read_text().splitlines()[0])

    scored = score(run=run).to_json()
    assert scored["value"] == fitted.value
    assert [c["name"] for c in scored["classes"]] == ["valence", "arousal"]
    assert all(c.keys() == {"name", "ccc", "low", "high", "pearson", "rmse", "support"} for c in scored["classes"])
    with h5py.File(run / "predictions.h5") as file:
        labels, decided = file["labels"][:], file["decided"][:]
    assert labels.min() >= -1
    assert scored["value"] == pytest.approx(np.mean([ccc(labels[:, i], decided[:, i]) for i in range(2)]))


def test_valence_and_arousal_work_from_the_command_line(va_data: tuple[Path, Path], tmp_path: Path) -> None:
    store, annotations = va_data
    run = str(tmp_path / "run")
    flags = ["--epochs", "1", "--hidden-width", "8", "--store", str(store), "--annotations", str(annotations)]
    fitted = CliRunner().invoke(app, ["fit", "--task", "va", "--run", run, *flags])
    assert fitted.exit_code == 0, fitted.output
    table = CliRunner().invoke(app, ["score", run])
    assert table.exit_code == 0, table.output
    for word in ("valence", "arousal", "ccc", "mean CCC"):
        assert word in table.stdout


def test_an_unknown_task_is_refused_with_a_suggestion_and_the_choices() -> None:
    with pytest.raises(ConfigError) as caught:
        find_task("exprs")
    message = str(caught.value)
    assert "--task 'exprs' is unknown (did you mean 'expr'?)" in message
    for task in TASKS.values():
        assert f"{task.name} ({task.description})" in message


NATURAL = [Classes("seven", tuple("abcdefg")), Units("unit", ("smile",)), Values("value", ("pain",), low=0, high=10)]
SINGLE = [task for task in TASKS.values() if not task.parts]
EACH = pytest.mark.parametrize("task", [*SINGLE, *NATURAL], ids=lambda task: task.name)


@EACH
def test_the_parts_of_a_task_fit_together(task: Task) -> None:
    logits = torch.randn(6, task.outputs, generator=torch.Generator().manual_seed(0), requires_grad=True)
    probabilities = task.probabilities(logits.detach()).numpy()
    labels = task.decide(probabilities)
    assert TASKS.get(task.name, task) is task
    assert len(labels) == 6
    assert labels.size == 6 * task.values_per_line
    assert labels.min() >= task.valid_range[0]
    assert labels.max() <= task.valid_range[1]
    assert not task.valid_range[0] <= task.invalid_value <= task.valid_range[1]
    losses = task.losses(logits, torch.from_numpy(labels))
    losses.sum().backward()
    assert losses.numel() == 6 * task.losses_per_frame
    if task.has_classes:
        assert task.class_of(torch.from_numpy(labels)).shape == losses.shape
    assert logits.grad.abs().sum() > 0
    usual, named = task.loss(""), task.loss(next(iter(LOSSES[task.kind])))
    assert torch.equal(usual(logits, torch.from_numpy(labels)), named(logits, torch.from_numpy(labels)))
    torch.testing.assert_close(task.loss("")(logits, torch.from_numpy(labels)), losses)
    torch.testing.assert_close(
        task.probabilities(task.logits(torch.from_numpy(probabilities))), torch.from_numpy(probabilities)
    )
    scores = task.score(labels, labels)
    assert scores.metric == task.metric
    assert [c.name for c in scores.classes] == list(task.classes)


@EACH
def test_drawn_labels_are_those_that_files_hold(task: Task, tmp_path: Path) -> None:
    labels = task.draw_labels(50, torch.Generator().manual_seed(0)).numpy()
    assert labels.dtype == task.label_dtype
    assert labels.shape == ((50,) if task.exclusive else (50, task.outputs)), "one unit or value is a column too"
    low, high = task.valid_range
    assert low <= labels.min() < labels.max() <= high
    lines = [",".join(map(str, np.atleast_1d(row).tolist())) for row in labels]
    missing = ",".join([str(task.invalid_value)] * task.values_per_line)
    (tmp_path / "a.txt").write_text("\n".join([task.header, *lines, missing]))
    found, valid = read_label_file(tmp_path / "a.txt", task)
    assert (found.dtype, found.shape) == (labels.dtype, (51, *labels.shape[1:]))
    assert np.array_equal(found[:50], labels)
    assert valid.tolist() == [True] * 50 + [False]


@EACH
def test_losses_terms_and_priors_have_the_shapes_of_heads_side_by_side(task: Task) -> None:
    drawn = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 9, task.outputs, generator=drawn)  # (H, B, C)
    labels = torch.stack([task.draw_labels(9, drawn) for _ in range(3)])
    losses = task.losses(logits, labels)
    assert losses.shape == labels.shape
    for head in range(3):
        torch.testing.assert_close(losses[head], task.losses(logits[head], labels[head]))
    if task.batch_term_weight:
        terms = task.batch_term(logits, labels, 0.6)
        torch.testing.assert_close(
            terms, torch.stack([task.batch_term(logits[h], labels[h], 0.6) for h in range(3)]), rtol=1e-5, atol=1e-6
        )
    else:
        with pytest.raises(TypeError, match="has no term of whole batches"):
            task.batch_term(logits, labels, 0.6)
    if task.has_classes:
        classes = task.class_of(labels)
        assert classes.shape == losses.shape
        assert 0 <= int(classes.min()) <= int(classes.max()) < task.class_count
        assert task.log_prior(torch.bincount(classes.flatten(), minlength=task.class_count)).shape == (task.outputs,)
    else:
        assert task.class_count == 0
        for part in (task.class_of, task.log_prior):
            with pytest.raises(TypeError, match="has no classes"):
                part(labels)


def test_an_unknown_loss_is_refused_with_a_suggestion_and_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"--loss 'cross_entrpy' is no loss of task expr \(did you mean 'cross_ent"):
        TASKS["expr"].loss("cross_entrpy")
    with pytest.raises(ConfigError, match="Expected squared_error"):
        TASKS["va"].loss("cross_entropy")


def test_the_tasks_are_the_challenges() -> None:
    expr, au = TASKS["expr"], TASKS["au"]
    assert expr.header == "Neutral,Anger,Disgust,Fear,Happiness,Sadness,Surprise,Other"
    assert au.header == "AU1,AU2,AU4,AU6,AU7,AU10,AU12,AU15,AU23,AU24,AU25,AU26"
    probabilities = np.array([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]], dtype=np.float32)
    assert expr.decide(probabilities).tolist() == [1, 2]
    assert au.decide(probabilities).tolist() == [[0, 1, 0], [0, 0, 1]], "0.5 is present"
    logits = torch.tensor([[0.0, 2.0], [1.0, 1.0]])
    assert expr.probabilities(logits).sum(dim=1).tolist() == pytest.approx([1, 1])
    assert au.probabilities(logits)[0].tolist() == pytest.approx([0.5, 1 / (1 + np.exp(-2))])


def test_cvar_of_action_units_runs_over_all_pairs_of_the_batch() -> None:
    logits = torch.zeros(2, 12)
    logits[1, :6] = 4.0  # six wrong ones of 24, all in one frame
    labels = torch.zeros(2, 12, dtype=torch.long)
    loss = cvar(TASKS["au"].losses(logits, labels), 0.25)
    assert float(loss) == pytest.approx(np.log(1 + np.exp(4)), rel=1e-5)
    assert TASKS["au"].losses_per_frame == 12


@pytest.mark.parametrize(("low", "high"), [(-10, 10), (-5, 0), (-9, -5), (1, 1), (2, 1)])
def test_a_range_that_holds_the_mark_of_no_label_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="expected a range without -5, which marks a frame without a label"):
        Values("pain", ("pain",), low=low, high=high)


@pytest.mark.parametrize(("low", "high"), [(0, 10), (100, 200), (-0.5, 0.5)])
def test_values_are_learnt_in_the_units_of_half_their_range(low: float, high: float) -> None:
    task, plain = Values("own", ("a", "b"), low=low, high=high), Values("plain", ("a", "b"))
    drawn = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(9, 2, generator=drawn), plain.draw_labels(9, drawn)
    middle, half = (low + high) / 2, (high - low) / 2
    own = labels * half + middle
    close = {"rtol": 1e-3, "atol": 1e-4}  # labels of 200 have fewer digits left
    torch.testing.assert_close(task.loss("")(logits, own), plain.loss("")(logits, labels), **close)
    torch.testing.assert_close(task.batch_term(logits, own, 0), plain.batch_term(logits, labels, 0), **close)
    torch.testing.assert_close(task.probabilities(logits), plain.probabilities(logits) * half + middle)
    torch.testing.assert_close(task.probabilities(task.logits(own)), own)
    both = torch.stack([logits, -logits / 2]).double()
    mean = torch.stack([task.probabilities(one) for one in both]).mean(0)
    torch.testing.assert_close(task.probabilities(task.averaged(both)), mean)


def test_values_of_a_range_without_an_end_are_as_they_are() -> None:
    task = Values("any", ("a",), low=0, high=float("inf"))
    assert (task.middle, task.half) == (0, 1)
    assert task.probabilities(torch.tensor([[1e6], [-1.0]])).tolist() == [[1e6], [0]]

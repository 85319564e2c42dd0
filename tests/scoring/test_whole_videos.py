"""Runs on labels of whole videos scored: a row a video, the metric over videos, and what is of frames left out."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import accuracy_score, f1_score

import affcache
from affcache.errors import ConfigError
from affcache.files import read_tensors
from affcache.reporting.report import report
from affcache.scoring.score import score
from affcache.store.reading import EmbeddingStore
from affcache.submission.submit import submit
from affcache.tasks.task import Task
from tests.conftest import Heard
from tests.reporting.test_reporting import Elements
from tests.whole_videos import BAH, PAIN, SIGNS, Videos, make_videos

QUICK: dict[str, Any] = {"epochs": 3, "hidden_layers": 1, "hidden_width": 16, "batch_size": 8, "rho": 0.05}


def fitted(videos: Videos, run: Path, **values: Any) -> Path:
    affcache.fit(task=videos.task.name, store=videos.store, run=run, device="cpu", **{**QUICK, **values})
    return run


def by_hand(videos: Videos, run: Path, pool: str) -> npt.NDArray[np.float64]:
    """What a linear head says of each validation video: of its mean and deviation, or the mean over its frames."""
    tensors, _ = read_tensors(run / "head.safetensors")
    weight, bias = (tensors[f"output_layer.{name}"].numpy().astype(float) for name in ("weight", "bias"))

    def said(given: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        logits = given @ weight.T + bias
        if videos.task.exclusive:
            return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        return 1 / (1 + np.exp(-logits)) if videos.task.has_classes else np.clip(5 * logits + 5, 0, 10)

    found = []
    for name in videos.names("validation"):
        frames = videos.frames(name).astype(float)
        found.append(said(frames).mean(0) if pool == "none" else said(np.concatenate([frames.mean(0), frames.std(0)])))
    return np.stack(found)


@pytest.mark.parametrize("pool", ["mean+std", "none"])
@pytest.mark.parametrize("task", [BAH, SIGNS, PAIN])
def test_a_row_a_video_is_what_numpy_and_scikit_learn_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Task, pool: str
) -> None:
    videos = make_videos(tmp_path, monkeypatch, task)
    run = fitted(videos, tmp_path / "run", head="linear", pool=pool)
    result, names = score(run=run, device="cpu"), videos.names("validation")
    expected, labels = by_hand(videos, run, pool), videos.labels("validation")
    with h5py.File(run / "predictions.h5") as file:
        contents = {name: file[name][:] for name in file}
    stored = EmbeddingStore.open(videos.store).video_names
    assert [stored[video] for video in contents["video"]] == names
    assert contents["rows"].tolist() == contents["video"].tolist()
    assert not contents["frame_number"].any()
    assert contents["probabilities"] == pytest.approx(expected, abs=1e-5)
    assert np.array_equal(contents["labels"], labels)
    if task.has_classes:
        decided = expected.argmax(1) if task.exclusive else (expected >= 0.5).astype(int)
        assert np.array_equal(contents["decided"], decided)
        assert result.scores.value == pytest.approx(f1_score(labels, decided, average="macro", zero_division=0))
        assert result.scores.further["accuracy"] == pytest.approx(accuracy_score(labels.ravel(), decided.ravel()))
    assert sum(one.support for one in result.scores.classes) == (labels.sum() if task is SIGNS else labels.size)
    written = json.loads((run / "scores.json").read_text())
    groups = {name.removesuffix("_left") for name in names}
    assert (written["level"], written["frames"], written["videos"]) == ("video", len(names), len(groups))


def test_pooled_and_inherited_are_averaged_and_compared_on_the_same_videos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = make_videos(tmp_path, monkeypatch)
    runs = [fitted(videos, tmp_path / pool, pool=pool, head="linear") for pool in ("mean+std", "none")]
    score(run=runs, device="cpu")
    mean = np.mean([by_hand(videos, run, run.name) for run in runs], axis=0)
    with h5py.File(runs[0] / "average" / "predictions.h5") as file:
        assert file["probabilities"][:] == pytest.approx(mean, abs=1e-5)
    values = [score(run=run, device="cpu").scores.value for run in runs]
    against = score(run=runs[0], against=runs[1], device="cpu").against
    assert against is not None
    assert (against["own"], against["value"], against["frames"]) == (*values, len(videos.names("validation")))


@pytest.mark.parametrize("pool", ["mean+std", "none"])
def test_rules_are_fitted_on_held_out_videos_and_nothing_is_smoothed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: str
) -> None:
    videos = make_videos(tmp_path, monkeypatch)
    run = fitted(videos, tmp_path / "run", pool=pool, held_out=0.3)
    result = score(run=run, decide="fitted", calibrate=True, device="cpu")
    assert result.rule.fitted_on == "held-out training videos"
    assert result.rule.offsets is not None
    with pytest.raises(ConfigError, match="--smooth mean is over frames of a video, but task bah decides once"):
        score(run=run, smooth="mean", smooth_width=3, device="cpu")
    (tmp_path / "template.txt").write_text("v00/00001.jpg,\n")
    with pytest.raises(ConfigError, match="task bah decides once for each video"):
        submit(run=run, template=tmp_path / "template.txt", store=videos.store, out=tmp_path / "out.txt")


@pytest.mark.parametrize("task", [BAH, PAIN])
def test_a_report_shows_videos_and_no_timeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Task) -> None:
    videos, heard = make_videos(tmp_path, monkeypatch, task), Heard()
    run = fitted(videos, tmp_path / "run")
    result = report(run=run, device="cpu", listener=heard, crops=tmp_path / "none")
    page = (run / "report.html").read_text()
    shown = Elements(page)
    headings = {"scores", "curves", "hardest videos", "settings", "labels that may be wrong"}
    found = {str(one["id"]).removesuffix("-section").replace("-", " ") for one in shown.of("section")}
    assert found == (headings if task is BAH else headings - {"labels that may be wrong"})
    assert not shown.of("script")
    assert not shown.of("canvas")
    assert result.frames == len(videos.names("validation"))
    assert f"{result.frames} validation videos." in shown.text
    assert "frame" not in shown.text.split("Settings")[-2].lower().replace("frames_per_epoch", "")
    assert not [message for message in heard.warnings if "crops" in message]

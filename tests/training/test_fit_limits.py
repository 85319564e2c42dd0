"""What lies at the edge: embeddings that are no numbers, one class, tiny or empty splits, settings out of range."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from affcache.errors import AffcacheError, ConfigError, InputError
from affcache.scoring.score import score
from affcache.store.reading import EmbeddingStore
from affcache.training.fit import fit
from affcache.training.settings import FitSettings
from tests.conftest import write_labels, write_store

QUICK = {"epochs": 2, "hidden_layers": 1, "hidden_width": 8, "device": "cpu"}
FRAMES = 6
VIDEOS = {"a": range(1, FRAMES + 1), "b": range(1, FRAMES + 1)}


def data(folder: Path, train: list[object], validation: list[object], spoil: int | None = None) -> dict[str, Path]:
    """Write a store of two videos of six frames, one for each split, and expression labels."""
    features = np.random.default_rng(0).standard_normal((2 * FRAMES, 5)).astype(np.float16)
    write_store(folder / "store.h5", VIDEOS, features)
    if spoil is not None:  # affcache writes no such store, but others may
        with h5py.File(folder / "store.h5", "r+") as file:
            file["features"][spoil, 2] = np.nan if spoil % 2 else np.inf
    write_labels(folder / "labels", "expr", "train", {"a": train})
    write_labels(folder / "labels", "expr", "validation", {"b": validation})
    return {"store": folder / "store.h5", "annotations": folder / "labels"}


@pytest.mark.parametrize("head", ["mlp", "ridge"])
@pytest.mark.parametrize(("row", "split"), [(2, "training"), (3, "training"), (9, "validation")])
def test_embeddings_with_nan_or_inf_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: int, split: str, head: str
) -> None:
    given = data(tmp_path, [0, 1] * 3, [0, 1] * 3, spoil=row)
    monkeypatch.setattr(EmbeddingStore, "verify", lambda store: None)  # as if the checksums were of these embeddings
    words = rf"1 of 6 {split} frames .* nan or inf in it, the first is frame {row % 6} of"
    with pytest.raises(InputError, match=words):
        fit(**given, **QUICK, head=head, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_scoring_refuses_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sound").mkdir()
    (tmp_path / "spoilt").mkdir()
    run = tmp_path / "run"
    fit(**data(tmp_path / "sound", [0, 1] * 3, [0, 1] * 3), **QUICK, run=run)
    spoilt = data(tmp_path / "spoilt", [0, 1] * 3, [0, 1] * 3, spoil=9)
    monkeypatch.setattr(EmbeddingStore, "verify", lambda store: None)  # as if the checksums were of these embeddings
    with pytest.raises(
        InputError, match=r"1 of 6 frames have an embedding with nan or inf in it, the first is row 9 of"
    ):
        score(run=run, store=spoilt["store"])


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"alpha": 0.1},
        {"class_weights": "balanced"},
        {"cvar_within": "class"},
        {"cvar_level": "set"},
        {"head": "ridge"},
        {"logit_adjustment": 1.0},
    ],
)
def test_a_single_class_is_learnt(tmp_path: Path, more: dict[str, object]) -> None:
    given = data(tmp_path, [4] * FRAMES, [4] * FRAMES)
    result = fit(
        **given, **{**QUICK, "epochs": 40, "rho": 0.0, "lr": 0.05, "dropout": 0.0, **more}, run=tmp_path / "run"
    )
    assert result.value == 0.125, "an F1 of 1 for happiness, 0 for the seven that nobody shows"


def test_no_validation_frame_is_an_error_before_training(tmp_path: Path) -> None:
    given = data(tmp_path, [0, 1] * 3, [-1] * FRAMES)
    with pytest.raises(InputError) as caught:
        fit(**given, **QUICK, run=tmp_path / "run")
    assert "validation" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_single_training_frame_is_an_error(tmp_path: Path) -> None:
    given = data(tmp_path, [0, *[-1] * (FRAMES - 1)], [0, 1] * 3)
    with pytest.raises(InputError, match="Only 1 training frame: expected at least 2"):
        fit(**given, **QUICK, run=tmp_path / "run")


@pytest.mark.parametrize("frames", [2, 3, 5])
def test_a_handful_of_training_frames_trains(tmp_path: Path, frames: int) -> None:
    given = data(tmp_path, [*[0, 1, 2, 0, 1][:frames], *[-1] * (FRAMES - frames)], [0, 1] * 3)
    assert fit(**given, **QUICK, batch_size=2, run=tmp_path / "run").frames == frames


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"alpha": 0.0}, "--alpha is 0.0; expected more than 0 and at most 1"),
        ({"alpha": 2.0}, "--alpha is 2.0; expected more than 0 and at most 1"),
        ({"alpha": float("nan")}, "--alpha is nan"),
        ({"rho": -0.1}, "--rho is -0.1; expected at least 0"),
        ({"batch_size": 1}, "--batch-size is 1; expected at least 2"),
        ({"stride": 0}, "--stride is 0; expected at least 1"),
        ({"frames_per_epoch": 1}, "--frames-per-epoch is 1; expected at least 2"),
        ({"label_smoothing": 1.0}, r"--label-smoothing is 1.0; expected in \[0, 1\)"),
        ({"clip_norm": 0.0}, "--clip-norm is 0.0; expected more than 0"),
        ({"cvar_within": "video", "cvar_level": "set"}, "--cvar-within goes with neither"),
    ],
)
def test_settings_out_of_range(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FitSettings(**wrong)  # type: ignore[arg-type]
    assert issubclass(ConfigError, AffcacheError)

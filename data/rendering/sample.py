"""Writing rendered practice faces in Aff-Wild2's layout, with labels that are exact by construction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from affcache import TASKS
from affcache.errors import InputError
from data.rendering.plan import CHALLENGES, SPLITS, Challenge, Split, VideoPlan, plan_sample
from data.rendering.render import ACTION_UNITS, Identity, Lighting, render_face
from data.rendering.timeline import EXPRESSIONS, Performance, perform, place_episodes

LABELS = {challenge: TASKS[challenge.lower()] for challenge in CHALLENGES}  # what says how each one's files look
FOLDERS: dict[Challenge, str] = {challenge: task.folders[0] for challenge, task in LABELS.items()}
HEADERS: dict[Challenge, str] = {challenge: task.header for challenge, task in LABELS.items()}
COMMON = [EXPRESSIONS.index(name) for name in ("Neutral", "Happiness", "Sadness", "Other")]
DESKTOP_FILE = b"\x00\x00\x00\x01Bud1" + bytes(24)
"""Stands for the .DS_Store files that lie among Aff-Wild2's folders."""


@dataclass(frozen=True)
class SplitSummary:
    """What one split holds; the label counts are of frames with a valid label and a crop."""

    videos: int
    crops: int
    expression_frames: dict[str, int]
    """Frames per expression class."""
    action_unit_frames: int
    action_unit_positives: dict[str, int]
    """Frames per action unit in which it is active."""
    valence_arousal_frames: int


@dataclass(frozen=True)
class SampleSummary:
    """What `write_sample` wrote."""

    folder: Path
    train: SplitSummary
    validation: SplitSummary

    @property
    def videos(self) -> int:
        """Number of crop folders; the two persons of a pair count twice."""
        return self.train.videos + self.validation.videos

    @property
    def crops(self) -> int:
        """Number of JPEG files."""
        return self.train.crops + self.validation.crops

    def to_json(self) -> dict[str, Any]:
        """Return the summary as one JSON object."""
        return {"folder": str(self.folder), "train": asdict(self.train), "validation": asdict(self.validation)}


@dataclass(frozen=True)
class _VideoLabels:
    """Label rows of one video, and which frames have a crop; row i belongs to frame number i + 1."""

    has_crop: NDArray[np.bool_]
    expression: NDArray[np.int64]
    action_units: NDArray[np.int64]
    valence_arousal: NDArray[np.float64]
    """(rows, 2) in [-1, 1], or -5 in both columns of a row without a label."""


def write_sample(
    folder: Path,
    *,
    videos: int = 30,
    frames: int = 40,
    seed: int = 0,
    quality: int = 76,
    progress: Callable[[int, int], None] | None = None,
) -> SampleSummary:
    """Render a practice data set into `folder`, laid out as Aff-Wild2.

    `folder` gets `cropped_aligned/<video>/NNNNN.jpg` (112 x 112 RGB) and `annotations/<challenge>/<split>/<video>.txt`.
    It is made when missing and must be empty. `videos` (2 or more) is the number of crop folders, a third of them for
    validation; `frames` (8 or more) their typical length; `quality` (1 to 95) is JPEG's. The same arguments give the
    same bytes with the same Pillow. `progress(done, total)` is called after every video with numbers of frames.
    Raises InputError for values out of range, for a folder that holds something, and for one that can't be written.
    """
    _check(folder, videos, frames, seed, quality)
    try:
        return _write(folder, videos, frames, seed, quality, progress)
    except OSError as error:
        raise InputError(
            f"{folder} can't be written: {error.strerror or error}. Expected a new or empty folder, with room for the "
            "sample. Choose another; what was written so far may be deleted."
        ) from None


def _write(
    folder: Path, videos: int, frames: int, seed: int, quality: int, progress: Callable[[int, int], None] | None
) -> SampleSummary:
    plans = plan_sample(videos, frames, np.random.default_rng([seed]))
    total, done = sum(plan.frames for plan in plans), 0
    crops = folder / "cropped_aligned"
    crops.mkdir(parents=True)
    (crops / ".DS_Store").write_bytes(DESKTOP_FILE)
    written: dict[Split, list[tuple[VideoPlan, _VideoLabels]]] = {split: [] for split in SPLITS}
    for plan in plans:
        rng = np.random.default_rng([seed, SPLITS.index(plan.split), plan.index])
        episodes = place_episodes(plan.episodes, plan.frames, rng, first=plan.first_frame)
        performance = perform(episodes, plan.frames, rng)
        labels = _label(plan, performance, rng)
        _write_crops(crops / plan.name, plan, performance, labels.has_crop, quality, rng)
        _write_annotations(folder / "annotations", plan, labels)
        written[plan.split].append((plan, labels))
        done += plan.frames
        if progress is not None:
            progress(done, total)
    return SampleSummary(folder, _summarise(written["Train_Set"]), _summarise(written["Validation_Set"]))


def _check(folder: Path, videos: int, frames: int, seed: int, quality: int) -> None:
    bounds = {
        "videos": (videos, 2, 100_000),
        "frames": (frames, 8, 99_000),
        "seed": (seed, 0, 2**63 - 1),
        "quality": (quality, 1, 95),
    }
    for name, (value, low, high) in bounds.items():
        if not low <= value <= high:
            raise InputError(f"{name} must be between {low} and {high}, got {value}.")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file. Name a folder that is empty or does not exist yet.")
    held = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    if held:
        raise InputError(
            f"{folder} already holds {len(held)} entries ({', '.join(held[:3])}{', ...' if len(held) > 3 else ''}), "
            "and a sample is written only into an empty folder. Name another folder, or remove this one first."
        )


def _label(plan: VideoPlan, performance: Performance, rng: np.random.Generator) -> _VideoLabels:
    """Derive the label rows, then spoil some as the original's are: no crop, or a label that says it is invalid.

    Only frames of common classes are spoilt, so that the rare ones keep theirs.
    """
    expression = performance.expression.copy()
    action_units = performance.action_unit_labels
    valence_arousal = performance.valence_arousal.copy()
    common = np.isin(performance.expression, COMMON)

    has_crop = np.ones(plan.frames, dtype=bool)
    has_crop[: plan.first_frame] = False
    has_crop[_run(common, 2 + plan.frames // 25, rng)] = False
    has_crop[-1] = True
    if plan.index % 2:  # the other half of the videos keep valid labels where no crop is
        expression[~has_crop] = -1
    if plan.index % 3 != 1:
        expression[_run(common, 2, rng)] = -1
        rows = _run(common, 3, rng)
        action_units[rows] = -1
        action_units[rows[1:], 1:] = performance.action_unit_labels[rows[1:], 1:]  # one -1 makes the row invalid
        valence_arousal[_run(common, 2, rng)] = -5
    order = np.arange(plan.frames + plan.extra_rows).clip(0, plan.frames - 1)
    return _VideoLabels(has_crop, expression[order], action_units[order], valence_arousal[order])


def _run(allowed: NDArray[np.bool_], length: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Return up to `length` neighbouring frames, from a random start, of those allowed."""
    candidates = np.flatnonzero(allowed)
    if not len(candidates):
        return candidates
    start = candidates[rng.integers(len(candidates))]
    chosen: NDArray[np.intp] = candidates[(candidates >= start) & (candidates < start + length)]
    return chosen


def _write_crops(
    folder: Path,
    plan: VideoPlan,
    performance: Performance,
    has_crop: NDArray[np.bool_],
    quality: int,
    rng: np.random.Generator,
) -> None:
    identity, lighting = Identity.draw(rng, plan.skin), Lighting.draw(rng)
    folder.mkdir()
    for frame in np.flatnonzero(has_crop):
        face = render_face(
            identity,
            performance.action_units[frame],
            performance.poses[frame],
            lighting,
            performance.motions[frame],
        )
        Image.fromarray(face).save(folder / f"{frame + 1:05d}.jpg", quality=quality, optimize=True)


def _write_annotations(folder: Path, plan: VideoPlan, labels: _VideoLabels) -> None:
    rows: dict[Challenge, list[str]] = {
        "EXPR": [str(value) for value in labels.expression.tolist()],
        "AU": [",".join(map(str, row)) for row in labels.action_units.tolist()],
        "VA": [f"{_decimal(valence)},{_decimal(arousal)}" for valence, arousal in labels.valence_arousal.tolist()],
    }
    for challenge in plan.challenges:
        target = folder / FOLDERS[challenge] / plan.split / f"{plan.name}.txt"
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = [HEADERS[challenge], *rows[challenge], *[""] * plan.trailing_blank_lines]
        target.write_bytes("".join(line + plan.newline for line in lines).encode("ascii"))


def _decimal(value: float) -> str:
    return "-5" if value == -5 else f"{value + 0.0:.3f}".replace("-0.000", "0.000")


def _summarise(written: list[tuple[VideoPlan, _VideoLabels]]) -> SplitSummary:
    expressions = np.zeros(len(EXPRESSIONS), dtype=int)
    positives = np.zeros(len(ACTION_UNITS), dtype=int)
    action_unit_frames = valence_arousal_frames = 0
    for plan, labels in written:
        rows = min(len(labels.has_crop), len(labels.expression))
        seen = labels.has_crop[:rows]
        if "EXPR" in plan.challenges:
            valid = labels.expression[:rows][seen]
            expressions += np.bincount(valid[valid >= 0], minlength=len(EXPRESSIONS))
        if "AU" in plan.challenges:
            units = labels.action_units[:rows][seen]
            units = units[(units >= 0).all(1)]
            action_unit_frames += len(units)
            positives += units.sum(0)
        if "VA" in plan.challenges:
            valence_arousal_frames += int((labels.valence_arousal[:rows][seen] >= -1).all(1).sum())
    return SplitSummary(
        videos=len(written),
        crops=sum(int(labels.has_crop.sum()) for _, labels in written),
        expression_frames=dict(zip(EXPRESSIONS, expressions.tolist(), strict=True)),
        action_unit_frames=action_unit_frames,
        action_unit_positives=dict(zip(ACTION_UNITS, positives.tolist(), strict=True)),
        valence_arousal_frames=valence_arousal_frames,
    )

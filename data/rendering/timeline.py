"""What a face does over time: expression episodes with onset, apex and offset, and the labels that follow from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from affcache import TASKS
from data.rendering.anatomy import ACTION_UNITS
from data.rendering.identity import Pose, UnlabelledMotion

EXPRESSIONS = TASKS["expr"].classes
NEUTRAL, OTHER = 0, 7

AU_THRESHOLD = 0.4
"""An action unit's label is 1 from this intensity on; the renderer shows it clearly there."""
EXPRESSION_THRESHOLD = 0.4
"""A frame has its episode's expression from this intensity on, and is Neutral below it."""


@dataclass(frozen=True)
class Prototype:
    """One way to show an expression: its action units at the apex, after EMFACS, and its place on the circumplex.

    Valence and arousal are a rough choice: the quadrants are after Russell, A circumplex model of affect,
    Journal of Personality and Social Psychology 39, 1980; the numbers are ours. A frame's values are these times its
    intensity, so Neutral is about (0, 0).
    """

    expression: str
    units: Mapping[str, float]
    """Intensity at the apex, 0 to 1."""
    valence: float
    """At the apex, -1 (unpleasant) to 1 (pleasant)."""
    arousal: float
    """At the apex, -1 (calm) to 1 (excited)."""
    motion: Mapping[str, float] = field(default_factory=dict)
    """Fields of UnlabelledMotion at the apex."""
    speaks: bool = False
    """AU26 rises and falls as in speech."""


PROTOTYPES: tuple[Prototype, ...] = (
    Prototype("Anger", {"AU4": 1.0, "AU7": 0.9, "AU23": 0.95}, -0.6, 0.7),
    Prototype("Anger", {"AU4": 1.0, "AU7": 0.9, "AU23": 0.9, "AU24": 0.9}, -0.65, 0.75),
    Prototype("Disgust", {"AU4": 0.7, "AU7": 0.8, "AU10": 1.0}, -0.65, 0.3, {"nose_wrinkle": 0.9}),
    Prototype("Disgust", {"AU4": 0.7, "AU7": 0.8, "AU10": 1.0, "AU25": 0.8}, -0.7, 0.4, {"nose_wrinkle": 0.9}),
    Prototype(
        "Fear",
        {"AU1": 1.0, "AU2": 0.8, "AU4": 0.75, "AU25": 0.9},
        -0.55,
        0.75,
        motion={"eye_widening": 1.0, "lip_stretch": 1.0},
    ),
    Prototype("Happiness", {"AU6": 0.9, "AU12": 1.0, "AU25": 0.85}, 0.85, 0.5),
    Prototype("Happiness", {"AU6": 0.85, "AU12": 0.95}, 0.7, 0.3),
    Prototype("Sadness", {"AU1": 1.0, "AU4": 0.75, "AU15": 1.0}, -0.7, -0.4),
    Prototype("Surprise", {"AU1": 1.0, "AU2": 1.0, "AU25": 0.9, "AU26": 0.95}, 0.15, 0.8, {"eye_widening": 0.9}),
    Prototype("Other", {"AU25": 0.9, "AU26": 0.5}, 0.1, 0.2, speaks=True),
    Prototype("Other", {"AU2": 0.9, "AU24": 0.95}, -0.15, 0.15),
    Prototype("Other", {"AU2": 0.85, "AU12": 0.95}, 0.3, 0.2, motion={"asymmetry": 0.75}),
)


@dataclass(frozen=True)
class Episode:
    """One expression in a video: `frames` frames from `start` on, at `peak` intensity (0.75 to 1)."""

    prototype: Prototype
    start: int
    frames: int
    peak: float


@dataclass(frozen=True)
class Performance:
    """One video's motion and labels, frame by frame."""

    action_units: NDArray[np.float64]
    """(frames, 12) intensities in [0, 1]."""
    expression: NDArray[np.int64]
    """(frames,) class 0 to 7."""
    valence_arousal: NDArray[np.float64]
    """(frames, 2) of valence and arousal in [-1, 1]: the prototype's, scaled by the episode's intensity."""
    motions: tuple[UnlabelledMotion, ...]
    poses: tuple[Pose, ...]

    @property
    def action_unit_labels(self) -> NDArray[np.int64]:
        """(frames, 12) of 0 and 1: intensity at or above AU_THRESHOLD."""
        return (self.action_units >= AU_THRESHOLD).astype(np.int64)


def place_episodes(
    planned: Sequence[tuple[Prototype, int]], frames: int, rng: np.random.Generator, *, first: int = 0
) -> tuple[Episode, ...]:
    """Spread episodes, given as (prototype, frames), over a video in random order with neutral time between them.

    The first `first` frames stay neutral.
    """
    rest = frames - first - sum(length for _, length in planned)
    gaps = rng.multinomial(max(rest, 0), np.full(len(planned) + 1, 1 / (len(planned) + 1)))
    episodes, start = [], first
    for gap, index in zip(gaps[:-1], rng.permutation(len(planned)), strict=True):
        prototype, length = planned[index]
        start += int(gap)
        episodes.append(Episode(prototype, start, length, float(rng.uniform(0.88, 1.0))))
        start += length
    return tuple(episodes)


def perform(episodes: Sequence[Episode], frames: int, rng: np.random.Generator) -> Performance:
    """Turn episodes into intensities, labels, blinks and head motion for `frames` frames."""
    action_units = np.abs(rng.normal(0, 0.03, (frames, len(ACTION_UNITS))))
    expression = np.full(frames, NEUTRAL)
    valence_arousal = np.zeros((frames, 2))
    motion = {name: np.zeros(frames) for name in ("eye_widening", "nose_wrinkle", "lip_stretch", "asymmetry")}
    for episode in episodes:
        prototype = episode.prototype
        curve = _intensity(episode, frames, rng)
        for name, apex in prototype.units.items():
            column = ACTION_UNITS.index(name)
            strength = apex * curve
            if prototype.speaks and name == "AU26":
                strength = strength * _speech(frames, rng)
            action_units[:, column] = np.maximum(action_units[:, column], strength)
        for name, apex in prototype.motion.items():
            sign = rng.choice([-1, 1]) if name == "asymmetry" else 1
            # A lopsided smile is lopsided from its first frame on.
            motion[name] += sign * apex * (curve > 0 if name == "asymmetry" else curve)
        expression[curve >= EXPRESSION_THRESHOLD] = EXPRESSIONS.index(prototype.expression)
        valence_arousal += curve[:, None] * [prototype.valence, prototype.arousal]
    return Performance(
        action_units=np.clip(action_units, 0, 1),
        expression=expression,
        valence_arousal=np.clip(valence_arousal, -1, 1),
        motions=_motions(motion, frames, rng),
        poses=_poses(frames, rng),
    )


def _intensity(episode: Episode, frames: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Smooth onset, apex and offset, (frames,); at or above the threshold for about `episode.frames` frames."""
    ramp = float(np.clip(episode.frames / 6, 1.2, 5.0))
    middle = episode.start + (episode.frames - 1) / 2
    inside = episode.frames / 2 - np.abs(np.arange(frames) - middle)
    share = np.clip((inside + 0.5 * ramp) / ramp, 0, 1)
    smooth = share**2 * (3 - 2 * share)
    return np.asarray(episode.peak * smooth * (1 - np.abs(rng.normal(0, 0.03, frames))))


def _speech(frames: int, rng: np.random.Generator) -> NDArray[np.float64]:
    phase = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.uniform(0.8, 2.2, frames))
    return np.asarray(0.75 + 0.6 * np.sin(phase)).clip(0, 1.6)


def _motions(
    motion: Mapping[str, NDArray[np.float64]], frames: int, rng: np.random.Generator
) -> tuple[UnlabelledMotion, ...]:
    blink = np.where(rng.random(frames) < 0.05, rng.uniform(0.7, 1.0, frames), 0.0)
    gaze = _drift(frames, 0.35, rng).clip(-1, 1)
    return tuple(
        UnlabelledMotion(
            blink=float(blink[frame]),
            eye_widening=float(motion["eye_widening"][frame].clip(0, 1)),
            nose_wrinkle=float(motion["nose_wrinkle"][frame].clip(0, 1)),
            lip_stretch=float(motion["lip_stretch"][frame].clip(0, 1)),
            asymmetry=float(motion["asymmetry"][frame].clip(-1, 1)),
            gaze=float(gaze[frame]),
        )
        for frame in range(frames)
    )


def _poses(frames: int, rng: np.random.Generator) -> tuple[Pose, ...]:
    """A resting pose with slow small motion about it."""
    rest = Pose.draw(rng)
    yaw, pitch, roll = (_drift(frames, spread, rng) for spread in (1.8, 1.2, 0.6))
    return tuple(
        Pose(
            yaw=float(np.clip(rest.yaw + yaw[frame], -16, 16)),
            pitch=float(np.clip(rest.pitch + pitch[frame], -10, 10)),
            roll=float(np.clip(rest.roll + roll[frame], -4, 4)),
        )
        for frame in range(frames)
    )


def _drift(frames: int, spread: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Slow smooth motion (frames,) with about the given standard deviation."""
    time = np.arange(frames)
    periods = rng.uniform(12, 60, 3)
    phases = rng.uniform(0, 2 * np.pi, 3)
    waves = np.sin(2 * np.pi * time[:, None] / periods + phases)
    return np.asarray(spread * waves.mean(1) * np.sqrt(6))

"""What a sample will hold before anything is drawn: videos, their names, their expressions and their irregularities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Literal

import numpy as np

from data.rendering.identity import SKIN_TONES, Colour
from data.rendering.timeline import EXPRESSIONS, NEUTRAL, PROTOTYPES, Prototype

Split = Literal["Train_Set", "Validation_Set"]
Challenge = Literal["EXPR", "AU", "VA"]

SPLITS: tuple[Split, ...] = ("Train_Set", "Validation_Set")
CHALLENGES: tuple[Challenge, ...] = ("EXPR", "AU", "VA")

EXPRESSION_SHARES = (0.303, 0.028, 0.018, 0.016, 0.163, 0.135, 0.054, 0.283)
"""Aff-Wild2's training frames by class, in the order of EXPRESSIONS."""
LEAST_FRAMES = {"Train_Set": 28, "Validation_Set": 18}
"""Frames a rare class is lifted to when the sample is small, so that every class can be learnt and scored."""
RESOLUTIONS = ("1280x720", "1920x1080", "640x360", "720x480")


@dataclass(frozen=True)
class VideoPlan:
    """One person in one video."""

    name: str
    split: Split
    index: int
    """Position among the split's videos, from 0."""
    frames: int
    skin: Colour
    episodes: tuple[tuple[Prototype, int], ...]
    """(prototype, frames), in no order yet."""
    challenges: tuple[Challenge, ...]
    """The challenges that label this video."""
    first_frame: int
    """Frames at the start that show no face, and so have no crop."""
    extra_rows: int
    """Label rows minus frames: 1 as usual, 0, or -1 where the last crop has no label."""
    newline: str
    trailing_blank_lines: int


def plan_sample(videos: int, frames: int, rng: np.random.Generator) -> tuple[VideoPlan, ...]:
    """Plan `videos` videos of about `frames` frames, a third of them for validation.

    No person is in two of them, so none is in both splits. The irregularities depend on the position in the split:
    a split of six videos has nearly all of them.
    """
    validation = max(1, round(videos / 3))
    numbers = iter(rng.permutation(np.arange(1, 4 * videos + 150)).tolist())
    plans: list[VideoPlan] = []
    for split, count in zip(SPLITS, (videos - validation, validation), strict=True):
        plans.extend(_plan_split(split, count, frames, numbers, rng))
    return tuple(plans)


def _plan_split(
    split: Split, videos: int, frames: int, numbers: Iterator[int], rng: np.random.Generator
) -> list[VideoPlan]:
    names = _names(videos, numbers, rng)
    lengths = [max(8, round(frames * float(rng.uniform(0.85, 1.15)))) for _ in names]
    lead = [min(int(rng.integers(2, 6)), frames // 8) if index % 4 == 1 else 0 for index in range(videos)]
    challenges = [_challenges(index, videos) for index in range(videos)]
    episodes: list[list[tuple[Prototype, int]]] = [[] for _ in names]
    labelled = [index for index in range(videos) if {"EXPR", "AU"} <= set(challenges[index])]
    partly_labelled = [index for index in range(videos) if index not in labelled]
    groups = [(labelled, LEAST_FRAMES[split]), (partly_labelled, 0)]
    for group, least in groups if partly_labelled else groups[:1]:
        room = [lengths[index] - lead[index] for index in group]
        for index, chosen in zip(group, _share_out(room, frames, least, rng), strict=True):
            episodes[index] = chosen
    tones = rng.permutation(len(SKIN_TONES))
    return [
        VideoPlan(
            name=name,
            split=split,
            index=index,
            frames=lengths[index],
            skin=SKIN_TONES[tones[index % len(tones)]],
            episodes=tuple(episodes[index]),
            challenges=challenges[index],
            first_frame=lead[index],
            extra_rows={2: -1, 4: 0}.get(index % 10, 1),
            newline="\r\n" if index % 10 == 1 else "\n",
            trailing_blank_lines=2 if index % 10 == 3 else 0,
        )
        for index, name in enumerate(names)
    ]


def _challenges(index: int, videos: int) -> tuple[Challenge, ...]:
    """Not every video is in every challenge, but a small split keeps all its labels."""
    absent: dict[int, tuple[Challenge, ...]] = {2: ("VA",), 4: ("EXPR",), 5: ("AU", "VA")}
    left_out = absent.get(index % 20, ()) if videos >= 6 else ()
    return tuple(challenge for challenge in CHALLENGES if challenge not in left_out)


def _share_out(
    room: Sequence[int], frames: int, least: int, rng: np.random.Generator
) -> list[list[tuple[Prototype, int]]]:
    """Give each video with `room` frames its episodes, so that the classes come out in EXPRESSION_SHARES.

    A class goes to as many different people as it can, the rare ones first.
    """
    total = sum(room)
    free = np.array(room, dtype=float)
    chosen: list[list[tuple[Prototype, int]]] = [[] for _ in room]
    typical = float(np.clip(frames / 7, 4, 30))
    for name, target in sorted(_targets(total, least).items(), key=lambda item: item[1]):
        variants = [prototype for prototype in PROTOTYPES if prototype.expression == name]
        count = max(1, round(target / typical), min(round(target / 4), 6))
        lengths = np.diff(np.rint(np.linspace(0, target, count + 1))).astype(int)
        for length, prototype in zip(lengths, cycle(variants), strict=False):
            shown = np.array([sum(p.expression == name for p, _ in episodes) for episodes in chosen])
            # Fewest showings of this class first, then most room; the noise breaks ties.
            video = int(np.argmin(shown * 1e4 + (free < length + 1) * 1e3 - free + rng.uniform(0, 0.5, len(free))))
            fitting = min(int(length), int(free[video]) - 1)
            if fitting >= 2:
                chosen[video].append((prototype, fitting))
                free[video] -= fitting
    return chosen


def _targets(total: int, least: int) -> dict[str, float]:
    """Frames per class but Neutral, which gets the rest; what lifts the rare classes is taken from all others."""
    shares = dict(zip(EXPRESSIONS, EXPRESSION_SHARES, strict=True))
    floor = min(least, total / 12)
    lifted = {name: floor for name, share in shares.items() if share * total < floor}
    others = (total - sum(lifted.values())) / (total * (1 - sum(shares[name] for name in lifted)))
    targets = {name: lifted.get(name, share * total * others) for name, share in shares.items()}
    del targets[EXPRESSIONS[NEUTRAL]]
    return targets


def _names(videos: int, numbers: Iterator[int], rng: np.random.Generator) -> list[str]:
    """Names as Aff-Wild2 has them; `_left` and `_right`, or plain and `_right`, are two persons of one video."""
    names: list[str] = []
    for kind in cycle(("sized", "pair", "video", "number", "sized-k", "plain pair", "video_k", "sized")):
        if len(names) >= videos:
            break
        number = next(numbers)
        size = f"{number}-{rng.choice([24, 25, 30, 60])}-{RESOLUTIONS[rng.integers(len(RESOLUTIONS))]}"
        if "pair" in kind and videos - len(names) >= 2:
            names += [f"{size}_left", f"{size}_right"] if kind == "pair" else [f"video{number}", f"video{number}_right"]
        else:
            single = {"video": f"video{number}", "number": f"{number}", "video_k": f"video{number}_1"}
            names.append(single.get(kind, f"{size}-{rng.integers(1, 4)}" if kind == "sized-k" else size))
    return names

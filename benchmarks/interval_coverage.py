"""How often intervals over videos hold the true metric: simulated videos, unequal, correlated within, classes rare.

    python -m benchmarks.interval_coverage                      # 2,000 sets of videos of each kind, three minutes
    python -m benchmarks.interval_coverage --sets 200 --json

A population of videos is simulated for each task, with the shares of Aff-Wild2's training labels (expr) and rates alike
(au, va): lengths are log-normal; a video's mix of classes is drawn about the shares, so that it shows few of them; how
well a class is recognised there varies from video to video, for two heads alike but for a part. Sets of G videos are
drawn; the true metric is that of 200,000. A line for each:

    given   share of the sets that have an interval: every class is in at least three videos
    value, difference, output   how often, where it is given, it holds the truth: of the metric, of the difference of
            two heads, and of the worst single output
    percentile   how often the percentile bootstrap over videos would, on the same sets

``mix`` is the concentration of a video's mix: at 1.5 a class of two frames in a hundred is in one video of twenty.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from affcache.scoring.intervals import FEWEST_VIDEOS, metric_interval
from affcache.tasks.metrics import Interval, Table
from affcache.tasks.tasks import TASKS
from benchmarks.shared import script_parser

EXPR = np.array([177_198, 16_573, 10_771, 9_080, 95_463, 78_751, 31_615, 165_866]) / 585_317  # Aff-Wild2's training
EXPR_SKILL = np.array([0.6, -0.6, -0.8, -1.0, 0.5, 0.2, -0.2, 0.1])  # log-odds of a class recognised
AU = np.array([0.12, 0.05, 0.16, 0.26, 0.40, 0.34, 0.24, 0.03, 0.03, 0.025, 0.63, 0.08])  # unequal, like Aff-Wild2's
FRAMES_ALIKE = 20  # that follow one another and are counted as one
VIDEOS = (3, 5, 10, 19, 40, 70)
POPULATION = 200_000
RESAMPLES = 400

# a generator, G, and the concentration of a video's mix -> (G, C, S) of two heads on the same videos
Draw = Callable[[np.random.Generator, int, float], tuple[Table, Table]]


def drawn_expr(random: np.random.Generator, videos: int, mix: float) -> tuple[Table, Table]:
    """Return counts of G videos, decided by two heads."""
    shares = random.dirichlet(mix * EXPR, videos)  # (G, C)
    labelled = random.poisson(shares * _lengths(random, videos)[:, None])
    common = random.normal(0, 1.0, labelled.shape)
    return _expr_head(random, labelled, common), _expr_head(random, labelled, common + 0.25)


def _expr_head(random: np.random.Generator, labelled: npt.NDArray[np.int64], skill: Table) -> Table:
    recall = _sigmoid(EXPR_SKILL + skill + random.normal(0, 0.4, labelled.shape))  # (G, C)
    pull = np.exp(0.7 * np.log(EXPR) + random.normal(0, 0.8, labelled.shape))  # towards which class errors go
    decided = np.zeros(labelled.shape)
    right = np.zeros(labelled.shape)
    for one in range(len(EXPR)):
        others = pull.copy()
        others[:, one] = 0
        chances = others / others.sum(axis=1, keepdims=True) * (1 - recall[:, [one]])
        chances[:, one] = recall[:, one]
        found = random.multinomial(labelled[:, one], chances / chances.sum(axis=1, keepdims=True))  # (G, C)
        right[:, one] = found[:, one]
        decided += found
    return FRAMES_ALIKE * np.stack([right, decided, labelled], axis=-1)


def drawn_au(random: np.random.Generator, videos: int, mix: float) -> tuple[Table, Table]:
    """Return counts of G videos, decided by two heads."""
    rates = random.beta(mix * AU, mix * (1 - AU), (videos, len(AU)))
    frames = np.maximum(_lengths(random, videos).astype(int), 1)[:, None]
    present = random.binomial(frames, rates)
    hits, alarms = random.normal(0, 1.0, rates.shape), random.normal(0, 0.8, rates.shape)
    heads = []
    for skill in (0.3, 0.6):
        recall = _sigmoid(skill + hits + random.normal(0, 0.4, rates.shape))
        alarm = _sigmoid(0.6 * np.log(AU / (1 - AU)) - 1 + alarms + random.normal(0, 0.3, rates.shape))
        right, wrong = random.binomial(present, recall), random.binomial(frames - present, alarm)
        heads.append(FRAMES_ALIKE * np.stack([right, right + wrong, present], axis=-1).astype(np.float64))
    return heads[0], heads[1]


def drawn_va(random: np.random.Generator, videos: int, mix: float) -> tuple[Table, Table]:
    """Return moments of G videos, decided by two heads; ``mix`` has no say."""
    count = FRAMES_ALIKE * _lengths(random, videos)[:, None] * np.ones(2)
    mean, spread = random.normal([0.2, 0.25], [0.32, 0.2], (videos, 2)), 0.05 + random.gamma(2, 0.08, (videos, 2))
    bias = random.normal(0, 0.15, (videos, 2))
    heads = []
    for share in (1.0, 0.8):
        within = np.clip(random.normal(0.5, 0.25, (videos, 2)), -0.5, 0.95)  # correlation in a video
        own, narrow = 0.1 + 0.55 * mean + share * bias + random.normal(0, 0.08, (videos, 2)), 0.8 * spread
        products = (mean**2 + spread**2, own**2 + narrow**2, mean * own + within * spread * narrow)
        heads.append(np.stack([count, *(count * of for of in (mean, own, *products))], axis=-1))
    return heads[0], heads[1]


def _lengths(random: np.random.Generator, videos: int) -> Table:
    return np.maximum(random.lognormal(7.6, 0.8, videos), 50) / FRAMES_ALIKE


def _sigmoid(values: Table) -> Table:
    return 1 / (1 + np.exp(-values))


KINDS: dict[str, tuple[str, Draw, float]] = {
    "expr, mix 1.5": ("expr", drawn_expr, 1.5),
    "expr, mix 6": ("expr", drawn_expr, 6.0),
    "au, mix 1.5": ("au", drawn_au, 1.5),
    "au, mix 6": ("au", drawn_au, 6.0),
    "va": ("va", drawn_va, 0.0),
}


@dataclass(frozen=True)
class Truth:
    """What a whole population of videos gives."""

    value: float
    difference: float  # of the second head to the first
    outputs: Table  # (C,)

    @classmethod
    def of(cls, kind: str, videos: int = POPULATION) -> "Truth":
        """Return the metrics of many videos."""
        name, draw, mix = KINDS[kind]
        task = TASKS[name]
        first, second = (sums.sum(axis=0) for sums in draw(np.random.default_rng(1), videos, mix))
        value, other = float(task.metric_of(first)), float(task.metric_of(second))
        return cls(value, other - value, task.class_metric_of(first))


def coverage(kind: str, truth: Truth, videos: int, sets: int) -> dict[str, Any]:
    """Return how often intervals hold the truth over ``sets`` sets of so many videos; None where none is given."""
    name, draw, mix = KINDS[kind]
    task, random = TASKS[name], np.random.default_rng(videos)
    value: list[bool] = []
    difference: list[bool] = []
    percentile: list[bool] = []
    outputs: list[list[bool]] = [[] for _ in task.classes]
    for _ in range(sets):
        first, second = draw(random, videos, mix)
        _note(value, metric_interval(task, [first]), truth.value)
        _note(difference, metric_interval(task, [second], [first]), truth.difference)
        for output, noted in enumerate(outputs):
            _note(noted, metric_interval(task, [first], outputs=[output]), float(truth.outputs[output]))
        times = random.multinomial(videos, np.full(videos, 1 / videos), size=RESAMPLES)
        low, high = np.quantile(task.metric_of(np.tensordot(times, first, axes=1)), [0.025, 0.975])
        percentile.append(low <= truth.value <= high)
    return {
        "kind": kind, "videos": videos, "given": len(value) / sets, "value": _share(value),
        "difference": _share(difference), "percentile": _share(percentile),
        "output": min((sum(noted) / len(noted) for noted in outputs if len(noted) > sets / 10), default=None),
    }  # fmt: skip


def _note(noted: list[bool], found: Interval, truth: float) -> None:
    if found.bounds is not None:
        noted.append(found.bounds[0] <= truth <= found.bounds[1])


def _share(noted: list[bool]) -> float | None:
    return sum(noted) / len(noted) if noted else None


def main() -> None:
    """Print a line for each kind and number of videos."""
    parser = script_parser(__doc__)
    parser.add_argument("--sets", type=int, default=2000, help="sets of videos drawn for each line")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    given = parser.parse_args()
    truths = {kind: Truth.of(kind) for kind in KINDS}
    lines = [coverage(kind, truth, videos, given.sets) for kind, truth in truths.items() for videos in VIDEOS]
    if given.json:
        print(json.dumps({"sets": given.sets, "fewest_videos": FEWEST_VIDEOS, "coverage": lines}))
        return
    print(f"{'':14}{'videos':>7}{'given':>7}{'value':>7}{'difference':>12}{'output':>8}{'percentile':>12}")
    for line in lines:
        shares = [line[name] for name in ("given", "value", "difference", "output", "percentile")]
        texts = ["" if share is None else f"{share:.3f}" for share in shares]
        print(
            f"{line['kind']:14}{line['videos']:>7}{texts[0]:>7}{texts[1]:>7}{texts[2]:>12}{texts[3]:>8}{texts[4]:>12}"
        )


if __name__ == "__main__":
    main()

"""A submission as a whole: runs predict a test set's crops, gaps are filled, and the file is written and checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from affcache.crops.names import canonical
from affcache.errors import ConfigError, InputError
from affcache.files import write_text
from affcache.progress import Listener, Result, counted
from affcache.scoring.ensemble import Ensemble, open_runs
from affcache.scoring.postprocess import find_rule
from affcache.scoring.predict import Predictions, TrainedRun
from affcache.scoring.rule import DecisionRule
from affcache.scoring.together import rule_of_all, settings_of_each, whole_of
from affcache.settings import command
from affcache.store.frames import BESIDE, ENCODED
from affcache.submission.settings import SubmitSettings
from affcache.submission.template import LOCATION, Template, read_frame_counts, read_template
from affcache.tasks.challenge_file import HEADER
from affcache.tasks.label_sources import labels_of
from affcache.tasks.multitask import MultiTask
from affcache.tasks.task import Task
from affcache.tasks.tasks import TASKS, is_own


def header_of(task: Task) -> str:
    """Return the first line of a submission."""
    return HEADER if task.parts else f"{LOCATION},{task.header}"


def require_template_of(template: Template, task: Task) -> None:
    """Refuse a template whose header is another task's, or, for a task of one's own, that has none.

    So is a task of whole videos, and several tasks that aren't all that the multi-task challenge has.

    Raises:
        InputError: it is.
        ConfigError: its labels are of whole videos.
    """
    if task.level == "video":
        raise ConfigError(
            f"A submission has a line for each frame, and task {task.name} decides once for each video. Expected a run "
            "on labels of frames. 'affcache predict --store FILE' writes a table with a row a video."
        )
    _, _, expected = header_of(task).partition(",")
    if is_own(task) and not template.columns:
        raise InputError(
            f"The run is of {task.name}, a task of one's own, of which no challenge has a template. Expected one whose "
            f"header names its outputs, {LOCATION},{task.header}. Write such a header, or make a table of predictions "
            "with 'affcache predict'."
        )
    if template.columns and [name.lower() for name in template.columns] != expected.lower().split(","):
        raise InputError(
            f"The template's header names {', '.join(template.columns)[:80]}, but the run is of {task.name}. Expected "
            f"a template with {expected}, or one whose header names nothing but {LOCATION}. Take the run or the "
            "template of the other task."
        )
    every = TASKS["mtl"].parts
    if task.parts and len(task.parts) < len(every):
        lacking = [part.name for part in every if part.name not in {own.name for own in task.parts}]
        raise InputError(
            f"The multi-task challenge wants {', '.join(part.name for part in every)}, and the runs don't predict "
            f"{' and '.join(lacking)}. Expected all. Name a run of these too, with --run DIR."
        )


def write_submission(path: Path, template: Template, decided: npt.NDArray[Any], task: Task) -> None:
    """Write predictions (n,) or (n, values) for every frame of a template, under a temporary name that is renamed."""
    form = ",".join("{:.0f}" if np.dtype(of.label_dtype).kind == "i" else "{:.6f}" for of in _task_of_values(task))
    lines = [header_of(task)]
    for location, values in zip(template.locations, decided.reshape(len(template), -1).tolist(), strict=True):
        lines.append(f"{location},{form.format(*values)}")
    write_text(path, "\n".join(lines) + "\n")


def _task_of_values(task: Task) -> list[Task]:
    """Return for each value of a line the task that it is of."""
    return [part for part in task.parts or (task,) for _ in range(part.values_per_line)]


def check_submission(path: Path, template: Template, task: Task) -> None:
    """Read a submission and compare it with its template.

    Raises:
        InputError: another header, count of lines or order; a value that is missing or out of range.
    """
    header, *lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if header != header_of(task):
        raise InputError(f"{path} has the header {header[:80]!r}. Expected {header_of(task)!r}.")
    if len(lines) != len(template):
        raise InputError(
            f"{path} has {len(lines):,} lines after the header. Expected the template's {len(template):,}."
        )
    each = _task_of_values(task)
    limits = [of.valid_range for of in each]
    whole = [np.dtype(of.label_dtype).kind == "i" for of in each]
    for position, (line, location) in enumerate(zip(lines, template.locations, strict=True), start=2):
        found, *fields = line.split(",")
        try:
            values = [float(field) for field in fields]
        except ValueError:
            values = []
        right = len(values) == len(each) and all(
            low <= value <= high and (value.is_integer() or not is_whole)
            for value, (low, high), is_whole in zip(values, limits, whole, strict=True)
        )
        if found != location or not right:
            ranges = " and ".join(f"from {low:g} to {high:g}" for low, high in dict.fromkeys(limits))
            raise InputError(
                f"{path}, line {position}: {line[:80]!r}. Expected {location} with {len(limits)} values {ranges}."
            )


@dataclass(frozen=True)
class SubmitResult(Result):
    """What a submission holds."""

    out: str
    task: str
    runs: tuple[str, ...]
    lines: int  # after the header
    videos: int
    filled: int  # lines of frames without a crop, in videos that have some
    videos_without_crops: tuple[str, ...]  # all of their lines hold the mean over all other videos
    rule: DecisionRule  # what the rules of all tasks have in common
    rules: dict[str, DecisionRule]  # by task
    classes: dict[str, tuple[str, ...]]  # names of the outputs, by task


@command(SubmitSettings)
def submit(settings: SubmitSettings, listener: Listener) -> SubmitResult:
    """Write a submission file: a prediction for every line of a template, in its order.

    Probabilities of frames without a crop are interpolated between the nearest frames of the video, and repeated at
    its ends. The file is read back and compared with the template.

    Raises:
        InputError: no run; a template that can't be read; no video of it has crops in the store.
        StoreError: the store is of another encoder, incomplete or damaged.
        ConfigError: neither or both of template and frames are given, the output is there already, or a rule can't be
            fitted.
    """
    _require_said(settings)
    path = settings.template or settings.frames or Path()
    template = read_template(path) if settings.template else read_frame_counts(path)
    opened = open_runs(settings.run, settings.store, settings.device, listener)
    ensembles = Ensemble.of_each_task(opened, listener)
    task = whole_of(ensembles)
    require_template_of(template, task)
    each = [
        _decided(own, runs, template, path, listener)
        for own, runs in zip(settings_of_each(settings, opened, ensembles), ensembles, strict=True)
    ]
    if missing := list(dict.fromkeys(video for one in each for video in one.missing)):
        listener.warning(
            f"The template has {counted(len(missing), 'video')} without a crop in "
            f"{BESIDE.join(dict.fromkeys(str(runs.frames.path) for runs in ensembles))}: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}. Their lines hold the mean over all others."
        )
    said = [one.said for one in each]
    write_submission(settings.out, template, task.joined(said) if isinstance(task, MultiTask) else said[0], task)
    check_submission(settings.out, template, task)
    return SubmitResult(
        out=str(settings.out),
        task=task.name,
        runs=tuple(run.source for run in opened),
        lines=len(template),
        videos=len(set(template.videos)),
        filled=max(one.filled for one in each),
        videos_without_crops=tuple(missing),
        rule=rule_of_all([one.rule for one in each]),
        rules={runs.task.name: one.rule for runs, one in zip(ensembles, each, strict=True)},
        classes={runs.task.name: runs.task.classes for runs in ensembles},
    )


@dataclass(frozen=True)
class Decided:
    """What runs of one task say of a template's frames."""

    said: npt.NDArray[Any]  # (n,) or (n, C), in the form of label files
    filled: int  # of frames without a crop, in videos that have some
    missing: list[str]  # videos without any
    rule: DecisionRule


def _decided(settings: SubmitSettings, runs: Ensemble, template: Template, path: Path, listener: Listener) -> Decided:
    """Predict the frames of a template by runs of one task, and fill what has no crop."""
    task, frames = runs.task, runs.frames
    template = template.named_as(frames.known_names, path)
    on_training = runs
    if settings.fits_rules:
        _require_runs(runs.runs)
        trained = [TrainedRun.on_store(run.source, (), settings.device, Listener()) for run in runs.runs]
        of_task = [one for run in trained for one in run.by_task if one.task.name == task.name]
        on_training = Ensemble.of(of_task, listener)
    annotations = labels_of(task, runs.first.settings.annotations)
    rule = find_rule(settings, on_training, annotations, listener, reported="")
    wanted = np.isin([canonical(name) for name in frames.video_names], list(set(template.videos)))  # (V,)
    rows = np.flatnonzero(wanted[frames.video_of_rows()] & (np.asarray(frames.status) == ENCODED))
    if not len(rows):
        raise InputError(
            f"No video of the template has a crop in {frames.path}: the template has {template.videos[0]}, ..., the "
            f"store {frames.video_names[0]}, .... Expected the crops of the test videos. Extract them with 'affcache "
            "extract --crops DIR --store FILE'."
        )
    predictions = runs.predict(rows, settings.views, listener, rule.weights)
    filled, count, missing = fill_gaps(template, rule.apply(predictions, task))
    return Decided(rule.decide(filled, task), count, missing, rule)


def _require_said(settings: SubmitSettings) -> None:
    """Refuse what can't become a submission before anything is read; raises ConfigError."""
    if (settings.template is None) == (settings.frames is None):
        raise ConfigError(
            "Expected one of --template FILE, the organisers' list of frames, and --frames FILE, videos with their "
            "frame counts."
        )
    if not settings.store:
        raise ConfigError("Expected --store FILE: the embeddings of the test videos, which 'affcache extract' makes.")
    if settings.out.exists() and not settings.overwrite:
        raise ConfigError(
            f"{settings.out} is there already. Expected a new file, so that no submission or template is lost. Choose "
            "another with --out FILE, or say --overwrite."
        )


def _require_runs(runs: Sequence[TrainedRun]) -> None:
    """Refuse to fit rules for published heads; raises ConfigError."""
    if published := [run.source for run in runs if run.published]:
        raise ConfigError(
            f"A rule is to be fitted, but {published[0]} is a published head: it brings neither the store nor the "
            "labels that it was trained on. Expected a run folder. Leave out --decide fitted, --calibrate and "
            "--weights fitted, and say --smooth-width N with --smooth."
        )


def fill_gaps(template: Template, predictions: Predictions) -> tuple[npt.NDArray[np.float64], int, list[str]]:
    """Give every frame of a template probabilities.

    Args:
        template: n frames.
        predictions: of m frames.

    Returns:
        float64 (n, C); how many were filled in for want of a crop, in videos with crops; and the videos without any,
        whose frames have the mean over all that were predicted.
    """
    videos, starts, counts = np.unique(predictions.videos, return_index=True, return_counts=True)
    names = [canonical(predictions.frames.video_names[video]) for video in videos]
    rows = {name: slice(first, first + count) for name, first, count in zip(names, starts, counts, strict=True)}
    probabilities, frame_numbers = predictions.probabilities, predictions.frame_numbers
    found = np.empty((len(template), probabilities.shape[1]))
    lines: dict[str, list[int]] = {}
    for line, video in enumerate(template.videos):
        lines.setdefault(video, []).append(line)
    filled = 0
    for video, of_video in lines.items():
        wanted = template.frame_numbers[of_video]
        if video not in rows:
            found[of_video] = probabilities.mean(axis=0)
            continue
        known = frame_numbers[rows[video]]
        for column in range(found.shape[1]):
            found[of_video, column] = np.interp(wanted, known.astype(np.float64), probabilities[rows[video], column])
        filled += int((~np.isin(wanted, known)).sum())
    return found, filled, [video for video in lines if video not in rows]

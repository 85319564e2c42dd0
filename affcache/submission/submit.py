"""A submission as a whole: runs predict a test set's crops, gaps are filled, and the file is written and checked."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from affcache.crops.crop_list import parse_path
from affcache.crops.names import VideoNames, canonical, plain_path
from affcache.errors import ConfigError, InputError
from affcache.files import read_lines, write_text
from affcache.progress import Listener, Result, counted
from affcache.scoring.ensemble import Ensemble
from affcache.scoring.postprocess import find_rule
from affcache.scoring.predict import Predictions, TrainedRun
from affcache.scoring.rule import DecisionRule
from affcache.settings import command
from affcache.store.frames import ENCODED
from affcache.submission.settings import SubmitSettings
from affcache.tasks.kinds import Task

LOCATION = "image_location"
Frame = tuple[str, str, int]  # where it lies, its video, and its number there
LARGEST_TEMPLATE = 2**27  # bytes
MOST_FRAMES, MOST_DIGITS = 5_000_000, 9  # of a template: two days of video


@dataclass(frozen=True)
class Template:
    """The frames that a submission is of, in its order."""

    locations: list[str]  # as the organisers write them, such as 14-30-1920x1080/00001.jpg
    videos: list[str]  # (n,) canonical, with all folders before it until ``named_as`` knows better
    frame_numbers: npt.NDArray[np.int64]  # (n,)
    columns: tuple[str, ...] = ()  # what its header names after the location, if it has one that does

    def __len__(self) -> int:
        return len(self.locations)

    def named_as(self, names: Sequence[str], path: Path) -> "Template":
        """Return the template with the canonical names of known videos, found as ``VideoNames`` does.

        Raises:
            InputError: a line may be of several videos, or a frame comes twice; ``path`` is its file.
        """
        called = VideoNames(names).match(dict.fromkeys(self.videos), path)
        videos = [canonical(names[called[video]]) if video in called else video for video in self.videos]
        _require_once(path, videos, self.frame_numbers.tolist())
        return replace(self, videos=videos)


def read_template(path: Path) -> Template:
    """Read an organisers' template: the part of each line before its first comma; a header is skipped.

    Raises:
        InputError: the file can't be read, has no frame, a line is none, or a frame comes twice.
    """
    frames, columns = list[Frame](), tuple[str, ...]()
    for position, line in enumerate(_lines(path), start=1):
        location = line.partition(",")[0].strip()
        if position == 1 and (location == LOCATION or "/" not in location):
            columns = tuple(name.strip() for name in line.split(",")[1:] if name.strip())
            continue
        try:
            folder, _, number = parse_path(location)
        except ValueError:
            raise InputError(
                f"{path}, line {position}: {line[:80]!r} names no frame. Expected <video>/<frame number>.jpg before "
                "the first comma, as in the organisers' templates. Correct that line."
            ) from None
        frames.append((location, canonical(plain_path(folder)), number))
    return _template(path, frames, columns)


def require_template_of(template: Template, task: Task) -> None:
    """Refuse a template whose header is another task's, and a task that says nothing of frames.

    Raises:
        InputError: it is.
        ConfigError: its labels are of whole videos.
    """
    if task.level == "video":
        raise ConfigError(
            f"A submission has a line for each frame, and task {task.name} decides once for each video. Expected a run "
            "on labels of frames. 'affcache predict --store FILE' writes a table with a row a video."
        )
    if template.columns and [name.lower() for name in template.columns] != [name.lower() for name in task.classes]:
        raise InputError(
            f"The template's header names {', '.join(template.columns)[:80]}, but the run is of {task.name}. Expected "
            f"a template with {task.header}, or one whose header names nothing but {LOCATION}. Take the run or the "
            "template of the other task."
        )


def read_frame_counts(path: Path) -> Template:
    """Read a list of videos with their frame counts, ``video,count`` a line, as a template of all their frames.

    Raises:
        InputError: the file can't be read, has no video, or a line isn't of that form.
    """
    frames = list[Frame]()
    for position, line in enumerate(_lines(path), start=1):
        video, _, count = (part.strip() for part in line.replace("\t", ",").rpartition(","))
        if not video or "," in video or not (count.isascii() and count.isdigit()):
            if position == 1 and video and not any(letter.isdigit() for letter in count):
                continue  # a header
            raise InputError(
                f"{path}, line {position}: {line[:80]!r} is no video with its frame count. Expected video,count. "
                "Correct that line."
            )
        if len(count) > MOST_DIGITS or (every := range(1, int(count) + 1)).stop + len(frames) > MOST_FRAMES:
            raise InputError(
                f"{path}, line {position}: {line[:80]!r} makes more than {MOST_FRAMES:,} frames. Expected the "
                "number of frames that the video has. Correct that line."
            )
        frames += [(f"{video}/{number:05d}.jpg", canonical(video), number) for number in every]
    return _template(path, frames)


def write_submission(path: Path, template: Template, decided: npt.NDArray[Any], task: Task) -> None:
    """Write predictions (n,) or (n, C) for every frame of a template, under a temporary name that is then renamed."""
    form = "{:d}" if np.dtype(task.label_dtype).kind == "i" else "{:.6f}"
    lines = [f"{LOCATION},{task.header}"]
    for location, values in zip(template.locations, decided.reshape(len(template), -1).tolist(), strict=True):
        lines.append(",".join([location, *map(form.format, values)]))
    write_text(path, "\n".join(lines) + "\n")


def check_submission(path: Path, template: Template, task: Task) -> None:
    """Read a submission and compare it with its template.

    Raises:
        InputError: another header, count of lines or order; a value that is missing or out of range.
    """
    header, *lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if header != f"{LOCATION},{task.header}":
        raise InputError(f"{path} has the header {header[:80]!r}. Expected '{LOCATION},{task.header}'.")
    if len(lines) != len(template):
        raise InputError(
            f"{path} has {len(lines):,} lines after the header. Expected the template's {len(template):,}."
        )
    low, high = task.valid_range
    for position, (line, location) in enumerate(zip(lines, template.locations, strict=True), start=2):
        found, *fields = line.split(",")
        try:
            values = [float(field) for field in fields]
        except ValueError:
            values = []
        right = len(values) == task.values_per_line and all(low <= value <= high for value in values)
        if found != location or not right:
            raise InputError(
                f"{path}, line {position}: {line[:80]!r}. Expected {location} with {task.values_per_line} values from "
                f"{low:g} to {high:g}."
            )


def _lines(path: Path) -> list[str]:
    try:
        lines = list(read_lines(path, LARGEST_TEMPLATE))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} can't be read: {reason}. Expected a text file, a frame or a video a line.") from None
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def _template(path: Path, frames: Sequence[Frame], columns: tuple[str, ...] = ()) -> Template:
    if not frames:
        raise InputError(f"{path} names no frame. Expected a line for each, such as 14-30-1920x1080/00001.jpg,")
    locations, videos, numbers = map(list, zip(*frames, strict=True))
    _require_once(path, videos, numbers)
    return Template(locations, videos, np.array(numbers, dtype=np.int64), columns)


def _require_once(path: Path, videos: Sequence[str], numbers: Sequence[int]) -> None:
    (video, number), times = Counter(zip(videos, numbers, strict=True)).most_common(1)[0]
    if times > 1:
        raise InputError(
            f"{path} names frame {number} of {video} twice. Expected every frame once. Remove the second line."
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
    rule: DecisionRule


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
    runs = Ensemble.open(settings.run, settings.store, settings.device, listener)
    task, frames = runs.task, runs.frames
    require_template_of(template, task)
    template = template.named_as(frames.known_names, path)
    on_training = runs
    if settings.fits_rules:
        _require_runs(runs.runs)
        own = [TrainedRun.on_store(run.source, (), settings.device, Listener()) for run in runs.runs]
        on_training = Ensemble.of(own, listener)
    rule = find_rule(settings, on_training, runs.first.settings.annotations, listener, reported="")
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
    if missing:
        listener.warning(
            f"The template has {counted(len(missing), 'video')} without a crop in {frames.path}: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. Their lines hold the mean over all others."
        )
    write_submission(settings.out, template, rule.decide(filled, task), task)
    check_submission(settings.out, template, task)
    return SubmitResult(
        out=str(settings.out),
        task=task.name,
        runs=tuple(run.source for run in runs.runs),
        lines=len(template),
        videos=len(set(template.videos)),
        filled=count,
        videos_without_crops=tuple(missing),
        rule=rule,
    )


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

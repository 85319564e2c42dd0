"""Labels joined to the rows of a store, by video and frame number."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from affcache.crops.names import VideoNames, canonical
from affcache.errors import ConfigError, InputError
from affcache.progress import Listener, Result, counted
from affcache.store.frames import ABSENT, ENCODED, FrameIndex
from affcache.store.reading import EmbeddingStore
from affcache.tasks.label_files import LabelSource, UnlabelledSplit, VideoLabels
from affcache.tasks.label_sources import find_labels, labels_of
from affcache.tasks.multitask import MultiTask
from affcache.tasks.task import Task
from affcache.tasks.tasks import find_task

PARTIAL = ("keep", "drop")  # what becomes of frames that are labelled in part


@dataclass(frozen=True)
class JoinAccount(Result):
    """How many frames a join used and left out, and why. Every count is in frames unless it says otherwise."""

    used: int = 0
    no_crop: int = 0  # valid labels whose frame has no crop in the store
    no_label: int = 0  # crops of labelled videos past the last line of the label file
    invalid_label: int = 0  # crops whose label is marked invalid
    unreadable_crop: int = 0  # valid labels whose crop could not be read
    partial: int = 0  # frames used of which some units or values have no label
    dropped: int = 0  # crops that are labelled in part, where such don't count
    from_zero: int = 0  # videos whose labels begin at frame 0, and their crops later: they may be shifted by one
    repeated: int = 0  # labels of a frame that had one before, which counts
    label_files: int = 0
    videos_without_crops: tuple[str, ...] = ()  # label files of videos that the store doesn't have
    test_rows: int = 0  # rows of a table that are of no split here

    def to_json(self) -> dict[str, Any]:
        """Return the account as one JSON object, as before there were such labels where there are none."""
        later = ("partial", "dropped", "from_zero", "repeated", "test_rows")
        own = {name: value for name, value in super().to_json().items() if name != "videos"}
        return {name: value for name, value in own.items() if value or name not in later}

    def sentence(self, split: str, unit: str = "frame") -> str:
        """Say the account in one line; of whole videos, ``unit`` is video."""
        crop = "crop" if unit == "frame" else unit
        left_out = (
            (self.no_crop, "label", f" without a {crop}"),
            (self.no_label, "crop", " without a label"),
            (self.invalid_label, "invalid label", ""),
            (self.dropped, crop, " labelled in part"),
            (self.unreadable_crop, f"unreadable {crop}", ""),
            (self.repeated, "further label", " of a frame that has one"),
            (self.test_rows, "test row", ""),
        )
        words = ", ".join(counted(count, what) + why for count, what, why in left_out if count)
        videos = len(self.videos_without_crops)
        if videos:
            words += f"{', ' if words else ''}{counted(videos, 'label file')} of videos not in the store"
            words += f" ({', '.join(self.videos_without_crops[:3])}{', ...' if videos > 3 else ''})"
        used = counted(self.used, unit)
        if unit == "frame":
            used += f" of {counted(self.label_files - videos, 'video')}"
        used += f", {self.partial:,} of them labelled in part" if self.partial else ""
        account = f"{split}: {used}; left out: {words or 'nothing'}"
        if not self.from_zero:
            return account
        return (
            f"{account}. Labels of {counted(self.from_zero, 'video')} begin at frame 0, crops later: are they shifted?"
        )


@dataclass(frozen=True)
class JoinedLabels:
    """Labels joined to store rows: entry i of every array belongs to the same frame. Rows rise."""

    rows: npt.NDArray[np.int64]  # (n,) rows of the store
    labels: npt.NDArray[Any]  # (n,) class indices, or (n, C) values: 0 and 1, or decimals
    account: JoinAccount
    folds: Mapping[str, str] = field(default_factory=dict)  # by the store's name of a video, where the labels say them

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, chosen: npt.NDArray[np.bool_]) -> "JoinedLabels":
        """Return some of the frames, by whether (n,) each is."""
        account = replace(self.account, used=int(chosen.sum()))
        return replace(self, rows=self.rows[chosen], labels=self.labels[chosen], account=account)

    def to_json(self) -> dict[str, Any]:
        """Return the account, and a sha256 over rows and labels to recognise them by, as one JSON object."""
        digest = hashlib.sha256(self.rows.tobytes() + self.labels.tobytes()).hexdigest()
        return {**self.account.to_json(), "sha256": digest}


def join_labels(
    store: FrameIndex | Path | str, annotations: Path | str | None, task: Task | str, split: str, partial: str = "keep"
) -> JoinedLabels:
    """Join the labels of a split, train or validation, to the rows of a store by (video, frame number).

    Line i of a label file (the header is line 0) belongs to frame number i, never to the i-th crop. Which video a label
    file is of, ``VideoNames`` says. ``store.read(joined.rows)`` has the embeddings (n, D) of ``joined.labels``, and
    ``store.video_of_rows()[joined.rows]`` the videos (n,), which a split must keep together.

    Args:
        store: an ``EmbeddingStore``, or the path of one that is complete.
        annotations: the folder with the labels, or a table; None for where ``fit`` looks.
        task: a ``Task``, or the name of one in ``TASKS``.
        split: train or validation.
        partial: what becomes of frames that some units or values of the task are labelled of: with "keep" those count,
            with "drop" such frames have no label.

    Raises:
        InputError: no such task or split; label files that can't be read or may be of several videos, or none that
            belongs to a crop of the store.
        StoreError: there is no store at that path, or it is incomplete or damaged.
    """
    store, task = _opened(store), _found(task)
    if partial not in PARTIAL:
        raise InputError(f"There is no partial {partial!r}. Expected {' or '.join(PARTIAL)}.")
    source = find_labels(labels_of(task, annotations if annotations is None else Path(annotations)), task, split)
    video_index = _videos_of_labels(source, store)
    rows: list[npt.NDArray[np.int64]] = []
    labels: list[npt.NDArray[Any]] = []
    counts: Counter[str] = Counter(used=0)
    missing: list[str] = []
    for name in source.videos:
        of_video = source.read(name)
        in_part = np.zeros(len(of_video.valid), dtype=bool)
        if partial == "drop" and of_video.labels.ndim == 2:
            in_part = of_video.valid & ~task.labelled(of_video.labels).all(axis=1)
        counts["repeated"] += of_video.repeated
        if name not in video_index:
            missing.append(name)
            counts["no_crop"] += int((of_video.valid & ~in_part).sum())
            continue
        first, last = store.video_start[video_index[name] : video_index[name] + 2]
        used, entry = _join_video(store, slice(first, last), of_video, in_part, counts)
        rows.append(first + used)
        labels.append(of_video.labels[entry])
        if labels[-1].ndim == 2:
            counts["partial"] += int((~task.labelled(labels[-1]).all(axis=1)).sum())
    counts |= {"label_files": len(source.videos), "test_rows": source.test_rows}
    account = JoinAccount(**counts, videos_without_crops=tuple(missing))
    if not counts["used"]:
        raise UnlabelledSplit(
            f"No {split} label of task {task.name} belongs to a crop of {store.path}. "
            f"{account.sentence(split, store.unit)}. "
            f"The labels are of videos like {next(iter(source.videos))!r}, the crops of videos like "
            f"{store.video_names[0]!r}: expected the same names. Point --store and --annotations at the same data."
        )
    order = np.argsort(np.concatenate(rows), kind="stable")
    said = (source.folds or {}).items()
    folds = {store.video_names[video_index[name]]: fold for name, fold in said if name in video_index}
    return JoinedLabels(np.concatenate(rows)[order], np.concatenate(labels)[order], account, folds)


def _join_video(
    store: FrameIndex, rows: slice, of_video: VideoLabels, in_part: npt.NDArray[np.bool_], counts: "Counter[str]"
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return which of a video's rows have a label and an embedding (m,), and where the label stands; count the rest."""
    numbers = store.frame_number[rows]
    entry = _entries(of_video.frame_numbers, numbers)  # (n,) of each crop's label
    there, valid = entry != ABSENT, of_video.valid & ~in_part
    is_valid, is_dropped = (np.zeros(len(entry), dtype=bool) for _ in range(2))
    is_valid[there], is_dropped[there] = valid[entry[there]], in_part[entry[there]]
    used = is_valid & (store.status[rows] == ENCODED)
    labelled = of_video.frame_numbers
    if labelled is not None and len(labelled) and len(numbers) and labelled.min() == 0 < numbers.min():
        counts["from_zero"] += 1
    counts["used"] += int(used.sum())
    counts["no_crop"] += max(int(valid.sum() - is_valid.sum()), 0)  # a video's one label has many crops
    counts["dropped"] += int(is_dropped.sum())
    counts["no_label"] += int((~there).sum())
    counts["invalid_label"] += int((there & ~is_valid & ~is_dropped).sum())
    counts["unreadable_crop"] += int((is_valid & ~used).sum())
    return np.flatnonzero(used), entry[used]


def _opened(store: Any) -> FrameIndex:
    """Return a store that is given, or open that of a path."""
    if isinstance(store, FrameIndex):
        return store
    if not isinstance(store, (str, Path)):
        raise InputError(
            f"The store is a {type(store).__name__}. Expected an EmbeddingStore, or the path of one. Open it with "
            "EmbeddingStore.open(path)."
        )
    opened = EmbeddingStore.open(store)
    opened.require_complete()
    return opened


def _found(task: Any) -> Task:
    """Return a task that is given, or that of a name: this one is no flag's."""
    if isinstance(task, Task):
        return task
    try:
        return find_task(str(task))
    except ConfigError as error:
        raise InputError(str(error).removeprefix("--")) from None


def labelled_parts(
    task: MultiTask, splits: Sequence[JoinedLabels], listener: Listener
) -> tuple[MultiTask, list[JoinedLabels]]:
    """Leave out those of several tasks that one of the splits has no label of, and the frames without any other.

    Raises:
        InputError: no task is left.
    """
    each = [[of.labelled(own).any() for of, own in zip(task.parts, task.split(s.labels), strict=True)] for s in splits]
    kept = [part.name for part, *there in zip(task.parts, *each, strict=True) if all(there)]
    without = [part.name for part in task.parts if part.name not in kept]
    if not kept:
        raise InputError(
            f"None of the tasks {', '.join(without)} is labelled in all splits. Expected labels of one in train and in "
            "validation. Point --annotations at both files of the multi-task challenge."
        )
    if not without:
        return task, list(splits)
    listener.warning(
        f"Not labelled in {'both splits' if len(splits) > 1 else 'either split'}, and so neither trained nor scored: "
        f"{', '.join(without)}. {task.name} is {', '.join(kept)} here"
    )
    return task.only(kept), [_of_parts(task, one, kept) for one in splits]


def of_part(task: MultiTask, joined: JoinedLabels, name: str) -> JoinedLabels:
    """Return the labels of one of several tasks, in its own form, of the frames that have any."""
    part, own = next(
        (part, own) for part, own in zip(task.parts, task.split(joined.labels), strict=True) if part.name == name
    )
    labelled = part.labelled(own).reshape(len(own), -1)
    some = labelled.any(axis=1)
    account = replace(
        joined.account,
        used=int(some.sum()),
        invalid_label=joined.account.invalid_label + int((~some).sum()),
        partial=int((~labelled[some].all(axis=1)).sum()),
    )
    return JoinedLabels(joined.rows[some], own[some], account, joined.folds)


def _of_parts(task: MultiTask, joined: JoinedLabels, kept: Sequence[str]) -> JoinedLabels:
    """Return the labels of some of several tasks, of the frames that have any."""
    fewer = task.only(kept)
    each = zip(task.parts, task.split(joined.labels), strict=True)
    labels = fewer.joined([own for part, own in each if part.name in kept])
    labelled = fewer.labelled(labels)
    some = labelled.any(axis=1)
    left_out = joined.account.invalid_label + int((~some).sum())
    partial = int((~labelled[some].all(axis=1)).sum())
    account = replace(joined.account, used=int(some.sum()), invalid_label=left_out, partial=partial)
    return JoinedLabels(joined.rows[some], labels[some], account)


def unlabelled(task: Task, joined: JoinedLabels) -> list[str]:
    """Return the classes, units or values that no frame is labelled with."""
    sums = task.sums_by_video(joined.labels, joined.labels, np.zeros(len(joined), np.int64), 1)
    counts = task.videos_of_outputs(sums).tolist()
    return [name for name, count in zip(task.classes, counts, strict=True) if not count]


def require_learnable(task: Task, train: JoinedLabels, validation: JoinedLabels) -> None:
    """Refuse classes or units that validation has and train never shows; raises InputError."""
    never = unlabelled(task, validation)
    if missing := [name for name in unlabelled(task, train) if name not in never]:
        raise InputError(
            f"Validation frames are labelled {', '.join(missing)}, and no training frame is: what is never shown can't "
            f"be learnt. Expected each of the names of task {task.name} in the split train. Move a video there, or "
            "leave that name out of the task and of the labels."
        )


def _entries(labelled: npt.NDArray[np.int64] | None, wanted: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Return where each wanted frame number (n,) stands among the labelled ones (L,), or ``ABSENT``."""
    if labelled is None:
        return np.zeros(len(wanted), np.int64)
    if not len(labelled):
        return np.full(len(wanted), ABSENT)
    order = labelled.argsort(kind="stable")
    place = np.searchsorted(labelled, wanted, sorter=order).clip(max=len(labelled) - 1)
    entry = order[place]
    return np.where(labelled[entry] == wanted, entry, ABSENT)


def _videos_of_labels(source: LabelSource, store: FrameIndex) -> dict[str, int]:
    """Return which video of a store each labelled one is; of several of one video, the one with its whole name is.

    Raises:
        InputError: none has, or a labelled name may be of several videos.
    """
    called: dict[int, list[str]] = {}
    for name, video in VideoNames(store.known_names).match(source.videos, source.where).items():
        if video < len(store.video_names):
            called.setdefault(video, []).append(name)
    chosen = {}
    for video, names in called.items():
        whole = [name for name in names if name == canonical(store.video_names[video])]
        if len(names) > 1 and not whole:
            raise InputError(
                f"{source.where}: {' and '.join(names)} are both labels of the video {store.video_names[video]}. "
                "Expected one. Remove the others."
            )
        chosen[(whole or names)[0]] = video
    return chosen

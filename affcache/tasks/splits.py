"""Which frames belong together, and which are held out: whole videos, the persons of a video never apart."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from affcache.crops.names import canonical
from affcache.errors import InputError
from affcache.progress import Listener, counted
from affcache.store.frames import FrameIndex
from affcache.tasks.annotations import JoinAccount, JoinedLabels, join_labels
from affcache.tasks.kinds import Task
from affcache.tasks.label_files import SPLIT_FOLDERS, UnlabelledSplit

PERSONS = ("_left", "_right")  # ends of names where a video shows two persons


def stripped_name(video: str) -> str:
    """Return a video's name without the mark of a person: two crops of one video were filmed together."""
    video = canonical(video)
    for person in PERSONS:
        video = video.removesuffix(person)
    return video


def group_frames(store: FrameIndex, joined: JoinedLabels) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Return the names (G) of the videos that joined frames are of, sorted, and the number of each frame's (n,)."""
    names = np.array([stripped_name(name) for name in store.video_names])
    found, group = np.unique(names[store.video_of_rows()[joined.rows]], return_inverse=True)
    return found.tolist(), group.astype(np.int64)


def hold_out(store: FrameIndex, joined: JoinedLabels, share: float) -> tuple[JoinedLabels, list[str]]:
    """Set about ``share`` of the videos aside: return the frames of the others, and the names of those set aside.

    A video is set aside or not by its own name alone, a hash of it: whatever other videos a store or a label folder has
    or lacks. Only where that would leave none, or none of the others, the nearest one changes sides.

    Raises:
        InputError: the frames are of one video.
    """
    names, _ = group_frames(store, joined)
    if len(names) < 2:
        raise InputError(
            f"All training frames are of one video, {names[0]}: none can be held out. Expected at least 2 videos. "
            "Choose on validation with --select validation, or train on more videos."
        )
    digests = [hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in names]
    lots = np.array([int.from_bytes(digest[:8], "big") / 2**64 for digest in digests])  # (G,) in [0, 1)
    held = lots < np.clip(share, np.nextafter(lots.min(), 1), lots.max())
    aside = [name for name, is_held in zip(names, held, strict=True) if is_held]
    return of_videos(store, joined, aside, without=True), aside


def of_videos(store: FrameIndex, joined: JoinedLabels, names: Sequence[str], *, without: bool = False) -> JoinedLabels:
    """Return the frames of videos, named as ``group_frames`` does; or all others."""
    known, group = group_frames(store, joined)
    return joined.at(np.isin(known, list(names))[group] != without)


def join_either(
    store: FrameIndex, annotations: Path, task: Task, partial: str, listener: Listener
) -> tuple[JoinedLabels, JoinedLabels]:
    """Join the labels of train and of validation, of which one may have none: what is there is all there is.

    Raises:
        InputError: as ``join_labels``, or neither has any.
    """
    found: dict[str, JoinedLabels] = {}
    lacking: dict[str, UnlabelledSplit] = {}
    for split in SPLIT_FOLDERS:
        try:
            found[split] = join_labels(store, annotations, task, split, partial)
        except UnlabelledSplit as error:
            lacking[split] = error
    if not found:
        raise lacking["train"]
    (other, joined), *_ = found.items()
    for split, why in lacking.items():
        listener.warning(f"{str(why).partition('. ')[0]}: all labelled {store.unit}s are those of {other}")
        found[split] = JoinedLabels(joined.rows[:0], joined.labels[:0], JoinAccount())
    return found["train"], found["validation"]


def unite(store: FrameIndex, train: JoinedLabels, validation: JoinedLabels) -> JoinedLabels:
    """Return the labelled frames of both splits; one that is in both counts once.

    Raises:
        InputError: a frame has another label in each.
    """
    rows = np.concatenate([train.rows, validation.rows])
    order = np.argsort(rows, kind="stable")
    rows, labels = rows[order], np.concatenate([train.labels, validation.labels])[order]
    twice = 1 + np.flatnonzero(rows[1:] == rows[:-1])
    first, second = labels[twice - 1], labels[twice]
    differ = (first != second) & ~((first != first) & (second != second))  # nan is nan's like
    differ = differ.any(axis=tuple(range(1, differ.ndim)))
    if differ.any():
        row = int(rows[twice[differ][0]])
        raise InputError(
            f"{counted(int(differ.sum()), 'frame')} in both splits with different labels, the first is frame "
            f"{store.frame_number[row]} of {store.video_names[store.video_of_rows()[row]]}. Expected one label of a "
            "frame. Correct the labels of one split, or remove them there."
        )
    accounts = [vars(joined.account) for joined in (train, validation)]
    counts = {name: value + accounts[1][name] for name, value in accounts[0].items()}
    rows, labels = np.delete(rows, twice), np.delete(labels, twice, axis=0)
    account = JoinAccount(**{**counts, "used": len(rows)})
    return JoinedLabels(rows, labels, account, {**train.folds, **validation.folds})

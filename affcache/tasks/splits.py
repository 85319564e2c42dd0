"""Which frames belong together, are held out, or are a fold: whole videos, the persons of a video never apart."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from affcache.crops.names import canonical
from affcache.errors import ConfigError, InputError
from affcache.progress import Listener, counted
from affcache.store.frames import FrameIndex
from affcache.tasks.annotations import JoinAccount, JoinedLabels, join_labels
from affcache.tasks.label_files import SPLIT_FOLDERS, UnlabelledSplit
from affcache.tasks.metrics import Table
from affcache.tasks.task import Task

PERSONS = ("_left", "_right")  # ends of names where a video shows two persons
FoldOf = npt.NDArray[np.int64]


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


def find_folds(store: FrameIndex, task: Task, joined: JoinedLabels, count: int, by: str, listener: Listener) -> FoldOf:
    """Return the fold (n,) of each joined frame, from 0: what the labels say, else as ``deal_out`` has them.

    Args:
        store: has the frames.
        task: says what is to be alike between folds.
        joined: all labelled frames.
        count: K, how many folds.
        by: what stays together: a "video", persons of it among that, or a "folder", the first part of a nested name.
        listener: is warned of folders in several folds.

    Raises:
        ConfigError: there are fewer videos or folders than folds, or the labels say another number of folds.
        InputError: the labels say no fold for a video, or several for one.
    """
    names, group = group_frames(store, joined)  # (G,), (n,)
    if joined.folds:
        fold_of = _said(names, joined.folds, count)
    else:
        kept = [name.partition("/")[0] if by == "folder" else name for name in names]
        together, part = np.unique(kept, return_inverse=True)  # (P,), (G,)
        if count > len(together):
            raise ConfigError(
                f"--folds is {count}, but the labelled frames are of {counted(len(together), by)}. Expected at most as "
                f"many folds, since a {by} is never in two. Lower --folds, or label more of them."
            )
        sums = task.sums_by_video(joined.labels, joined.labels, part[group], len(together))  # (P, C, S)
        fold_of = deal_out(sums, np.bincount(part[group]), count)[part]
    _warn_of_folders(names, fold_of, listener)
    return fold_of[group]


def deal_out(sums: Table, frames: npt.NDArray[np.int64], count: int) -> FoldOf:
    """Deal groups out to folds that are alike: return the fold (G,) of each, from 0. No fold is empty.

    Greedily, as scikit-learn's StratifiedGroupKFold does, which knows one class a frame alone: groups come in the order
    of how unequal their sums are, the most unequal first; each goes where the folds' shares of all sums then
    differ least, and where that is the same, to the fold with the fewest frames.

    Args:
        sums: (G, C, S) over the frames of each group, G at least ``count``; as ``Task.sums_by_video`` has them for
            labels against themselves: of classes and units how often each is present, of values their moments.
        frames: (G,) of each group.
        count: K.
    """
    table = sums.reshape(len(sums), -1)  # (G, F)
    total = np.abs(table).sum(axis=0)
    shares = table / np.where(total > 0, total, 1)
    fold_of = np.empty(len(table), np.int64)
    held, sizes = np.zeros((count, shares.shape[1])), np.zeros(count, np.int64)
    order = np.argsort(-table.std(axis=1), kind="stable")
    for place, group in enumerate(order):
        own = shares[group]  # (F,)
        apart = held - (held.sum(axis=0) + own) / count  # (K, F): from the mean, which is the same of each choice
        squares = (apart**2).sum(axis=0) + own * (2 * apart + own)  # (K, F): of each choice, over all folds
        spread = np.sqrt(squares.clip(min=0) / count).mean(axis=1)  # (K,)
        if len(order) - place <= (empty := sizes == 0).sum():
            spread[~empty] = np.inf
        alike = np.flatnonzero(np.isclose(spread, spread.min(), atol=0))
        fold = alike[sizes[alike].argmin()]
        fold_of[group] = fold
        held[fold] += shares[group]
        sizes[fold] += frames[group]
    return fold_of


def _said(names: Sequence[str], folds: Mapping[str, str], count: int) -> FoldOf:
    """Return the folds that the labels say for videos, numbered in the order of their names."""
    said: dict[str, set[str]] = {}
    for video, fold in folds.items():
        said.setdefault(stripped_name(video), set()).add(fold)
    for name in names:
        if len(found := said.get(name, set())) != 1:
            words = f"the folds {' and '.join(sorted(found))}" if found else "no fold"
            raise InputError(
                f"The labels say {words} for the video {name}, all persons of it taken together. Expected one. Correct "
                "the column fold, or leave it out and let --folds deal videos out."
            )
    known = sorted({fold for name in names for fold in said[name]}, key=lambda fold: (len(fold), fold))  # 2 before 10
    if len(known) != count:
        raise ConfigError(
            f"--folds is {count}, but the labels say {counted(len(known), 'fold')}: {', '.join(known[:8])}. Expected "
            f"--folds {len(known)}, or labels without a column fold."
        )
    return np.array([known.index(next(iter(said[name]))) for name in names], np.int64)


def _warn_of_folders(names: Sequence[str], fold_of: FoldOf, listener: Listener) -> None:
    """Warn where folders, which may each be a person, are in several folds."""
    folds: dict[str, set[int]] = {}
    for name, fold in zip(names, fold_of.tolist(), strict=True):
        if "/" in name:
            folds.setdefault(name.partition("/")[0], set()).add(fold)
    if several := sorted(name for name, found in folds.items() if len(found) > 1):
        listener.warning(
            f"Videos of {counted(len(several), 'folder')}, such as {several[0]}, are in several folds. Where a folder "
            "is a person, the scores flatter: keep folders together with --fold-by folder."
        )

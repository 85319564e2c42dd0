"""Folds of cross-validation: videos dealt out so that the folds are alike, the persons of a video never apart."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from affcache.errors import ConfigError, InputError
from affcache.progress import Listener, counted
from affcache.store.frames import FrameIndex
from affcache.tasks.annotations import JoinedLabels
from affcache.tasks.kinds import Task
from affcache.tasks.metrics import Table
from affcache.tasks.splits import group_frames, stripped_name

FoldOf = npt.NDArray[np.int64]


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

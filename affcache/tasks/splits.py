"""Which frames belong together: those of a video, whichever person in it they show."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from affcache.errors import InputError
from affcache.store.reading import EmbeddingStore
from affcache.tasks.annotations import JoinedLabels

PERSONS = ("_left", "_right")  # ends of names where a video shows two persons


def stripped_name(video: str) -> str:
    """Return a video's name without the mark of a person: two crops of one video were filmed together."""
    for person in PERSONS:
        video = video.removesuffix(person)
    return video


def group_frames(store: EmbeddingStore, joined: JoinedLabels) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Return the names (G) of the videos that joined frames are of, sorted, and the number of each frame's (n,)."""
    names = np.array([stripped_name(name) for name in store.video_names])
    found, group = np.unique(names[store.video_of_rows()[joined.rows]], return_inverse=True)
    return found.tolist(), group.astype(np.int64)


def hold_out(store: EmbeddingStore, joined: JoinedLabels, share: float) -> tuple[JoinedLabels, JoinedLabels]:
    """Split joined frames in two by whole videos: the rest, and about ``share`` of the frames held out.

    Which videos is decided by their names alone, so that it is the same for every setting and store.

    Raises:
        InputError: the frames are of one video.
    """
    names, group = group_frames(store, joined)
    if len(names) < 2:
        raise InputError(
            f"All training frames are of one video, {names[0]}: none can be held out. Expected at least 2 videos. "
            "Choose on validation with --select validation, or train on more videos."
        )
    frames = np.bincount(group)
    order = np.random.default_rng(0).permutation(len(names))
    before = np.concatenate([[0], frames[order].cumsum()[:-1]])
    held = order[before < share * len(joined)][: len(names) - 1]  # until the share is reached, but never all
    chosen = np.isin(group, held)
    return _part(joined, ~chosen), _part(joined, chosen)


def _part(joined: JoinedLabels, chosen: npt.NDArray[Any]) -> JoinedLabels:
    account = replace(joined.account, used=int(chosen.sum()))
    return JoinedLabels(joined.rows[chosen], joined.labels[chosen], account)

"""Predictions of whole videos: the faces of a person in a video, or of a folder of crops, are said one thing of."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from affcache.errors import ConfigError
from affcache.faces.table import KEYS
from affcache.scoring.rule import require_frames_to_smooth
from affcache.scoring.trained import TrainedHead
from affcache.store.pooled import pool_frames
from affcache.tasks.task import Task

OF_VIDEOS = ("input", "face_id", "success")  # of the columns that every table has: what a row of a video keeps


def frame_values(trained: TrainedHead, embeddings: torch.Tensor) -> torch.Tensor:
    """Return what of each frame is kept until its video is known: logits (n, C), or embeddings (n, D) to be pooled."""
    return trained.logits(embeddings) if trained.pool == "none" else embeddings


def logits_of_persons(
    trained: TrainedHead, values: torch.Tensor, persons: npt.NDArray[np.int64], frames: npt.NDArray[np.integer]
) -> torch.Tensor:
    """Return the logits (n, C) of each face; where labels are of whole videos, those of the person it is of.

    Args:
        trained: the head.
        values: (n, ...), as ``frame_values`` returned them.
        persons: int (n,), whose faces they are in one video.
        frames: int (n,), the numbers of their frames.

    Raises:
        InputError: an embedding isn't finite.
    """
    if trained.task.level == "frame" or not len(persons):
        return values if len(persons) else torch.empty(0, trained.task.outputs)
    order = np.lexsort((frames, persons))
    names, person = np.unique(persons, return_inverse=True)
    ordered = values[torch.from_numpy(order)]
    if trained.pool == "none":
        return trained.task.logits_of_videos(ordered, persons[order])[torch.from_numpy(person)]
    starts = np.searchsorted(persons[order], names)
    each = [one.float().cpu().numpy() for one in ordered.tensor_split(torch.from_numpy(starts[1:]))]
    pooled = np.stack([pool_frames(one, trained.pool) for one in each])  # (V, inputs)
    return trained.logits(torch.from_numpy(pooled))[torch.from_numpy(person)]


def rows_of_videos(table: pa.Table) -> pa.Table:
    """Return a row for each person of each input, of a table in which all faces of a person are said the same of.

    What is of a frame is empty. An input without any face has a row without success.
    """
    inputs, persons, success = (table[name].to_pylist() for name in OF_VIDEOS)
    first: dict[tuple[str, int | None], int] = {}
    with_faces = {name for name, there in zip(inputs, success, strict=True) if there}
    for row, (name, person, there) in enumerate(zip(inputs, persons, success, strict=True)):
        if there or name not in with_faces:
            first.setdefault((name, person), row)
    found = table.take(pa.array(first.values(), pa.int64()))
    for name in KEYS.names:
        if name not in OF_VIDEOS:
            column = pa.nulls(len(found), KEYS.field(name).type)
            found = found.set_column(found.column_names.index(name), name, column)
    return found


def require_one_level(tasks: Sequence[Task], *, smooth: str, page: bool) -> None:
    """Refuse tasks of frames beside others of whole videos, and of these what is of frames; raises ConfigError."""
    levels = {task.level: task.name for task in tasks}
    if len(levels) > 1:
        raise ConfigError(
            f"Task {levels['frame']} is of frames, and task {levels['video']} of whole videos: a table has a row for "
            "one or the other. Expected runs of one kind. Predict with these runs one after the other."
        )
    for task in tasks:
        require_frames_to_smooth(smooth, task)
    if page and "video" in levels:
        raise ConfigError(
            f"--page shows frames one after the other, and task {levels['video']} says one thing of a whole video. "
            "Expected no --page. Leave it out."
        )

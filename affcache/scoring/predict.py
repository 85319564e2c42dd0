"""Trained heads beside the embeddings of their encoders, and what they predict of their rows."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch

from affcache.errors import ConfigError, InputError, StoreError
from affcache.files import write_bytes
from affcache.progress import Listener
from affcache.scoring.rule import DecisionRule
from affcache.scoring.trained import TrainedHead, encoder_name, said_elsewhere
from affcache.store.description import differing_fields
from affcache.store.frames import ENCODED, FrameIndex, Rows
from affcache.store.joined import AnyStore, join_stores
from affcache.store.pooled import PooledStore, RowStore
from affcache.store.prefetch import read_ahead
from affcache.store.reading import EmbeddingStore
from affcache.tasks.task import Task
from affcache.tasks.tasks import TASKS
from affcache.training.data import EVALUATION_BATCH
from affcache.training.run_folder import stores_of_run


@dataclass(frozen=True)
class TrainedRun(TrainedHead):
    """A trained head beside a store of its encoder, or beside those of all its encoders.

    Where its labels are of whole videos, the rows of the store are videos: pooled, or to be averaged over their frames.
    """

    store: RowStore

    @classmethod
    def on_store(cls, location: Path | str, given: Sequence[Path], device: str, listener: Listener) -> "TrainedRun":
        """Open a run on the stores it was trained on, which must not have changed, or a head on some of those given.

        Raises:
            InputError: this is neither a run folder nor a published head.
            StoreError: a store has changed since, is of another encoder or incomplete; or the head is damaged.
            ConfigError: the device isn't there, a published head has no store, or it isn't clear which is its.
        """
        trained = TrainedHead.open(location, device, listener)
        store = open_store(given, trained)
        if given and len(set(trained.encoder_fingerprints)) < len(trained.encoders):
            listener.message(f"{trained.source}, on several stores by one encoder, takes them as {store.path}")
        return cls(**vars(trained), store=store)

    def logits_of_rows(self, rows: Rows, view: str, on_done: Callable[[int], None]) -> torch.Tensor:
        """Return the head's logits (n, C) float32, on the CPU, for rows of the store, which rise within a video.

        Those of a video whose frames are averaged stand for the mean of their probabilities. ``on_done`` is told how
        many more rows are done, now and then.

        Raises:
            InputError: an embedding isn't finite.
            StoreError: there is no such view, or the file can't be read any more.
        """
        store = self.store if view == "plain" else self.store.view(view)
        if isinstance(store, PooledStore) and store.pool == "none":
            frames, videos = store.frames_of(rows)
            logits = self._logits_of_rows(store.source, frames, lambda done: None)
            on_done(len(rows))
            return self.task.logits_of_videos(logits, videos).float()
        return self._logits_of_rows(store, rows, on_done)

    def _logits_of_rows(self, store: RowStore, rows: Rows, on_done: Callable[[int], None]) -> torch.Tensor:
        groups = [rows[start : start + EVALUATION_BATCH] for start in range(0, len(rows), EVALUATION_BATCH)]
        found = [torch.empty(0, self.task.outputs)]
        for group, embeddings in zip(groups, read_ahead(store, groups, self.device), strict=True):
            found.append(self.logits_of_group(embeddings, partial(_row_name, store, group)))
            on_done(len(group))
        return torch.cat(found)


def _row_name(store: RowStore, rows: Rows, position: int) -> str:
    return f"row {int(rows[position]):,} of {store.path}"


def open_store(given: Sequence[Path], trained: TrainedHead) -> RowStore:
    """Open what to predict on: the run's own store, which must not have changed, or that of its encoder among some.

    Where labels are of whole videos, its rows are these. A head on embeddings of several encoders side by side has a
    store of each.

    Raises:
        StoreError: one has changed, is incomplete, or is of another encoder.
        ConfigError: a published head has no store, or several are of its encoder.
        InputError: stores that share no frame.
    """
    stores = _chosen(given, trained) if given else _own(trained)
    store: AnyStore = stores[0] if len(stores) == 1 else join_stores(stores)
    return PooledStore.of(store, trained.pool) if trained.task.level == "video" else store


def _own(trained: TrainedHead) -> list[EmbeddingStore]:
    """Return the stores that a run was trained on."""
    if trained.published:
        raise ConfigError(said_elsewhere(trained.source))
    run, stores = trained.folder.path, []
    for trained_on in stores_of_run(trained.config):
        path = Path(trained_on["path"])
        if not path.exists():
            raise StoreError(
                f"The store that run {run} was trained on is not at {path} any more. Say where it is with --store FILE."
            )
        store = _complete(path)
        if store.encoder_fingerprint != trained_on["encoder_fingerprint"]:
            raise _of_another(trained, trained_on["encoder"], store)
        if store.fingerprint() != trained_on["fingerprint"]:
            raise StoreError(
                f"The store {store.path} has changed since run {run} was trained on it: other crops or other "
                f"embeddings, of the same encoder. Score on it as it is now with --store {store.path}, or train again "
                "with 'affcache fit'."
            )
        stores.append(store)
    return stores


def _chosen(given: Sequence[Path], trained: TrainedHead) -> list[EmbeddingStore]:
    """Return, of some stores in any order, those of a head's encoders, in the order of these."""
    stores = {path: _complete(path) for path in given}.values()
    wanted, found = trained.encoder_fingerprints, []
    of_encoder = {one: [store for store in stores if store.encoder_fingerprint == one] for one in wanted}
    for number, one in enumerate(wanted):
        alike = of_encoder[one]
        if not alike:
            encoder = trained.encoders[number]
            if len(wanted) == len(stores) == 1:
                raise _of_another(trained, encoder, next(iter(stores)))
            held = ", ".join(f"{store.path} by {encoder_name(store.encoder)}" for store in stores)
            raise StoreError(
                f"{trained.source} needs embeddings by {encoder_name(encoder)}, and none of the stores holds them: "
                f"{held}. Expected one --store FILE for each encoder. Extract the same crops with that encoder, and "
                "name that store too."
            )
        if len(alike) != wanted.count(one):
            names = ", ".join(str(store.path) for store in alike)
            raise ConfigError(
                f"{trained.source} was trained on {wanted.count(one)} store by {encoder_name(trained.encoders[number])}"
                f", and {len(alike)} of those given are: {names}. Expected as many. Name fewer, or more, with --store."
            )
        found.append(_as_trained(trained, alike, wanted, number))
    if found and sum(store.width for store in found) != trained.width:
        raise _of_another(trained, trained.encoder, found[0])
    return found


def _as_trained(
    trained: TrainedHead, alike: Sequence[EmbeddingStore], wanted: Sequence[str], number: int
) -> EmbeddingStore:
    """Return which of the stores by one encoder stands at a place: the one it was trained on there, else as given."""
    places = [place for place, one in enumerate(wanted) if one == wanted[number]]
    if len(places) > 1 and not trained.published:
        own = [stores_of_run(trained.config)[place]["fingerprint"] for place in places]
        given = {store.fingerprint(): store for store in alike}
        if sorted(own) == sorted(given):
            return given[own[places.index(number)]]
    return alike[places.index(number)]


def _complete(path: Path) -> EmbeddingStore:
    store = EmbeddingStore.open(path)
    store.require_complete()
    return store


def _of_another(trained: TrainedHead, encoder: dict[str, Any], store: EmbeddingStore) -> StoreError:
    lines = "\n  ".join(differing_fields(encoder, store.encoder))
    return StoreError(
        f"Run {trained.folder.path} was trained on embeddings of another encoder than {store.path} holds. Expected the "
        f"same one; these differ (run against store):\n  {lines}\nScore with --store FILE and a store of the run's "
        "encoder, or train again with 'affcache fit'."
    )


@dataclass(frozen=True)
class Predictions:
    """Probabilities of n frames, in the order of their rows."""

    frames: FrameIndex
    rows: Rows  # (n,) rising
    probabilities: npt.NDArray[Any]  # (n, C) float32, or float64 where several are averaged
    logits: torch.Tensor  # (n, C): the head's own in float32, or in float64 those that the probabilities stand for

    def at(self, rows: Rows) -> "Predictions":
        """Return the predictions of some of the rows, which rise."""
        chosen = np.searchsorted(self.rows, rows)
        return replace(self, rows=rows, probabilities=self.probabilities[chosen], logits=self.logits[chosen])

    @property
    def videos(self) -> npt.NDArray[np.int64]:
        """Which video each frame is of, (n,)."""
        return self.frames.video_of_rows()[self.rows].astype(np.int64)

    @property
    def frame_numbers(self) -> npt.NDArray[np.int32]:
        """The number of each frame in its video, (n,)."""
        return np.asarray(self.frames.frame_number[self.rows])


@dataclass(frozen=True)
class FramesDecided:
    """What is said of n frames for a task, and how it was decided."""

    task: Task
    rule: DecisionRule
    frames: FrameIndex
    rows: Rows  # (n,) rising
    columns: Mapping[str, npt.NDArray[Any]]  # (n, ...) of these, by name


def write_predictions(
    path: Path, attributes: Mapping[str, Any], each: Sequence[FramesDecided], *, grouped: bool = False
) -> None:
    """Write what is said of frames, with the keys that find them again: docs/formats.md has the file.

    Args:
        path: where.
        attributes: of the file.
        each: what is said, of one task.
        grouped: whether each is a group, by its task's name, of which there may be several.
    """
    written = io.BytesIO()  # HDF5 swallows errors of a disk, or crashes at them
    with h5py.File(written, "w") as file:
        for name, value in {"format": "affcache-predictions", "format_version": 1, **attributes}.items():
            file.attrs[name] = value
        for one in each:
            group = file.create_group(one.task.name) if grouped else file
            group.attrs["classes"] = json.dumps(one.task.classes)
            group.attrs["rule"] = json.dumps(one.rule.to_json())
            group["rows"] = one.rows
            group["video"] = one.frames.video_of_rows()[one.rows].astype(np.int32)
            group["frame_number"] = np.asarray(one.frames.frame_number[one.rows])
            group.create_dataset("video_name", data=list(one.frames.video_names), dtype=h5py.string_dtype())
            for name, values in one.columns.items():
                group[name] = values
    write_bytes(path, written.getbuffer())


def rows_to_predict(frames: FrameIndex, rows: Rows, smooth: str) -> Rows:
    """Return which rows to predict for what is asked of some: where it is smoothed, all crops of their videos."""
    if smooth == "none":
        return rows
    videos, wanted = frames.video_of_rows(), np.zeros(len(frames.video_names), bool)
    wanted[videos[rows]] = True
    return np.flatnonzero(wanted[videos] & (np.asarray(frames.status) == ENCODED))


def require_one_task(runs: Sequence[TrainedHead]) -> None:
    """Refuse to average or compare predictions of several tasks.

    Raises:
        InputError: the runs are of several.
    """
    tasks = {(run.task.name, run.task.classes): run for run in runs}
    if len(tasks) > 1:
        alike = len({name for name, _ in tasks}) < len(tasks)  # in name alone: tasks of one's own
        each = ((run.source, name + f" ({', '.join(of)})" * alike) for (name, of), run in tasks.items())
        words = ", ".join(f"{source} predicts {what}" for source, what in each)
        raise InputError(
            f"The runs are of several tasks: {words}. Expected runs of one task, or of all that the multi-task "
            f"challenge has: {', '.join(part.name for part in TASKS['mtl'].parts)}."
        )

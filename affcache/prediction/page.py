"""A page of what was predicted: a timeline of every person, and frames to look at. It opens from disk, as a report."""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from affcache.crops.archives import UnreadableCropError
from affcache.crops.folders import find_crops
from affcache.crops.images import decode_crop
from affcache.crops.names import canonical
from affcache.errors import InputError
from affcache.faces.media import Media, read_frames
from affcache.faces.scan import cut_out
from affcache.faces.settings import DetectionSettings
from affcache.faces.table import BOX, POINTS
from affcache.prediction.inputs import CROPS_OF
from affcache.prediction.outputs import TaskHeads
from affcache.progress import counted
from affcache.reporting.frames import small_picture
from affcache.reporting.page import Part, page
from affcache.reporting.panels.timelines import TaskFrames, TimelineFrames, timeline
from affcache.tasks.task import Task

PER_OUTPUT = 6  # frames of each class, unit or end of a value
UNSURE = 24
APART = 15  # frame numbers between frames of one person that are shown for one thing
Rows = npt.NDArray[np.int64]
Source = Media | Path | None  # what pictures can be had from


@dataclass(frozen=True)
class Shown:
    """A frame to look at, and why."""

    position: int
    what: str  # the class, unit or value that it is shown for; "" for one that is unsure
    words: str


class PredictionPage:
    """Gathers the tables of all inputs, and makes the page of them.

    Args:
        heads: of all tasks.
        naming: of the columns.
        settings: how faces were cut out.
    """

    def __init__(self, heads: Sequence[TaskHeads], naming: str, settings: DetectionSettings) -> None:
        self._heads, self._naming, self._settings = heads, naming, settings
        self._tables: list[tuple[pa.Table, Source]] = []

    def add(self, table: pa.Table, source: Source) -> None:
        """Take the table of an input; its rows with a face are shown."""
        self._tables.append((table.filter(table["success"]), source))

    def html(self) -> str:
        """Return the page."""
        tables = [table for table, _ in self._tables]
        keys = ["input", "frame", "timestamp", "face_id"]
        said = [name for one in self._heads for name, _ in one.columns(self._naming)]
        whole = pa.concat_tables([table.select([*keys, *said]) for table in tables])
        inputs, persons = whole["input"].to_pylist(), whole["face_id"].to_pylist()
        several = {one for one, person in zip(inputs, persons, strict=True) if person > 1}
        titles = [f"{one}, person {p}" if one in several else str(one) for one, p in zip(inputs, persons, strict=True)]
        names = list(dict.fromkeys(titles))
        index = {name: number for number, name in enumerate(names)}
        videos = np.asarray([index[title] for title in titles], np.int64)
        numbers = whole["frame"].to_numpy()
        order = np.lexsort((numbers, videos))
        tasks = [self._frames_of(one, whole, order) for one in self._heads]
        frames = TimelineFrames(
            [Path(name).name if len(names) > 1 else name for name in names] if _unique_tails(names) else names,
            videos[order], numbers[order], tasks, whole["timestamp"].fill_null(np.nan).to_numpy()[order],
        )  # fmt: skip
        sure = [shown for one in tasks for shown in _surest(one, frames)]
        unsure = [shown for one in tasks for shown in _least_sure(one)]
        pictures = self._pictures({shown.position for shown in (*sure, *unsure)}, order)
        sections = {
            "Timelines": timeline(frames),
            "Frames to look at": _filter(sure) + _buttons("hardest", sure, frames, pictures),
        }
        if unsure:
            words = "Frames of which the heads are least sure: look before you trust them."
            sections["Least sure"] = f"<p>{words}</p>" + _buttons("suspicious", unsure, frames, pictures)
        runs = dict.fromkeys(model.trained.source for one in self._heads for model in one.models)
        lead = (
            f"<p>{escape(', '.join(one.task.name for one in self._heads))} by {escape(', '.join(runs))}: "
            f"{counted(len(whole), 'face')} of {counted(len(names), 'person')}.</p>"
            '<p class="notice">What heads say of faces that nobody labelled is a guess: how good it is on such faces, '
            "this page can't tell.</p>"
        )
        return page("Predictions", lead, [Part(sections)])

    def _frames_of(self, one: TaskHeads, whole: pa.Table, order: Rows) -> TaskFrames:
        """Return what is said for one task, in the order of the timeline."""
        columns = [name for name, _ in one.columns(self._naming)]
        task = one.task
        said = np.column_stack([whole[name].fill_null(np.nan).to_numpy() for name in columns[: task.outputs]])
        said = np.nan_to_num(said)[order]  # a crop that can't be read any more
        decided: Any = said
        if task.exclusive:
            of_class = {name: number for number, name in enumerate(task.classes)}
            decided = np.asarray([of_class.get(name, 0) for name in whole[columns[-1]].to_pylist()])[order]
        elif task.has_classes:
            units = [whole[name].fill_null(False).to_numpy() for name in columns[task.outputs :]]
            decided = np.column_stack(units).astype(np.int64)[order]
        return TaskFrames(task, said, decided, None)

    def _pictures(self, positions: set[int], order: Rows) -> dict[int, str]:
        """Return small pictures of frames, as data URIs by position; what can't be had is left out."""
        place = {int(order[position]): position for position in positions}  # by row of all tables
        pictures: dict[int, str] = {}
        first = 0
        for table, source in self._tables:
            wanted = {row - first: place[row] for row in place if first <= row < first + len(table)}
            first += len(table)
            if wanted and source is not None:
                with suppress(InputError):  # it is gone
                    if isinstance(source, Media):
                        pictures.update(self._of_media(source, table, wanted))
                    else:
                        pictures.update(_of_crops(source, table, wanted))
        return pictures

    def _of_media(self, media: Media, table: pa.Table, wanted: dict[int, int]) -> dict[int, str]:
        by_frame: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for row, position in wanted.items():
            by_frame[table["frame"][row].as_py()].append({**table.slice(row, 1).to_pylist()[0], "position": position})
        pictures: dict[int, str] = {}
        for frame in read_frames(media):
            for face in by_frame.pop(frame.number, []):
                box, points = (np.array([face[name] for name in names]) for names in (BOX, POINTS))
                crop = cut_out(frame.pixels, box, points.reshape(5, 2), self._settings)
                pictures[face["position"]] = small_picture(crop)
            if not by_frame:
                break
        return pictures


def _unique_tails(names: Sequence[str]) -> bool:
    return len({Path(name).name for name in names}) == len(names)


def _of_crops(root: Path, table: pa.Table, wanted: dict[int, int]) -> dict[int, str]:
    """Return pictures of crops in a folder or an archive."""
    crops = find_crops([root])
    index = {canonical(name): video for video, name in enumerate(crops.video_names)}
    of_row = table[CROPS_OF]
    pictures = {}
    for row, position in wanted.items():
        video = index.get(canonical(of_row[row].as_py() or ""))
        if video is None:
            continue
        start, end = crops.video_start[video : video + 2]
        for at in start + np.flatnonzero(crops.frame_number[start:end] == table["frame"][row].as_py()):
            with suppress(OSError, UnreadableCropError):
                pictures[position] = small_picture(decode_crop(crops.read(int(at))).pixels)
    return pictures


def _surest(said: TaskFrames, frames: TimelineFrames) -> list[Shown]:
    """Return the frames that show most of each output: the surest of each class and unit, both ends of each value."""
    found = []
    for output, name in enumerate(said.task.classes):
        values = said.probabilities[:, output]
        ends = [(name, values)] if said.task.has_classes else [(f"{name} high", values), (f"{name} low", -values)]
        for what, strength in ends:
            if said.task.exclusive:
                strength = np.where(said.decided == output, strength, -np.inf)
            elif said.task.has_classes:
                strength = np.where(said.decided[:, output] == 1, strength, -np.inf)
            chosen: list[int] = []
            for position in np.argsort(-strength, kind="stable").tolist():
                if len(chosen) == PER_OUTPUT or strength[position] == -np.inf:
                    break
                if not any(_near(frames, position, other) for other in chosen):
                    chosen.append(position)
            found += [Shown(p, f"{said.task.name}: {what}", f"{what} {values[p]:.2f}") for p in chosen]
    return found


def _near(frames: TimelineFrames, one: int, other: int) -> bool:
    same = frames.videos[one] == frames.videos[other]
    return bool(same and abs(int(frames.numbers[one]) - int(frames.numbers[other])) < APART)


def _least_sure(said: TaskFrames) -> list[Shown]:
    """Return frames whose two most probable classes are nearly equal."""
    if not said.task.exclusive or said.task.outputs < 2:
        return []
    ranked = np.sort(said.probabilities, axis=1)
    margin = ranked[:, -1] - ranked[:, -2]
    order = np.argsort(margin, kind="stable")[:UNSURE].tolist()
    return [Shown(p, "", f"{_two(said.task, said.probabilities[p])}") for p in order]


def _two(task: Task, probabilities: npt.NDArray[Any]) -> str:
    first, second = np.argsort(-probabilities, kind="stable")[:2]
    return ", ".join(f"{task.classes[k]} {probabilities[k]:.2f}" for k in (first, second))


def _filter(shown: Sequence[Shown]) -> str:
    names = dict.fromkeys(one.what for one in shown)
    options = "".join(f'<option value="{escape(name)}">{escape(name)}</option>' for name in names)
    return (
        "<p>The surest frames of each class or unit, and both ends of each value. A click shows the timeline there.</p>"
        '<p class="tools"><label>Shown for <select class="filter"><option value="">all</option>'
        f'{options}</select></label><span class="shown" role="status">{counted(len(shown), "frame")}</span></p>'
    )


def _buttons(name: str, shown: Sequence[Shown], frames: TimelineFrames, pictures: dict[int, str]) -> str:
    cells = []
    for one in shown:
        picture = pictures.get(one.position)
        image = f'<img src="{picture}" alt="" loading="lazy">' if picture else ""
        video = escape(frames.names[frames.videos[one.position]])
        cells.append(
            f'<button type="button" data-position="{one.position}" data-classes="{escape(one.what)}">{image}'
            f"<b>{escape(one.words)}</b><br>{video}, {frames.numbers[one.position]}</button>"
        )
    return f'<div class="crops {name}">{"".join(cells)}</div>'

"""affcache faces: photos and videos to aligned crops in Aff-Wild2's layout, and a table with a row for every frame."""

import re
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from affcache.devices import on_device
from affcache.encoders.encoder import Encoder
from affcache.encoders.loading import load_encoder
from affcache.errors import ConfigError, InputError
from affcache.faces.detector import DETECTORS, YUNET, load_detector
from affcache.faces.media import DamagedMediaError, Media, find_media, require_video_extra
from affcache.faces.scan import Scan, ScannedFrame, Scanner
from affcache.faces.settings import FacesSettings
from affcache.faces.table import (
    KEPT_SUFFIX,
    KEYS,
    POINTS,
    Damaged,
    FaceRows,
    FinishedInputs,
    Identity,
    identity,
    read_kept,
    write_table,
)
from affcache.faces.tracks import Tracker
from affcache.files import LOCK, cannot_write, locked, remove
from affcache.progress import Listener, Result, counted
from affcache.settings import command

TABLE = "faces.parquet"
UNREADABLE = "unreadable.txt"
KEPT = ".faces"  # hidden folder of what is finished
CLAIM = f"rows{KEPT_SUFFIX}"  # beside the crops of an input until all of it is in place
SCHEMA = pa.schema([*KEYS, ("crops", pa.string()), *((name, pa.float32()) for name in POINTS)])
EVERY_CROP = 10  # of a track is encoded, to tell persons apart
NOT_DECIDING = ("inputs", "out", "workers", "device", "detector")  # settings that change no result


@dataclass(frozen=True)
class FacesResult(Result):
    """What was found in photos and videos."""

    out: str
    table: str
    inputs: int  # photos and videos, those of earlier runs into the same folder included
    frames: int  # that were looked at
    faces: int
    frames_without_faces: int
    persons: int  # of each input by itself
    unreadable: tuple[str, ...]  # inputs that were left out
    unreadable_list: str | None
    seconds: float
    rate: float  # frames a second of this run


@command(FacesSettings)
def find_faces(settings: FacesSettings, listener: Listener) -> FacesResult:
    """Find, track and cut out the faces of photos and videos.

    Inputs that are finished are not looked at again, so that the same command continues one that was killed.

    Raises:
        InputError: nothing to look at, no face in any of it, the detector's or the encoder's weights can't be had, or
            the folder can't be written.
        ConfigError: the extra isn't installed, or the folder has results of other settings.
    """
    if not settings.inputs or settings.out is None:
        raise ConfigError(
            "Expected photos, videos or folders of them, and --out DIR for their crops: affcache faces clip.mp4 --out "
            "my/faces."
        )
    if settings.out.resolve() in [given.resolve() for given in settings.inputs]:
        raise ConfigError(
            f"--out is {settings.out}, which is an input: the next run would take its crops for photos. Expected "
            "another folder; it may lie in that one."
        )
    media, others = find_media(settings.inputs, settings.out)
    require_video_extra(media)
    _require_apart(media)
    if others:
        listener.message(f"files left alone: {', '.join(f'{n:,} {kind}' for kind, n in others.most_common(5))}")
    scanner = Scanner(settings, load_detector(settings.detector), settings.size)
    encoder = None
    if settings.model is not None:
        encoder = load_encoder(settings.model, settings.pretrained, device=settings.device)
    refusal = ConfigError(
        f"Another 'affcache faces' works in {settings.out}. Expected to be alone there. Wait, or choose another --out."
    )
    with locked(settings.out / LOCK, refusal, listener):
        return _Finding(settings, media, scanner, encoder, listener).run()


def _require_apart(media: Sequence[Media]) -> None:
    """Refuse names of which one could be a person of the other."""
    names = {one.name.casefold(): one.path for one in media}
    for own in (TABLE, UNREADABLE):
        if own in names:
            raise InputError(f"{names[own]} would have crops in {own}, which is a file there. Rename it.")
    for one in media:
        whole = re.sub(r"_\d+$", "", one.name.casefold())
        if whole != one.name.casefold() and whole in names:
            raise InputError(
                f"{one.path} is called as the crops of a person in {names[whole]} would be. Expected names that keep "
                "the crops apart. Rename one of them, or find their faces one after the other into other folders."
            )


class _Finding:
    """One run of ``find_faces``."""

    def __init__(
        self, settings: FacesSettings, media: list[Media], scanner: Scanner, encoder: Encoder | None, listener: Listener
    ) -> None:
        assert settings.out is not None
        self.media, self.scanner, self.encoder, self.listener = media, scanner, encoder, listener
        self.settings, self.out = settings, settings.out
        made = {name: value for name, value in asdict(settings).items() if name not in NOT_DECIDING}
        # a file is YuNet's, as its hash says
        made["detector"] = settings.detector if settings.detector in DETECTORS else YUNET
        self.kept = FinishedInputs(self.out / KEPT, made)
        self.damaged = Damaged(self.out / UNREADABLE, listener)
        self.frames = 0

    def run(self) -> FacesResult:
        start = time.perf_counter()
        self.kept.require_own(self.media)
        pending = [one for one in self.media if not self.kept.finished(one)]
        if 0 < len(pending) < len(self.media):
            self.listener.message(f"continuing: {len(self.media) - len(pending)} of {len(self.media)} are finished")
        with closing(self.scanner.scans(pending)) as scans:
            for done, scan in enumerate(scans):
                try:
                    with closing(scan.frames):
                        self._find(scan, done, len(pending))
                except DamagedMediaError as error:
                    self.damaged.add(scan.media, error)
        self.damaged.write()
        every = self.kept.every()
        counts: Counter[str] = Counter()
        for one in every:
            counts.update(_counts(self.kept.table(one)))
        if not counts["faces"]:
            remove(self.out / TABLE)  # its faces are gone
            raise InputError(self.damaged.why_nothing(self.settings, len(self.media), counts["frames"]))
        write_table(self.out / TABLE, SCHEMA, map(self.kept.table, every))
        seconds = time.perf_counter() - start
        return FacesResult(
            out=str(self.out),
            table=str(self.out / TABLE),
            inputs=len(every),
            **counts,
            unreadable=tuple(map(str, self.damaged.reasons)),
            unreadable_list=str(self.damaged.path) if self.damaged.reasons else None,
            seconds=seconds,
            rate=self.frames / seconds,
        )

    def _find(self, scan: Scan, done: int, total: int) -> None:
        """Find the faces of one input, and keep its crops and its rows."""
        media, tracker, count = scan.media, scan.tracker, scan.count
        crops = self.kept.folder / f"{media.name}.crops"
        self._remove_old(media, crops)
        rows, damaged, file = FaceRows(str(media.path)), 0, identity(media)
        try:
            for found in scan.frames:
                self._keep(crops, found, tracker)
                rows.add(found)
                damaged += found.damaged
                self.frames += 1
                if total == 1:
                    self.listener.progress(found.number, max(count.frames, found.number), "frame")
                else:
                    self.listener.progress(done, total, "input", f"{media.path.name}, frame {found.number:,}")
            if damaged:
                self.listener.warning(
                    f"{media.path}: {counted(damaged, 'frame')} damaged; no faces are taken from them"
                )
            self._finish(media, file, crops, rows, tracker)
        finally:
            if not (crops / CLAIM).exists():  # else some may be in place: the next run removes them by it
                shutil.rmtree(crops, ignore_errors=True)
        if total > 1:
            self.listener.progress(done + 1, total, "input")

    def _keep(self, crops: Path, found: ScannedFrame, tracker: Tracker) -> None:
        """Write the crops of a frame, into a folder for each track; encode some."""
        for jpeg, track in zip(found.jpegs, found.tracks, strict=True):
            path = crops / str(track) / f"{found.number:05d}.jpg"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(jpeg)
            except OSError as error:
                raise cannot_write(path, error) from None
        if self.encoder is not None:
            chosen = [k for k, track in enumerate(found.tracks) if tracker.tracks[track].frames % EVERY_CROP == 1]
            if chosen:
                with on_device(self.encoder.device):
                    embeddings = self.encoder.encode([found.crops[k] for k in chosen]).numpy()
                for k, embedding in zip(chosen, embeddings, strict=True):
                    tracker.tracks[found.tracks[k]].embed(embedding)

    def _finish(self, media: Media, file: Identity, crops: Path, rows: FaceRows, tracker: Tracker) -> None:
        """Give tracks their persons, and put crops and rows in place; a kill leaves a claim to what was moved."""
        persons = tracker.persons(self.settings.same_person)
        several = max(persons, default=0) > 1
        folder_of = {person: f"{media.name}_{person}" if several else media.name for person in set(persons)}
        keys, points = rows.columns(persons)
        folders = [folder_of.get(int(person)) for person in rows.persons(persons)]
        table = pa.table({**keys, "crops": pa.array(folders, pa.string()), **points}).select(SCHEMA.names)
        for to in map(self.out.joinpath, folder_of.values()):
            if to.exists():
                raise InputError(
                    f"{to} is there already, and is none of what 'affcache faces' keeps of {media.path}. Expected a "
                    "folder without it. Choose another --out, or move it away."
                )
        claim = crops / CLAIM
        self.kept.write([(media, file)], table, [len(table)], claim)
        try:
            for track, person in enumerate(persons):
                to = self.out / folder_of[person]
                to.mkdir(exist_ok=True)
                for crop in sorted((crops / str(track)).iterdir()):
                    crop.replace(to / crop.name)
            claim.replace(self.kept.path(media))
            self.kept.add(self.kept.path(media))
        except OSError as error:
            raise cannot_write(self.out, error) from None

    def _remove_old(self, media: Media, crops: Path) -> None:
        """Remove what an earlier run, or one that was killed, left of an input that has to be looked at again."""
        for path in (self.kept.path(media), crops / CLAIM):
            if not path.exists():
                continue
            try:
                table = read_kept(path)
                for name in table["crops"].unique().to_pylist():
                    if name and Path(name).name == name and re.fullmatch(re.escape(media.name) + r"(_\d+)?", name):
                        shutil.rmtree(self.out / name, ignore_errors=True)
            except (OSError, ValueError, KeyError, pa.ArrowException):  # damaged: its folders will be refused, by name
                pass
            path.unlink(missing_ok=True)
        self.kept.drop(media)
        shutil.rmtree(crops, ignore_errors=True)


def _counts(table: pa.Table) -> dict[str, Any]:
    """Count the frames, faces and persons of one input."""
    faces = table["success"].to_numpy()
    frames = table["frame"].to_numpy()
    persons = table["face_id"].drop_null().unique()
    return {
        "frames": len(set(frames.tolist())),
        "faces": int(faces.sum()),
        "frames_without_faces": int((~faces).sum()),
        "persons": len(persons),
    }

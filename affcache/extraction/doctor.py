"""The doctor: what an extraction would meet on this machine, checked beforehand, and how long it would take."""

import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import open_clip
import torch

from affcache.crops.archives import UnreadableCropError
from affcache.crops.crop_list import CropList
from affcache.crops.images import decode_crop
from affcache.devices import describe_machine, on_device, resolve_device
from affcache.encoders.encoder import Encoder
from affcache.encoders.loading import AGREEMENT, check_faces, fast_precisions, smallest_cosine
from affcache.errors import AffcacheError
from affcache.extraction.encode_pool import calls_at_once, one_thread_a_call
from affcache.extraction.extract import list_crops
from affcache.extraction.pipeline import PHOTOS, default_workers, is_large
from affcache.extraction.settings import DoctorSettings, EncodingSettings
from affcache.extraction.tuning import prepare_encoder, remarks_on
from affcache.faces.crop_kind import LEAST_CONFIDENCE, crop_kind, sample_of
from affcache.faces.detector import detector_at_hand, load_detector
from affcache.faces.media import EXTRA, require_video_extra
from affcache.faces.settings import DETECTION_SIDE
from affcache.files import existing_parent
from affcache.progress import Listener, Result, counted, duration_text
from affcache.settings import command
from affcache.store.reading import EmbeddingStore

OK, WARNING, PROBLEM = "ok", "warning", "problem"
CROPS_TO_DECODE = 10
CROPS_TO_LOOK_AT = 40
BYTES_A_VALUE = 2  # float16


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: str  # ok, warning or problem
    finding: str  # what was found; for a problem also what was expected and what to do


@dataclass(frozen=True)
class DoctorResult(Result):
    """What the doctor found."""

    checks: tuple[Check, ...]
    rows: int  # N, crops found; 0 where none were
    pending: int  # rows still to be encoded
    projected_seconds: float | None  # for the pending rows, on this machine as busy as it is now
    machine: dict[str, Any]
    healthy: bool  # whether an extraction with these settings would start


@command(DoctorSettings)
def doctor(settings: DoctorSettings, listener: Listener) -> DoctorResult:
    """Check environment, device, model, crops, disk and store, and project the duration of an extraction.

    Nothing is written. A check that fails doesn't stop the others.

    Raises:
        ConfigError: a setting is unknown or out of range.
    """
    visit = Doctor(settings, listener)
    checks = visit.checks()
    found: list[Check] = []
    for name, check in checks:
        try:
            with on_device(visit.device):
                state, finding = check()
        except AffcacheError as error:  # an error of the user's input is a finding
            state, finding = PROBLEM, str(error).splitlines()[0]
        if finding:
            found.append(Check(name, state, finding))
            listener.progress(len(found), len(checks), "check", name)
    return DoctorResult(
        checks=tuple(found),
        rows=len(visit.crops) if visit.crops else 0,
        pending=visit.pending,
        projected_seconds=visit.projected_seconds,
        machine=describe_machine(visit.device),
        healthy=all(check.state != PROBLEM for check in found),
    )


class Doctor:
    """One visit: the checks in order, each with what the earlier ones found."""

    def __init__(self, settings: DoctorSettings, listener: Listener) -> None:
        self.settings, self.listener = settings, listener
        self.path = settings.store or settings.usual_store()
        self.device = torch.device("cpu")
        self.crops: CropList | None = None
        self.encoder: Encoder | None = None
        self.recorded: dict[str, Any] = {}
        self.pending = 0
        self.decode_seconds = 0.0  # a crop, in one thread
        self.projected_seconds: float | None = None

    def checks(self) -> list[tuple[str, Callable[[], tuple[str, str]]]]:
        """Return the checks in the order in which they build on one another."""
        return [
            ("environment", self.environment),
            ("device", self.find_device),
            ("precision", self.precision),
            ("crops", self.find_crops),
            ("decoding", self.decode),
            ("faces", self.look_at_faces),
            ("store", self.look_at_store),
            ("model", self.load_model),
            ("agreement", self.agreement),
            ("disk", self.disk),
            ("duration", self.duration),
        ]

    def environment(self) -> tuple[str, str]:
        """Versions of what embeddings depend on."""
        python = ".".join(map(str, sys.version_info[:3]))
        return OK, f"Python {python}, torch {torch.__version__}, open_clip {open_clip.__version__}"

    def find_device(self) -> tuple[str, str]:
        """The device that --device names, and what else is there."""
        self.device = resolve_device(self.settings.device)
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            name = torch.cuda.get_device_name(self.device)
            return OK, f"{self.device}: {name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        machine = describe_machine(self.device)
        finding = f"cpu: {machine['processor']}, {counted(machine['cores'], 'core')}"
        if self.settings.device == "auto":
            return WARNING, f"{finding}; torch sees no GPU, which would be far faster"
        return OK, finding

    def precision(self) -> tuple[str, str]:
        """Number formats that are fast here."""
        fast = fast_precisions(self.device)
        if not fast:
            return WARNING, "this device has no number format that is faster than fp32"
        return OK, f"faster than fp32 on this device: {', '.join(fast)}"

    def find_crops(self) -> tuple[str, str]:
        """How many crops there are."""
        start = time.perf_counter()
        self.crops = list_crops(self.settings, Listener())
        self.pending = len(self.crops)
        seconds = time.perf_counter() - start
        return OK, f"{len(self.crops):,} in {counted(len(self.crops.video_names), 'video')}, listed in {seconds:.1f} s"

    def decode(self) -> tuple[str, str]:
        """Whether some crops, spread over all, can be read, and how fast."""
        if self.crops is None:
            return OK, ""
        rows = np.unique(np.linspace(0, len(self.crops) - 1, CROPS_TO_DECODE).astype(np.int64))
        start = time.perf_counter()
        bad, large = [], 0
        for row in rows.tolist():
            try:
                large += is_large(decode_crop(self.crops.read(row)).pixels)
            except (OSError, UnreadableCropError):
                bad.append(row)
        self.decode_seconds = (time.perf_counter() - start) / len(rows)
        if bad:
            state = PROBLEM if len(bad) == len(rows) else WARNING
            return state, (
                f"{len(bad)} of {len(rows)} crops can't be read, such as {self.crops.path(bad[0])}. Expected "
                "image files. An extraction marks such crops and goes on; mend them first if they are many."
            )
        if 2 * large > len(rows):
            return WARNING, PHOTOS
        return OK, f"{counted(len(rows), 'crop')} read and decoded, {self.decode_seconds * 1e3:.1f} ms each"

    def look_at_faces(self) -> tuple[str, str]:
        """What kind of crops these are: aligned, loose, or whole photos."""
        if self.crops is None:
            return OK, ""
        if self.settings.detector is not None:
            require_video_extra()
            make_detector = load_detector(self.settings.detector)
        elif (at_hand := detector_at_hand()) is None:
            return OK, f"not looked at: that takes {EXTRA}, and --detector yunet to fetch the detector"
        else:
            make_detector = at_hand
        kind = crop_kind(sample_of(self.crops, CROPS_TO_LOOK_AT), make_detector(LEAST_CONFIDENCE, DETECTION_SIDE))
        return (OK if kind.kind in ("aligned", "loose") else WARNING), kind.sentence

    def look_at_store(self) -> tuple[str, str]:
        """What an extraction would continue, or where it would begin."""
        if not self.path.exists():
            folder = existing_parent(self.path)
            if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
                return PROBLEM, (
                    f"{self.path} can't be made: {folder} takes no new files. Expected a folder that can be written. "
                    "Choose another place with --store FILE."
                )
            return OK, f"{self.path} is not there yet; it will be made"
        store = EmbeddingStore.open(self.path)
        self.recorded = store.encoder
        if self.crops is not None:
            self.pending = store.counts["pending"]
        return OK, f"{self.path}: {store.counts['pending']:,} of {len(store):,} rows are still to be encoded"

    def load_model(self) -> tuple[str, str]:
        """Whether the weights can be had, and how the encoder would be run."""
        start = time.perf_counter()
        self.encoder = prepare_encoder(self._settings_of_extract(), self.recorded, self.listener)
        return OK, (
            f"{self.settings.model} loads in {time.perf_counter() - start:.1f} s: D = {self.encoder.width}, "
            f"{self.encoder.precision}{self._why_precision()}, {counted(batch_size_of(self.encoder), 'crop')} a call"
            + "".join(f"; {remark}" for remark in remarks_on(self.encoder.description))
        )

    def _why_precision(self) -> str:
        """Say why the encoder is in its number format, where a faster one was to be expected."""
        fast = fast_precisions(self.device)
        if self.encoder is None or self.settings.precision != "auto" or self.encoder.precision in fast[:1] or not fast:
            return ""
        if "precision" in self.recorded:
            return " (the store was begun in it)"
        return f" ({fast[0]} disagrees: a cosine below {AGREEMENT} to fp32 on practice faces)"

    def agreement(self) -> tuple[str, str]:
        """How far the embeddings in this precision are from those in fp32."""
        if self.encoder is None or self.encoder.precision == "fp32":
            return OK, ""
        exact = prepare_encoder(replace(self._settings_of_extract(), precision="fp32"), {}, Listener())
        cosine = smallest_cosine(self.encoder.encode(check_faces()), exact.encode(check_faces()))
        finding = f"{self.encoder.precision} agrees with fp32 to a cosine of {cosine:.5f} or better on practice faces"
        return (OK, finding) if cosine >= AGREEMENT else (WARNING, f"{finding}; --precision fp32 is exact")

    def disk(self) -> tuple[str, str]:
        """Whether the store fits."""
        if self.crops is None or self.encoder is None or self.path.exists():
            return OK, ""
        folder = existing_parent(self.path)
        needed = len(self.crops) * self.encoder.width * BYTES_A_VALUE
        free = shutil.disk_usage(folder).free
        finding = f"the store takes {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free in {folder}"
        if needed > free:
            return PROBLEM, f"{finding}. Expected room for all of it. Free some, or choose another disk with --store."
        return OK, finding

    def duration(self) -> tuple[str, str]:
        """How long the encoder, or the decoding threads, would take for what is pending."""
        if self.crops is None or self.encoder is None:
            return OK, ""
        if not self.pending:
            self.projected_seconds = 0.0
            return OK, "nothing is left to encode"
        bare = bare_encoder(self.encoder)
        start = time.perf_counter()
        bare(2)
        encode = (time.perf_counter() - start) / 2 / batch_size_of(self.encoder)
        decode = self.decode_seconds / (self.settings.workers or default_workers())
        slower = max(encode, decode)
        self.projected_seconds = self.pending * slower
        limit = "the encoder" if encode >= decode else "decoding; raise --workers"
        return OK, (
            f"about {duration_text(self.projected_seconds)} for {counted(self.pending, 'crop')} at {1 / slower:,.1f} "
            f"crops/s; the limit is {limit}"
        )

    def _settings_of_extract(self) -> EncodingSettings:
        # compiling takes a minute, and is no question of health; a device that isn't there was said already
        return replace(self.settings, compile="off", device=str(self.device))


def bare_encoder(encoder: Encoder) -> Callable[[int], None]:
    """Return a function that encodes one batch, which lies on the device ready to use, so many times, and waits."""
    faces = check_faces()  # what they show changes no duration
    pixels = encoder.prepare([faces[index % len(faces)] for index in range(batch_size_of(encoder))])

    with torch.inference_mode():
        inputs = pixels if encoder.compiled is not None else encoder.network.normalise(pixels)
    network = encoder.network.encode_inputs if encoder.compiled is None else encoder.compiled

    @torch.inference_mode()
    def once(_: int = 0) -> None:
        network(inputs)

    def run(batches: int) -> None:
        if encoder.device.type == "cuda":
            for _ in range(batches):
                once()
            torch.cuda.synchronize(encoder.device)
        else:  # as many at once as the pipeline has under way
            with ThreadPoolExecutor(calls_at_once(encoder, None)) as pool, one_thread_a_call(encoder):
                for _ in pool.map(once, range(batches)):
                    pass

    run(2)  # the first calls choose algorithms
    return run


def batch_size_of(encoder: Encoder) -> int:
    """Return the crops per call that ``prepare_encoder`` settled on."""
    return int(encoder.description["batch_size"])

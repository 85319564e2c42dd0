"""affcache predict on a video, against finding its faces alone and encoding them alone: in turn, in one run."""

import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import affcache
from affcache.devices import describe_machine, on_device, resolve_device
from affcache.errors import ConfigError, InputError
from affcache.extraction.doctor import bare_encoder, batch_size_of
from affcache.extraction.settings import ExtractSettings
from affcache.extraction.tuning import prepare_encoder
from affcache.faces.detector import load_detector
from affcache.faces.media import Media, require_video_extra
from affcache.faces.scan import Scanner
from affcache.files import shipped
from affcache.prediction.inputs import sort_inputs
from affcache.prediction.predict import predict_with
from affcache.prediction.settings import PredictSettings
from affcache.progress import Listener, Result
from affcache.settings import build
from benchmarks.settings import BenchPredictSettings
from benchmarks.shared import seconds_of, temporary_folder


@dataclass(frozen=True)
class BenchPredictResult(Result):
    """Frames a second; medians over rounds in which all three took their turn."""

    rate: float  # from the video's file to the table, the encoder being loaded
    detecting: float  # decoding, finding, tracking and cutting out alone
    encoding: float  # the bare encoder alone, as many crops as there are faces
    bare: float  # the slower of the two
    ratio: float  # median over the rounds of rate / bare
    shared: float  # median of rate against what both could do one after the other, as on a CPU they share its cores
    unit: str
    rates: list[float]
    detectings: list[float]
    encodings: list[float]
    frames: int  # of each round
    faces: int
    model: str
    precision: str
    batch_size: int
    workers: int
    device: str
    machine: dict[str, Any]


def bench_predict(
    settings: BenchPredictSettings | None = None, /, *, listener: Listener | None = None, **values: Any
) -> BenchPredictResult:
    """Measure predict with an untrained head, on a video that is read so many times.

    Raises:
        InputError, ConfigError: as for ``predict``.
    """
    settings = build(BenchPredictSettings, values, over=settings)
    listener = listener or Listener()
    if settings.video is None:
        raise ConfigError("Expected --video FILE: a video of one face.")
    require_video_extra([Media(settings.video, "")])
    with temporary_folder() as folder, on_device(resolve_device(settings.device)):
        run = untrained_run(Path(folder), settings)
        videos = []
        for index in range(settings.times):
            videos.append(Path(folder) / f"{index}{settings.video.suffix}")
            shutil.copyfile(settings.video, videos[-1])  # links to one file would count as one
        return _compare(run, tuple(videos), settings, listener)


def untrained_run(folder: Path, settings: BenchPredictSettings) -> Path:
    """Train a linear head for one epoch on the shipped faces; what it says is of no interest."""
    encoder = {"model": settings.model, "pretrained": settings.pretrained, "device": settings.device}
    with shipped("sample") as sample:
        crops = sample / "cropped_aligned"
        listed = folder / "some.txt"
        names = sorted(f"{path.parent.name}/{path.name}" for path in crops.glob("*/*.jpg"))
        listed.write_text("".join(f"{name}\n" for name in names[:: max(len(names) // 64, 1)]))
        affcache.extract(crops=crops, crop_list=listed, store=folder / "store.h5", **encoder)
        affcache.fit(
            task="expr", store=folder / "store.h5", annotations=sample / "annotations", run=folder / "run",
            head="linear", epochs=1, batch_size=8, device=settings.device,
        )  # fmt: skip
    return folder / "run"


def _compare(
    run: Path, videos: tuple[Path, ...], settings: BenchPredictSettings, listener: Listener
) -> BenchPredictResult:
    """Measure the three in turn."""
    asked = PredictSettings(
        inputs=videos, run=(run,), out=run.with_name("p.parquet"), detector=settings.detector, workers=settings.workers,
        device=settings.device,
    )  # fmt: skip
    inputs = sort_inputs(asked.inputs)
    model = affcache.load(run, device=settings.device)
    scanner = Scanner(asked, load_detector(settings.detector))
    encoder = prepare_encoder(
        ExtractSettings(model=settings.model, pretrained=settings.pretrained, device=settings.device), {}, listener
    )
    bare, size = bare_encoder(encoder), batch_size_of(encoder)
    result = predict_with([model], inputs, asked, Listener())  # warms everything up
    if not result.faces:
        raise InputError(f"There is no face in {settings.video}. Expected a video of one.")
    rates, detectings, encodings = [], [], []
    batches = max(round(result.faces / size), 1)
    for done in range(settings.rounds):
        listener.progress(done, settings.rounds, "round")
        start = time.perf_counter()
        for scan in scanner.scans(inputs.media):
            for _ in scan.frames:
                pass
        detectings.append(result.rows / (time.perf_counter() - start))
        # a face a frame: crops a second are frames a second, or more where frames have no face
        encodings.append(batches * size / seconds_of(lambda: bare(batches)) * result.rows / result.faces)
        start = time.perf_counter()
        predict_with([model], inputs, asked, Listener())
        rates.append(result.rows / (time.perf_counter() - start))
    listener.progress(settings.rounds, settings.rounds, "round")
    both = list(zip(rates, detectings, encodings, strict=True))
    return BenchPredictResult(
        rate=statistics.median(rates),
        detecting=statistics.median(detectings),
        encoding=statistics.median(encodings),
        bare=min(statistics.median(detectings), statistics.median(encodings)),
        ratio=statistics.median(rate / min(finding, encode) for rate, finding, encode in both),
        shared=statistics.median(rate * (1 / finding + 1 / encode) for rate, finding, encode in both),
        unit="frames/s",
        rates=rates,
        detectings=detectings,
        encodings=encodings,
        frames=result.rows,
        faces=result.faces,
        model=settings.model,
        precision=encoder.precision,
        batch_size=size,
        workers=scanner.workers,
        device=str(encoder.device),
        machine=describe_machine(encoder.device),
    )

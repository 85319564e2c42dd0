"""The extraction pipeline against the bare encoder: crops per second of both, in turn, in one run."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from affcache.crops.crop_list import CropList
from affcache.crops.folders import find_crops
from affcache.devices import describe_machine, on_device, resolve_device
from affcache.encoders.encoder import Encoder
from affcache.extraction.doctor import bare_encoder, batch_size_of
from affcache.extraction.extract import write_embeddings
from affcache.extraction.pipeline import Pipeline, default_workers
from affcache.extraction.settings import ExtractSettings
from affcache.extraction.tuning import prepare_encoder
from affcache.files import shipped
from affcache.progress import Listener, Result
from affcache.settings import build
from affcache.store.description import fingerprint
from affcache.store.writing import StoreWriter, create_store
from benchmarks.settings import BenchExtractSettings
from benchmarks.shared import seconds_of, temporary_folder


@dataclass(frozen=True)
class BenchExtractResult(Result):
    """The rates of pipeline and bare encoder; medians over rounds in which both took their turn."""

    rate: float  # crops per second: files on disk to committed rows of a store
    bare: float  # crops per second of the encoder alone, on a batch that is already on the device
    ratio: float  # median over the rounds of rate / bare
    unit: str
    rates: list[float]  # of each round
    bares: list[float]
    shares: dict[str, float]  # of the last round: fraction of the time held up by decode, copy, encode, write
    bottleneck: str
    crops: int  # encoded in each round
    model: str
    precision: str
    batch_size: int
    workers: int
    compiled: bool
    device: str
    machine: dict[str, Any]


def bench_extract(
    settings: BenchExtractSettings | None = None, /, *, listener: Listener | None = None, **values: Any
) -> BenchExtractResult:
    """Measure the pipeline's rate, the bare encoder's, and their ratio.

    Each round encodes the same number of batches bare, and through the pipeline into a temporary store. What the bare
    encoder leaves out is everything around it: reading, decoding, copying, resizing, normalising (but for a compiled
    encoder, which does that itself), fetching, writing.

    Raises:
        InputError, ConfigError: as for ``extract``.
    """
    settings = build(BenchExtractSettings, values, over=settings)
    listener = listener or Listener()
    with on_device(resolve_device(settings.device)):
        encoder = prepare_encoder(like_extract(settings), {}, listener)
        return compare(encoder, settings, listener)


def like_extract(settings: BenchExtractSettings) -> ExtractSettings:
    """Return what ``extract`` would be told, to run the same encoder in the same way."""
    return ExtractSettings(
        model=settings.model,
        pretrained=settings.pretrained,
        image_size=settings.image_size,
        precision=settings.precision,
        batch_size=settings.batch_size,
        device=settings.device,
        compile=settings.compile,
    )


def compare(encoder: Encoder, settings: BenchExtractSettings, listener: Listener) -> BenchExtractResult:
    """Measure the pipeline with an encoder that is ready, and the encoder alone; as ``bench_extract``."""
    workers = settings.workers or default_workers()
    with shipped("sample") as sample:
        found = find_crops(list(settings.crops) or [sample / "cropped_aligned"])
        bare = bare_encoder(encoder)
        batches = max(2, round(settings.seconds / seconds_of(lambda: bare(1))))
        crops = repeated(found, batches * batch_size_of(encoder))
        measure_pipeline(encoder, repeated(found, 2 * batch_size_of(encoder)), workers)  # warms everything up
        rates, bares = [], []
        for done in range(settings.rounds):
            listener.progress(done, settings.rounds, "round")
            bares.append(len(crops) / seconds_of(lambda: bare(batches)))
            pipeline, seconds = measure_pipeline(encoder, crops, workers)
            rates.append(len(crops) / seconds)
        listener.progress(settings.rounds, settings.rounds, "round")
    return BenchExtractResult(
        rate=statistics.median(rates),
        bare=statistics.median(bares),
        ratio=statistics.median(rate / alone for rate, alone in zip(rates, bares, strict=True)),
        unit="crops/s",
        rates=rates,
        bares=bares,
        shares=pipeline.stats.shares(),
        bottleneck=pipeline.bottleneck(),
        crops=len(crops),
        model=settings.model,
        precision=encoder.precision,
        batch_size=batch_size_of(encoder),
        workers=workers,
        compiled=encoder.compiled is not None,
        device=str(encoder.device),
        machine=describe_machine(encoder.device),
    )


def measure_pipeline(encoder: Encoder, crops: CropList, workers: int) -> tuple[Pipeline, float]:
    """Encode crops into a temporary store; return the pipeline that did it, and its seconds."""
    with temporary_folder() as folder:
        path = Path(folder) / "store.h5"
        create_store(path, crops, encoder.width, encoder.description, fingerprint(encoder.description))
        with StoreWriter(path) as writer:
            pipeline = Pipeline(crops, encoder, Listener(), batch_size_of(encoder), workers)
            return pipeline, seconds_of(lambda: write_embeddings(writer, pipeline, writer.pending_rows(), Listener()))


def repeated(crops: CropList, rows: int) -> CropList:
    """Return a list of so many rows, in which the same crops come again as other videos."""
    copies = -(-rows // len(crops))
    starts = [crops.video_start[:-1] + copy * len(crops) for copy in range(copies)]
    videos = len(crops.video_names)
    longer = CropList(
        folders=crops.folders * copies,
        video_names=tuple(f"{copy:06d}-{name}" for copy in range(copies) for name in crops.video_names),
        video_start=np.concatenate([*starts, [copies * len(crops)]]).astype(np.int64),
        frame_number=np.tile(crops.frame_number, copies),
        namings={copy * videos + v: naming for copy in range(copies) for v, naming in crops.namings.items()},
        archived={copy * videos + v: frames for copy in range(copies) for v, frames in crops.archived.items()},
    )
    return longer.only(np.arange(len(longer)) < rows)

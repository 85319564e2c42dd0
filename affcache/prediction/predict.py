"""affcache predict: trained heads on photos, videos, crops or stores, into a table with a row for every face."""

import hashlib
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from affcache.devices import on_device
from affcache.encoders.side_by_side import AnyEncoder, Encoders, side_by_side
from affcache.errors import ConfigError, InputError
from affcache.extraction.encode_pool import EncodePool
from affcache.extraction.tuning import find_batch_size
from affcache.faces.detector import load_detector
from affcache.faces.find import TABLE
from affcache.faces.media import DamagedMediaError, Media, require_video_extra
from affcache.faces.scan import Scan, Scanner
from affcache.faces.table import KEPT_SUFFIX, KEYS, POINTS, Damaged, FinishedInput, FinishedInputs, write_table
from affcache.files import LOCK, discard_partials, locked, write_text
from affcache.prediction.inputs import CROPS_OF, EmbeddedRows, Inputs, keys_of_frames, rows_of_crops, sort_inputs
from affcache.prediction.media_faces import FaceBatches, FinishedPhotos, MediaWork
from affcache.prediction.model import Model, load
from affcache.prediction.outputs import (
    LogitsOfHeads,
    TaskHeads,
    encoders_of_models,
    heads_by_task,
    located,
    output_columns,
    require_different_columns,
)
from affcache.prediction.overlay import draw_overlay, overlay_path
from affcache.prediction.page import PredictionPage, Source
from affcache.prediction.settings import PredictSettings
from affcache.prediction.whole_videos import require_one_level, rows_of_videos
from affcache.progress import Listener, Result, counted
from affcache.scoring.ensemble import Ensemble, parse_weights, warn_of_unused
from affcache.scoring.predict import TrainedRun, open_store
from affcache.scoring.rule import DecisionRule
from affcache.settings import RUNS, command
from affcache.store.frames import ABSENT, all_frames
from affcache.training.run_folder import newest_run

NOT_DECIDING = ("inputs", "out", "workers", "device", "detector", "overlay", "page", "batch_size", "run", "model",
                "pretrained", "store", "weights")  # fmt: skip


@dataclass(frozen=True)
class PredictResult(Result):
    """What was predicted, and where it stands."""

    out: str
    runs: tuple[str, ...]
    tasks: tuple[str, ...]
    rules: dict[str, str]  # by task, in words; "" for the task's own
    inputs: int
    rows: int
    faces: int  # rows with a face
    unreadable: tuple[str, ...]  # photos and videos that were left out
    unreadable_list: str | None
    overlays: tuple[str, ...]
    page: str | None
    seconds: float
    rate: float  # rows a second


@command(PredictSettings)
def predict(settings: PredictSettings, listener: Listener) -> PredictResult:
    """Predict every face of photos, videos, crops or stores with trained heads, and write one table.

    Photos and videos that are finished aren't looked at again: the same command continues one that was killed.

    Raises:
        InputError: no run, nothing to predict, or no face in any of it.
        StoreError: a head, or a store, is damaged or of another encoder.
        ConfigError: the extra isn't installed, no rule was fitted, or a setting is out of range.
    """
    if not (settings.inputs or settings.store) or settings.out is None:
        raise ConfigError(
            "Expected photos, videos, crops or a store, and --out FILE.csv or FILE.parquet: affcache predict clip.mp4 "
            "--run RUN --out clip.csv."
        )
    inputs = sort_inputs([*settings.inputs, *settings.store])
    if inputs.others:
        listener.message(f"files left alone: {', '.join(f'{n:,} {kind}' for kind, n in inputs.others.most_common(5))}")
    if inputs.media:
        require_video_extra(inputs.media)
    elif settings.overlay is not None:
        raise ConfigError("--overlay draws into photos and videos, and none was given. Expected some, or no --overlay.")
    _require_own_places(settings, inputs)
    if not inputs.media and (settings.every > 1 or settings.from_ or settings.to is not None):
        listener.warning("--every, --from and --to are of photos and videos: all rows of others are predicted.")
    locations: Sequence[Path] = settings.run or [newest_run(RUNS).path]
    models = [load(run, device=settings.device, listener=listener) for run in locations]
    return predict_with(located(models, settings.model, settings.pretrained), inputs, settings, listener)


def _require_own_places(settings: PredictSettings, inputs: Inputs) -> None:
    """Refuse what would write one file over another, or over an input, before all the work."""
    places = [path for path in (settings.out, settings.page) if path is not None]
    if settings.overlay is not None:
        places += [overlay_path(settings.overlay, media, alone=len(inputs.media) == 1) for media in inputs.media]
    taken = {media.path.resolve() for media in inputs.media} | {path.resolve() for path in inputs.stores}
    taken |= {(root / TABLE).resolve() for root in inputs.crops} | {root.resolve() for root in inputs.crops}
    for path in places:
        if path.resolve() in taken:
            raise ConfigError(
                f"{path} would be written over an input, or over another output. Expected --out, --page and --overlay "
                "to name files of their own. Choose other names."
            )
        taken.add(path.resolve())


def predict_with(models: list[Model], inputs: Inputs, settings: PredictSettings, listener: Listener) -> PredictResult:
    """Predict with models that are open already; as ``predict``, but for the settings that say which."""
    assert settings.out is not None
    rule = DecisionRule(smooth=settings.smooth, width=settings.smooth_width or 1)
    weights = parse_weights(settings.weights, len(models))
    require_one_level([model.task for model in models], smooth=settings.smooth, page=settings.page is not None)
    heads = heads_by_task(models, rule, weights, fitted=settings.decide == "fitted")
    refusal = ConfigError(
        f"Another 'affcache predict' writes {settings.out}. Expected to be alone there. Wait, or choose another --out."
    )
    with locked(settings.out.with_name(f".{settings.out.name}{LOCK}"), refusal, listener):
        return _Prediction(settings, models, heads, listener).run(inputs)


class _Prediction:
    """One run of ``predict``."""

    def __init__(
        self, settings: PredictSettings, models: list[Model], heads: list[TaskHeads], listener: Listener
    ) -> None:
        assert settings.out is not None
        self.settings, self.out, self.listener = settings, settings.out, listener
        self.models, self.heads = models, heads
        made = {name: value for name, value in asdict(settings).items() if name not in NOT_DECIDING}
        made["heads"] = [hashlib.sha256(model.trained.folder.head.read_bytes()).hexdigest() for model in models]
        made["rules"] = [one.rule.to_json() for one in heads]
        self.kept = FinishedInputs(self.out.with_name(f".{self.out.name}.parts"), made)
        self.known: dict[str, FinishedInput] = {}  # by the name of the input; what happens to its file meanwhile or not
        self.damaged = Damaged(self.out.with_name(f"{self.out.name}.unreadable.txt"), listener)
        require_different_columns(heads, settings.columns, [*KEYS.names, *POINTS, CROPS_OF])
        outputs = [column for one in heads for column in one.columns(settings.columns)]
        self.schema = pa.schema([*KEYS, *outputs])
        self.kept_schema = pa.schema([*self.schema, *((name, pa.float32()) for name in POINTS)])

    def run(self, inputs: Inputs) -> PredictResult:
        """Predict all inputs, and write what was asked for."""
        start = time.perf_counter()
        try:
            for media in inputs.media:
                if (kept := self.kept.finished(media)) is not None:
                    self.known[media.name] = kept
            pending = [media for media in inputs.media if media.name not in self.known]
        except ConfigError:
            self.listener.message("what an earlier run kept was made with other settings: beginning anew")
            self.kept.remove()
            self.known, pending = {}, list(inputs.media)
        if len(pending) < len(inputs.media):
            self.listener.message(f"continuing: {len(inputs.media) - len(pending)} of {len(inputs.media)} are finished")
        if pending:
            self._predict_media(pending)
        self.damaged.write()
        faces = 0
        shown = PredictionPage(self.heads, self.settings.columns, self.settings)

        def tables() -> Iterator[pa.Table]:
            nonlocal faces
            for table, source in self._tables(inputs.stores, inputs.crops, inputs.media):
                table = rows_of_videos(table) if self.heads[0].task.level == "video" else table
                faces += int(table["success"].to_numpy().sum())
                if self.settings.page is not None:
                    shown.add(table, source)
                yield table
            if not faces:  # before the table takes its name
                raise InputError(self._why_nothing(len(inputs.media)))

        try:
            rows = write_table(self.out, self.schema, tables())
        except InputError:
            if not faces:
                self.kept.remove()  # nothing to go on from
            raise
        if self.settings.page is not None:
            discard_partials(self.settings.page)
            write_text(self.settings.page, shown.html())
        overlays = self._draw(self.settings.overlay, inputs.media) if self.settings.overlay else []
        self.kept.remove()
        seconds = time.perf_counter() - start
        return PredictResult(
            out=str(self.out),
            runs=tuple(model.trained.source for model in self.models),
            tasks=tuple(one.task.name for one in self.heads),
            rules={one.task.name: one.rule.in_words(one.task.classes) for one in self.heads},
            inputs=len(inputs.stores) + len(inputs.crops) + len(inputs.media) - len(self.damaged.reasons),
            rows=rows,
            faces=faces,
            unreadable=tuple(map(str, self.damaged.reasons)),
            unreadable_list=str(self.damaged.path) if self.damaged.reasons else None,
            overlays=tuple(overlays),
            page=str(self.settings.page) if self.settings.page else None,
            seconds=seconds,
            rate=rows / seconds,
        )

    def _why_nothing(self, media: int) -> str:
        if media:  # without a face, rows are frames
            return self.damaged.why_nothing(self.settings, media, sum(one.rows for one in self.known.values()))
        return (
            f"None of the crops of {', '.join(map(str, self.settings.inputs))} has an embedding, or can be read. "
            "Expected some that can. Look at the files, or extract them anew."
        )

    def _tables(
        self, stores: Sequence[Path], crops: Sequence[Path], media: Sequence[Media]
    ) -> Iterator[tuple[pa.Table, Source]]:
        """Yield the table of each input, and what pictures of its rows can be had from."""
        of_each = [len(model.trained.encoders) for model in self.models]
        apart = max(of_each) == len(encoders_of_models(self.models)) == 1  # else one of each encoder, side by side
        for group in [[path] for path in stores] if apart else [stores] if stores else []:
            yield self._predict_stores(group, named=apart and len(stores) > 1), None
        for root in crops:
            encoder = self._encoder
            with on_device(encoder.device):
                yield self._predict_rows(rows_of_crops(root, encoder, self._batch_size(encoder), self.listener)), root
        for one in media:
            if one.name in self.known:
                yield self.kept.table(self.known[one.name]), one

    @cached_property
    def _encoder(self) -> AnyEncoder:
        """All encoders side by side, in the order of ``TaskHeads.inputs``."""
        for model in self.models:
            model.require_one_crop_a_frame()
        return side_by_side([model.encoder_of(number) for model, number in encoders_of_models(self.models).values()])

    def _batch_size(self, encoder: AnyEncoder) -> int:
        each = encoder.encoders if isinstance(encoder, Encoders) else (encoder,)
        return self.settings.batch_size or min(map(find_batch_size, each))

    def _predict_stores(self, paths: Sequence[Path], *, named: bool) -> pa.Table:
        """Predict the frames of which the stores of at least one head have an embedding."""
        runs = [
            [TrainedRun(**vars(model.trained), store=open_store(paths, model.trained)) for model in one.models]
            for one in self.heads
        ]
        warn_of_unused(paths, [run for of_task in runs for run in of_task], self.listener)
        ensembles = [Ensemble.of(of_task, self.listener) for of_task in runs]
        frames, rows = all_frames([one.frames for one in ensembles])
        keys, numbers, videos = keys_of_frames(frames, named=named), frames.frame_number, frames.video_of_rows()
        for one, ensemble, own in zip(self.heads, ensembles, rows, strict=True):
            known = np.flatnonzero(own != ABSENT)
            logits = ensemble.logits(own[known], "plain", self.listener)
            shares = ensemble.shares(own[known], one.rule.weights)
            said = output_columns([one], logits, known, videos, numbers, self.settings.columns, shares)
            for name, column in said.items():
                keys = keys.append_column(name, column)
        return keys

    def _predict_rows(self, given: EmbeddedRows) -> pa.Table:
        """Predict rows of crops or a store."""
        logits, found = LogitsOfHeads(self.heads), [np.empty(0, np.int64)]
        done = 0
        for rows, embeddings in given.parts:
            logits.add(embeddings)
            found.append(rows)
            done += len(rows)
            self.listener.progress(done, given.total, "crop", given.name)
        rows, frames = np.concatenate(found), given.keys["frame"].to_numpy()
        said = logits.columns(rows, given.persons, frames, self.settings.columns)
        known = np.isin(np.arange(len(frames)), rows)
        columns = {name: given.keys[name] for name in given.keys.column_names}
        return pa.table(columns | {"success": pa.array(known)} | said)

    def _predict_media(self, media: Sequence[Media]) -> None:
        """Find, encode and predict the faces of photos and videos, and keep the table of each as it is finished."""
        encoder = self._encoder  # before a detector is fetched: there may be none
        scanner = Scanner(self.settings, load_detector(self.settings.detector))
        with ExitStack() as stack:
            stack.enter_context(on_device(encoder.device))
            batch_size = self._batch_size(encoder)
            pool = stack.enter_context(EncodePool(encoder, batch_size, self.listener))
            batches, gathered = FaceBatches(pool, batch_size), FinishedPhotos(self.heads, self._keep)
            for done, scan in enumerate(stack.enter_context(closing(scanner.scans(media)))):
                try:
                    with closing(scan.frames):
                        self._scan(scan, batches, gathered, done, len(media))
                except DamagedMediaError as error:
                    self.damaged.add(scan.media, error)
            batches.finish()
            gathered.finish()

    def _scan(self, scan: Scan, batches: FaceBatches, gathered: FinishedPhotos, done: int, total: int) -> None:
        """Hand the faces of one input to the encoder; it is finished when the last of them has come back."""
        media, count, damaged = scan.media, scan.count, 0
        if media.is_photo:
            work = gathered.begin(media, scan.tracker)
        else:
            logits = LogitsOfHeads(self.heads)
            work = MediaWork(
                media, scan.tracker, lambda one: logits.add(one[None]), lambda work: self._keep([work], logits)
            )
        for found in scan.frames:
            damaged += found.damaged
            work.add(found, batches)
            if total == 1:
                self.listener.progress(found.number, max(count.frames, found.number), "frame")
            elif not media.is_photo:
                self.listener.progress(done, total, "input", f"{media.path.name}, frame {found.number:,}")
        if damaged:
            self.listener.warning(f"{media.path}: {counted(damaged, 'frame')} damaged; no faces are taken from them")
        work.scanned()
        if total > 1:
            self.listener.progress(done + 1, total, "input")

    def _keep(self, works: Sequence[MediaWork], logits: LogitsOfHeads) -> None:
        """Keep the tables of inputs of which all is known, whose logits came in their order."""
        tables, persons, rows = [], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        first = 0  # row, and person: of several inputs, none is another's
        for work in works:
            table, whose = work.table(self.settings.same_person)
            tables.append(table)
            persons.append(whose + first)
            rows.append(np.asarray(work.said, np.int64) + first)
            first += len(table)
        whole, frames = pa.concat_tables(tables), np.concatenate([table["frame"].to_numpy() for table in tables])
        said = logits.columns(np.concatenate(rows), np.concatenate(persons), frames, self.settings.columns)
        whole = pa.table({name: whole[name] for name in whole.column_names} | said).select(self.kept_schema.names)
        path = self.kept.folder / f"{secrets.token_hex(8)}{KEPT_SUFFIX}"
        self.kept.write([(work.media, work.file) for work in works], whole, [len(table) for table in tables], path)
        self.kept.add(path)
        self.known |= {one.name: one for one in self.kept.every() if one.path == path}

    def _draw(self, asked: Path, media: Sequence[Media]) -> list[str]:
        """Draw the overlays; return their paths."""
        paths = []
        for one in media:
            if one.name in self.known:
                path = overlay_path(asked, one, alone=len(media) == 1)
                self.listener.message(f"drawing {path}")
                draw_overlay(path, one, self.kept.table(self.known[one.name]), self.heads, self.settings.columns)
                paths.append(str(path))
        return paths

"""A run made into a folder in the Hugging Face layout, which needs neither the run nor its data."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import affcache
from affcache.errors import ConfigError, InputError
from affcache.files import beside, cannot_write, read_bytes, write_tensors, write_text
from affcache.prediction.card import UNKNOWN, UNNAMED, CardWords, card_of_run, licence_of, metrics_of, without_folders
from affcache.prediction.model import LARGEST_CARD, Model
from affcache.prediction.onnx_export import PIXELS, export_graphs, require_onnx, sentences, why_no_pixels
from affcache.prediction.settings import PublishSettings
from affcache.progress import Listener, Result
from affcache.scoring.published import CARD, FORMAT, FORMAT_VERSION, HEAD, read_published, write_sealed
from affcache.scoring.trained import TrainedHead
from affcache.settings import RUNS, command
from affcache.store.description import SIDE_BY_SIDE
from affcache.tasks.own import task_to_json
from affcache.training.run_folder import newest_run, settings_to_json
from affcache.training.settings import chosen_on

OF_MACHINE = ("annotations", "device", "memory")  # among the settings of a run
PREPROCESSING = ("image_size", "resize", "mean", "std")  # in an encoder's description
CROPS = "one face, upright and aligned, cropped as in the training data; Aff-Wild2's crops have 112 x 112 pixels"


@dataclass(frozen=True)
class PublishResult(Result):
    """What was published."""

    out: str
    run: str
    task: str
    metric: str
    value: float | None  # on validation; None where the run was not scored
    rule: bool  # whether a fitted rule went along; of several tasks, one of each
    files: tuple[str, ...]
    bytes: int
    onnx: dict[str, float]  # of each graph the largest difference to torch


@command(PublishSettings)
def publish(settings: PublishSettings, listener: Listener) -> PublishResult:
    """Write a folder with a run's best head that ``affcache.load`` opens anywhere: head, config.json, model card.

    With ``onnx`` it holds the head as ONNX too, and encoder and head in one, each checked against torch.

    Raises:
        InputError: no run, a card that can't be read, or a folder that can't be written.
        StoreError: the run is damaged; with ``onnx``, its encoder is another one now.
        ConfigError: the folder isn't empty or isn't said, or ``onnx`` lacks its packages, differs from torch, or is
            asked for of whole videos.
    """
    out = _free(settings.out)
    if settings.onnx:
        require_onnx()
    model = Model(TrainedHead.open(settings.run or newest_run(RUNS).path, "cpu", listener))
    if settings.onnx and model.task.level == "video":
        raise ConfigError(
            f"--onnx writes graphs of frames, and task {model.task.name} says one thing of a whole video. Expected no "
            "--onnx. Leave it out: affcache.load pools a video's frames."
        )
    trained, words, metrics = model.trained, _words(settings, model.trained), metrics_of(model.trained)
    _warn(words, metrics, listener)
    if settings.onnx and (why := why_no_pixels(model)):
        listener.warning(f"There is no {PIXELS}: {why}.")
    try:
        with beside(out) as folder:
            folder.mkdir()
            graphs = export_graphs(model, folder) if settings.onnx else {}
            write_text(folder / CARD, card_of_run(trained, words, sentences(graphs)))
            write_tensors(folder / HEAD, {**trained.head.state_dict(), **trained.scaler.tensors()}, _header(trained))
            content = {path.name: path for path in sorted(folder.iterdir())}
            write_sealed(folder, _config(trained, words, metrics, graphs), content)
            if out.is_dir():
                out.rmdir()  # empty; not every system renames onto a folder
    except OSError as error:
        raise cannot_write(out, error) from None
    read_published(out, str(out))  # as whoever loads it will
    files = sorted(out.iterdir())
    return PublishResult(
        out=str(out),
        run=trained.source,
        task=trained.task.name,
        metric=trained.task.metric,
        value=metrics["value"] if metrics else None,
        rule=_rules(trained) is not None,
        files=tuple(path.name for path in files),
        bytes=sum(path.stat().st_size for path in files),
        onnx={name: of["largest_difference"] for name, of in graphs.items()},
    )


def _free(out: Path | None) -> Path:
    """Return the folder to write; raises ConfigError unless it is said, and empty or new."""
    if out is None:
        raise ConfigError("Expected --out FOLDER: where the published head goes, an empty or a new folder.")
    try:
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise cannot_write(out, error) from None
    if taken:
        raise ConfigError(
            f"{out} is there already, and isn't an empty folder. Expected an empty or a new one, so that nothing is "
            "lost. Choose another with --out FOLDER, or delete that one."
        )
    return out


def _words(settings: PublishSettings, trained: TrainedHead) -> CardWords:
    """Return what the user says of a head, or said when it was published before."""
    before = trained.config if trained.published else {}
    own = ""
    if settings.card is not None:
        try:
            own = read_bytes(settings.card, LARGEST_CARD).decode("utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{settings.card} can't be read: {getattr(error, 'strerror', None) or error}. Expected Markdown in "
                "UTF-8, for a section of the card. Check --card FILE."
            ) from None
    data = " ".join(settings.data.split()) or str(before.get("data") or UNNAMED)
    license = str(before.get("license") or UNKNOWN) if settings.license == UNKNOWN else settings.license
    return CardWords(data, license, own)


def _warn(words: CardWords, metrics: Any, listener: Listener) -> None:
    """Say what the card lacks."""
    if words.data == UNNAMED:
        listener.warning("The card doesn't name the training data. Say --data TEXT: who uses the head has to know.")
    if words.license == UNKNOWN:
        listener.warning("The card names no licence. Say --license NAME, one that the training data allow.")
    if metrics is None:
        listener.warning(
            "The card has no figures: the run was not scored on the store it was trained on, or on another since. Say "
            "'affcache score RUN' first."
        )


def _header(trained: TrainedHead) -> dict[str, Any]:
    return {"format": FORMAT, "format_version": FORMAT_VERSION, "task": trained.task.name, "epoch": trained.epoch}


def _rules(trained: TrainedHead) -> dict[str, Any] | None:
    """Return the fitted rule, of several tasks that of each by its name; None without one."""
    each = {one.task.name: one.rule.to_json() for one in trained.by_task if one.rule is not None}
    return (each if trained.task.parts else each[trained.task.name]) if each else None


def _config(trained: TrainedHead, words: CardWords, metrics: Any, graphs: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json but for the files' sums: all that a head needs, and nothing of this machine."""
    licence, source = licence_of(trained.encoder)
    decided = {name: value for name, value in settings_to_json(trained.settings).items() if name not in OF_MACHINE}
    every = [{name: one[name] for name in PREPROCESSING if name in one} for one in trained.encoders]
    prepared = every[0] if len(every) == 1 else {SIDE_BY_SIDE: every}
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model_type": FORMAT,
        "library_name": "affcache",
        "affcache": affcache.__version__,
        "task": task_to_json(replace(trained.task, labels=None)),
        "settings": decided,
        "chosen_on": chosen_on(trained.config),
        "epoch": trained.epoch,
        "width": trained.width,
        "encoder": without_folders(trained.encoder),
        "encoder_fingerprint": trained.encoder_fingerprint,
        "encoder_licence": {"licence": licence, "known_from": source},
        "preprocessing": {"crops": CROPS, **prepared, "embeddings": "rounded to float16, not normalised"},
        "postprocessing": _rules(trained),
        "data": words.data,
        "license": words.license,
        "metrics": metrics,
        "metrics_fitted": metrics_of(trained, "fitted"),
        "onnx": dict(graphs),
    }

"""The run folder: what a training run leaves behind, written so that a kill at any moment leaves it usable.

Every file is written under a temporary name and renamed. No pickle anywhere.
"""

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from affcache.errors import ConfigError, InputError, StoreError, first_line
from affcache.files import (
    LARGEST_JSON,
    LOCK,
    cannot_write,
    discard_partials,
    locked,
    parse_json,
    read_bytes,
    read_json,
    remove,
    write_json,
    write_text,
)
from affcache.progress import Listener
from affcache.settings import RUNS, as_text, build, flag
from affcache.store.description import encoders_of, require_sound
from affcache.store.pooled import PooledStore, RowStore
from affcache.tasks.task import Task
from affcache.tasks.tasks import find_task, name_of_same, task_from_json, task_of_run
from affcache.training.settings import FitSettings

ELSEWHERE = ("store", "annotations", "device")  # may be said anew for a run that is continued
MORE_EPOCHS = " Another number of epochs is another run from the start: the learning rate's cosine spans them all."
CONFIG: dict[str, type] = {  # what readers of config.json take from it, and its type
    "task": str, "settings": dict, "settings.annotations": str, "labels": dict, "labels.train": dict, "store": dict,
}  # fmt: skip
OF_STORE: dict[str, type] = {"path": str, "fingerprint": str, "encoder": dict, "encoder_fingerprint": str}


def _within(config: Mapping[str, Any], name: str) -> Any:
    """Return what config.json says under a name such as store.path."""
    table, _, key = name.rpartition(".")
    inner = config.get(table) if table else config
    return inner.get(key) if isinstance(inner, dict) else None


class RunFolder:
    """The files of one run.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"  # everything that decides the run, resolved
        self.history = path / "history.jsonl"  # a line an epoch
        self.head = path / "head.safetensors"  # of the best epoch
        self.last = path / "last.safetensors"  # of the last epoch, with the optimiser's and the generators' state
        self.scores = path / "scores.json"  # what ``score`` found
        self.predictions = path / "predictions.h5"  # probabilities per frame, written by ``score``

    def read_config(self) -> dict[str, Any]:
        """Return config.json.

        Raises:
            InputError: this is no run folder, or its config.json is damaged.
        """
        try:
            config = read_json(self.config)
            missing = [name for name, kind in CONFIG.items() if not isinstance(_within(config, name), kind)]
            if missing:  # other programs write a config.json too
                raise ValueError(f"config.json doesn't have {', '.join(missing)}")
            several = config["store"].get("stores", [config["store"]])
            if not (isinstance(several, list) and several and all(isinstance(store, dict) for store in several)):
                raise ValueError("config.json doesn't describe its stores")
            for store in (config["store"], *several):
                lacking = [name for name, kind in OF_STORE.items() if not isinstance(store.get(name), kind)]
                if lacking:
                    raise ValueError(f"config.json doesn't have {', '.join(f'store.{name}' for name in lacking)}")
            encoder, sha256, width = (config["store"].get(name) for name in ("encoder", "encoder_fingerprint", "width"))
            require_sound(encoder, sha256, width)
            if encoders_of(encoder) != [store["encoder"] for store in several]:
                raise ValueError("its stores and the description of their encoders differ")
            if "definition" in config and task_from_json(dict(config["definition"])).name != config["task"]:
                raise ValueError("its definition is of another task")
            held_out = config["labels"]["train"].get("held_out_videos", [])
            if not (isinstance(held_out, list) and all(isinstance(name, str) for name in held_out)):
                raise ValueError("its held_out_videos is no list of names")
            return config
        except (OSError, ValueError, TypeError) as error:
            reason = "no config.json in it" if isinstance(error, FileNotFoundError) else error
            raise InputError(
                f"{self.path} is no run folder that can be read ({reason}). Expected a folder that 'affcache fit' "
                "wrote, with config.json in it. Check the path: runs lie under runs/ unless --run said otherwise."
            ) from None

    def of_split(self, path: Path, split: str, rule: str = "") -> Path:
        """Return where a file of scores goes: plain for validation by the task's own rule, else with their names."""
        words = [path.stem, *([split] if split != "validation" else []), *([rule] if rule else [])]
        return path.with_name("-".join(words) + path.suffix)

    def read_history(self) -> list[dict[str, Any]]:
        """Return the lines of the history, one for each finished epoch, but for a last one without its end.

        Raises:
            StoreError: it is damaged.
        """
        if not os.path.lexists(self.history):
            return []
        try:
            *lines, _ = read_bytes(self.history, LARGEST_JSON).split(b"\n")
            entries = [parse_json(line) for line in lines]
            values = [value for entry in entries for value in entry.values()]
            if not all(isinstance(value, (int, float)) and not abs(value) > 2**63 for value in values):
                raise ValueError("a value is no number")
            return entries
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{self.history} can't be read ({first_line(error)}). Expected a line of JSON for each epoch, as "
                "'affcache fit' wrote it. Restore it from a sound copy, or train again with 'affcache fit'."
            ) from None

    def write_history(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Write the history anew, a line an epoch."""
        write_text(self.history, "".join(json.dumps(entry) + "\n" for entry in entries))


def newest_run(runs: Path) -> RunFolder:
    """Return the run below ``runs`` whose head was saved last.

    Raises:
        InputError: there is none.
    """
    heads = sorted(runs.glob("*/head.safetensors"), key=lambda path: path.stat().st_mtime)
    if not heads:
        raise InputError(
            f"There is no finished run in {runs.absolute()}. Train one with 'affcache fit --task expr', or name a run "
            "folder."
        )
    return RunFolder(heads[-1].parent)


def describe_store(store: RowStore) -> dict[str, Any]:
    """Return what a run keeps of its store of frames, to recognise it by; of several side by side, also of each."""
    store = store.source if isinstance(store, PooledStore) else store  # how videos are pooled, the settings say
    parts = [describe_store(part) for part in store.parts] if len(store.parts) > 1 else []
    return {
        "path": " + ".join(part["path"] for part in parts) or str(store.path.absolute()),
        "fingerprint": store.fingerprint(),
        "encoder": store.encoder,
        "encoder_fingerprint": store.encoder_fingerprint,
        "rows": len(store),
        "width": store.width,
        **({"stores": parts} if parts else {}),
    }


def stores_of_run(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what a run's config.json says of each of its stores, in their order."""
    return list(config["store"].get("stores", [config["store"]]))


def settings_to_json(settings: FitSettings) -> dict[str, Any]:
    """Return the settings that decide a run; its folder, its store and whether it was resumed stand elsewhere."""
    values = {name: value for name, value in asdict(settings).items() if name not in ("run", "resume", "as_", "store")}
    return {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in values.items()}


def fit_command(settings: FitSettings) -> str:
    """Return the call of ``affcache fit`` with these settings, but for the run folder and the machine's."""
    defaults, words = FitSettings(), ["affcache fit"]
    for name, value in asdict(settings).items():
        if name not in ("run", "resume", "as_", "memory", "device") and value != getattr(defaults, name):
            every = value if isinstance(value, tuple) else (value,)
            words += [flag(name) if one is True else f"{flag(name)} {as_text(one)}" for one in every]
    return " ".join(words)


def settings_from_json(values: dict[str, Any]) -> FitSettings:
    """Return the settings that ``settings_to_json`` wrote.

    Raises:
        ConfigError: they were written by another affcache, which knows more of them.
    """
    try:
        return build(FitSettings, {**values, "annotations": Path(values["annotations"])})
    except ConfigError as error:
        raise ConfigError(
            f"The run's config.json is of another affcache, or of one with losses of its own: {error} Use that one."
        ) from None


def refuse_changes(
    refusal: str, instead: str, began: FitSettings, said: Mapping[str, Any], free: Collection[str]
) -> None:
    """Refuse settings that are other than a run's, but for those that are free; ConfigError, with all of them."""
    same = (name for name in asdict(began) if name in said and name not in free)
    changed = [name for name in same if getattr(began, name) != said[name]]
    if changed:
        words = [f"{flag(name)} {getattr(began, name)!r} then, {said[name]!r} now" for name in changed]
        more = MORE_EPOCHS if "epochs" in changed else ""
        raise ConfigError(
            f"{refusal}: {'; '.join(words)}. Expected its own settings.{more} Leave them out, since the run's folder "
            f"knows them, or {instead}."
        )


def continued(settings: FitSettings, given: Collection[str]) -> FitSettings:
    """Return the settings, with the store, of the run that is to be continued; without --resume they stay.

    Args:
        settings: its folder, and what was said beside it.
        given: the names of the settings that were said.

    Raises:
        InputError: there is no run to continue.
        ConfigError: one that was said is another than the run's.
    """
    if not settings.resume or settings.run is None:
        return settings
    folder = RunFolder(settings.run)
    if folder.path.is_dir() and not folder.config.exists() and set(given) - {"run", "resume"}:
        return settings  # of a run that was killed before it was in place: it begins anew
    config = folder.read_config()
    began = settings_from_json(config["settings"])
    refusal = f"Run {settings.run} can't be continued"
    if "task" in given:  # perhaps by the file that defines it
        settings = replace(settings, task=name_of_same(settings.task, task_of_run(config), refusal))
    said = {name: getattr(settings, name) for name in given}
    free, instead = (*ELSEWHERE, "run", "resume", "as_"), "begin a new run with another --run DIR"
    refuse_changes(refusal, instead, began, said, free)
    moved = {name: getattr(settings, name) for name in ELSEWHERE if name in given}
    stores = tuple(Path(store["path"]) for store in stores_of_run(config))
    return replace(began, **{"store": stores, **moved}, run=settings.run, resume=True)


def task_to_fit(settings: FitSettings) -> Task:
    """Return the task of a run that is continued, which its folder knows, or of a new one."""
    folder = RunFolder(settings.run) if settings.run else None
    if settings.resume and folder and folder.config.exists():
        return task_of_run(folder.read_config())
    return find_task(settings.task)


def new_run(task: str) -> RunFolder:
    """Make a folder below runs/ named by task and time, which no other process takes.

    Raises:
        InputError: it can't be made.
    """
    first = RUNS / f"{task}-{datetime.now():%Y%m%d-%H%M%S}"
    path, number = first, 1
    while True:
        try:
            path.mkdir(parents=True)
            return RunFolder(path)
        except FileExistsError:
            number += 1
            path = first.with_name(f"{first.name}-{number}")
        except OSError as error:
            raise cannot_write(path, error) from None


@contextmanager
def locked_run(run: Path | None, task: str, listener: Listener, *, resume: bool) -> Iterator[tuple[RunFolder, bool]]:
    """Give a run folder to train in alone, a new one for None, and whether a run is continued in it.

    A run that was killed before its config.json was in place begins anew. A folder that stays empty is removed.

    Raises:
        ConfigError: the folder is taken, or another process trains in it.
        InputError: there is no run to continue, or the folder can't be written.
    """
    folder = RunFolder(run) if run else new_run(task)
    if resume and not folder.path.is_dir():
        folder.read_config()
    refusal = ConfigError(
        f"Another 'affcache fit' trains in {folder.path}. Expected to be alone there. Wait for it, or choose another "
        "--run DIR."
    )
    try:
        with locked(folder.path / LOCK, refusal, listener):
            for path in (folder.config, folder.history, folder.head, folder.last):
                discard_partials(path)
            begun = any(path.name != LOCK for path in folder.path.iterdir())
            if begun and not resume:
                raise ConfigError(
                    f"{folder.path} already holds something. Expected an empty or new folder. Continue an interrupted "
                    f"run with --run {folder.path} --resume, choose another --run DIR, or delete that folder."
                )
            yield folder, begun
    finally:
        with suppress(OSError):  # something is in it
            folder.path.rmdir()
            if run is None:
                folder.path.parent.rmdir()


def claim_run(folder: RunFolder, config: dict[str, Any], *, resume: bool) -> None:
    """Write the config.json of a new run, or check that the interrupted run in the folder may be continued.

    Raises:
        ConfigError: the run in the folder has other settings or labels.
        StoreError: the store is not the one that the run began with.
        InputError: there is no run to continue, or the folder can't be written.
    """
    if not resume:
        write_json(folder.config, config)
        return
    _require_same(folder, folder.read_config(), config)
    for scores in [*folder.path.glob("scores*.json"), *folder.path.glob("predictions*.h5")]:
        remove(scores)  # out of date once the training goes on


def _require_same(folder: RunFolder, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to continue a run with another store or other labels."""
    if before["store"]["fingerprint"] != now["store"]["fingerprint"]:
        raise StoreError(
            f"The store of run {folder.path} has changed: {now['store']['path']} doesn't hold the embeddings that "
            f"{before['store']['path']} held when the run began. Restore that store, or begin a new run with another "
            "--run DIR."
        )
    if before["labels"] != json.loads(json.dumps(now["labels"])):  # tuples read back as lists
        raise ConfigError(
            f"Run {folder.path} can't be continued: the labels in {now['settings']['annotations']} have changed. "
            "Restore them, or begin a new run with another --run DIR."
        )

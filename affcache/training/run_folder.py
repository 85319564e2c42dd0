"""The run folder: what a training run leaves behind, written so that a kill at any moment leaves it usable.

Every file is written under a temporary name and renamed; history.jsonl grows by whole lines. No pickle anywhere.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from affcache.errors import ConfigError, InputError, StoreError, first_line
from affcache.files import LARGEST_JSON, parse_json, read_bytes, read_json, write_json, write_text
from affcache.settings import as_text, build, flag
from affcache.store.reading import EmbeddingStore
from affcache.training.settings import FitSettings

CONFIG: dict[str, type] = {  # what readers of config.json take from it, and its type
    "task": str, "settings": dict, "settings.annotations": str, "labels": dict, "store": dict, "store.path": str,
    "store.fingerprint": str, "store.encoder": dict, "store.encoder_fingerprint": str,
}  # fmt: skip


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
            return config
        except (OSError, ValueError) as error:
            reason = "no config.json in it" if isinstance(error, FileNotFoundError) else error
            raise InputError(
                f"{self.path} is no run folder that can be read ({reason}). Expected a folder that 'affcache fit' "
                "wrote, with config.json in it. Check the path: runs lie under runs/ unless --run said otherwise."
            ) from None

    def of_split(self, path: Path, split: str) -> Path:
        """Return where a file of scores goes: the plain name for validation, with the split's name for others."""
        return path if split == "validation" else path.with_name(f"{path.stem}-{split}{path.suffix}")

    def finished_epochs(self) -> int:
        """Count the epochs in the history; raises as ``read_history``."""
        return len(self.read_history()) if self.history.exists() else 0

    def read_history(self) -> list[dict[str, Any]]:
        """Return the lines of the history but for a last one that a kill left without its end.

        Raises:
            StoreError: it is missing or damaged.
        """
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

    def append_history(self, entry: dict[str, Any]) -> None:
        """Add one epoch's line."""
        with self.history.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def keep_history(self, epochs: int) -> None:
        """Cut the history to its first ``epochs`` lines; a kill may have left one more, or half a line."""
        if self.history.exists():
            write_text(self.history, "".join(json.dumps(entry) + "\n" for entry in self.read_history()[:epochs]))


def newest_run(runs: Path) -> RunFolder:
    """Return the run below ``runs`` whose head was saved last.

    Raises:
        InputError: there is none.
    """
    heads = sorted(runs.glob("*/head.safetensors"), key=lambda path: path.stat().st_mtime)
    if not heads:
        raise InputError(
            f"There is no finished run in {runs.absolute()}. Train one with 'affcache fit --task expr', or name a run "
            "folder with 'affcache score RUN'."
        )
    return RunFolder(heads[-1].parent)


def describe_store(store: EmbeddingStore) -> dict[str, Any]:
    """Return what a run keeps of its store, to recognise it by."""
    return {
        "path": str(store.path.absolute()),
        "fingerprint": store.fingerprint(),
        "encoder": store.encoder,
        "encoder_fingerprint": store.encoder_fingerprint,
        "rows": len(store),
        "width": store.width,
    }


def settings_to_json(settings: FitSettings) -> dict[str, Any]:
    """Return the settings that decide a run; its folder, its store and whether it was resumed stand elsewhere."""
    values = {name: value for name, value in asdict(settings).items() if name not in ("run", "resume", "store")}
    return {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in values.items()}


def fit_command(settings: FitSettings) -> str:
    """Return the call of ``affcache fit`` with these settings, but for the run folder and the machine's."""
    defaults, words = FitSettings(), ["affcache fit"]
    for name, value in asdict(settings).items():
        if name not in ("run", "resume", "memory", "device") and value != getattr(defaults, name):
            words.append(flag(name) if value is True else f"{flag(name)} {as_text(value)}")
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


def claim_run(folder: RunFolder, config: dict[str, Any], *, resume: bool) -> None:
    """Make a run folder with its config.json, or check that the interrupted run in it may be continued.

    Raises:
        ConfigError: the folder is taken, or the run in it has other settings or labels.
        StoreError: the store is not the one that the run began with.
        InputError: there is no run to continue.
    """
    if resume:
        _require_same(folder, folder.read_config(), config)
        for scores in [*folder.path.glob("scores*.json"), *folder.path.glob("predictions*.h5")]:
            scores.unlink()  # out of date once the training goes on
        return
    require_free(folder)
    folder.path.mkdir(parents=True, exist_ok=True)
    write_json(folder.config, config)


def require_free(folder: RunFolder) -> None:
    """Raise ConfigError when a run folder already holds something."""
    if folder.path.exists() and any(folder.path.iterdir()):
        raise ConfigError(
            f"{folder.path} already holds something. Expected an empty or new folder. Continue an interrupted run "
            f"with --run {folder.path} --resume, choose another --run DIR, or delete that folder."
        )


def _require_same(folder: RunFolder, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to continue a run with another store, other settings or other labels."""
    if before["store"]["fingerprint"] != now["store"]["fingerprint"]:
        raise StoreError(
            f"The store of run {folder.path} has changed: {now['store']['path']} doesn't hold the embeddings that "
            f"{before['store']['path']} held when the run began. Restore that store, or begin a new run with another "
            "--run DIR."
        )
    then = {**settings_to_json(FitSettings()), **before["settings"]}  # what it doesn't name came later
    changed = [
        f"{flag(name)} {then[name]!r} then, {value!r} now"
        for name, value in now["settings"].items()
        if then[name] != value and name not in ("annotations", "device")
    ]
    if before["labels"] != json.loads(json.dumps(now["labels"])):  # tuples read back as lists
        changed.append(f"the labels in {now['settings']['annotations']}")
    if changed:
        raise ConfigError(
            f"Run {folder.path} can't be continued: {'; '.join(changed)}. Say the same settings again, or begin a new "
            "run with another --run DIR."
        )

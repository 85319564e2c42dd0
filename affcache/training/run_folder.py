"""The run folder: what a training run leaves behind, written so that a kill at any moment leaves it usable.

Every file is written under a temporary name and renamed; history.jsonl grows by whole lines. No pickle anywhere.
"""

import json
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from affcache.errors import ConfigError, InputError, StoreError
from affcache.files import write_json, write_text
from affcache.settings import as_text, build, flag
from affcache.store.reading import EmbeddingStore
from affcache.training.settings import FitSettings

ELSEWHERE = ("store", "annotations", "device")  # may be said anew for a run that is continued
MORE_EPOCHS = " Another number of epochs is another run from the start: the learning rate's cosine spans them all."


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
            config = json.loads(self.config.read_text(encoding="utf-8"))
            missing = {"task", "settings", "store", "labels"}.difference(config)
            if missing:  # other programs write a config.json too
                raise ValueError(f"config.json doesn't have {', '.join(sorted(missing))}")
            return dict(config)
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

    def finished_epochs(self) -> int:
        """Count the epochs in the history."""
        return len(self.history.read_text(encoding="utf-8").splitlines()) if self.history.exists() else 0

    def read_history(self) -> list[dict[str, Any]]:
        """Return the lines of the history."""
        return [json.loads(line) for line in self.history.read_text(encoding="utf-8").splitlines()]

    def append_history(self, entry: dict[str, Any]) -> None:
        """Add one epoch's line."""
        with self.history.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def keep_history(self, epochs: int) -> None:
        """Cut the history to its first ``epochs`` lines; a kill may have left one more, or half a line."""
        if self.history.exists():
            lines = self.history.read_text(encoding="utf-8").splitlines(keepends=True)
            write_text(self.history, "".join(lines[:epochs]))


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
    config = RunFolder(settings.run).read_config()
    began = settings_from_json(config["settings"])
    same = (name for name in asdict(began) if name in given and name not in (*ELSEWHERE, "run", "resume"))
    changed = [name for name in same if getattr(began, name) != getattr(settings, name)]
    if changed:
        words = [f"{flag(name)} {getattr(began, name)!r} then, {getattr(settings, name)!r} now" for name in changed]
        more = MORE_EPOCHS if "epochs" in changed else ""
        raise ConfigError(
            f"Run {settings.run} can't be continued: {'; '.join(words)}. Expected its own settings.{more} Leave them "
            "out, since the run's folder knows them, or begin a new run with another --run DIR."
        )
    moved = {name: getattr(settings, name) for name in ELSEWHERE if name in given}
    return replace(began, **{"store": Path(config["store"]["path"]), **moved}, run=settings.run, resume=True)


def claim_run(folder: RunFolder, config: dict[str, Any], *, resume: bool) -> None:
    """Make a run folder with its config.json, or check that the interrupted run in it may be continued.

    Raises:
        ConfigError: the folder is taken, or the run in it has other labels.
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

"""A published head: its folder or its name on the Hugging Face hub, and that no byte has changed since.

config.json holds the sha256 of every other file, and its own: taken with zeros in that one's place.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from affcache.errors import ConfigError, InputError, StoreError, first_line
from affcache.files import LARGEST_JSON, open_regular, parse_json, read_bytes, write_bytes
from affcache.settings import HUB, build
from affcache.store.description import require_sound
from affcache.tasks.kinds import Classes, Task, Units, Values
from affcache.tasks.multitask import MultiTask
from affcache.tasks.tasks import TASKS
from affcache.training.settings import FitSettings

FORMAT, FORMAT_VERSION = "affcache-head", 1
CONFIG, CARD, HEAD = "config.json", "README.md", "head.safetensors"
WEIGHTS = (".safetensors", ".onnx", ".data", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".npz", ".msgpack")
GRAPHS = (".onnx", ".data")  # not fetched from the hub: a graph from pixels holds the encoder
PIECE = 2**20  # bytes
SEAL = re.compile(rb'(?<="config_sha256": ")[0-9a-f]{64}(?=")')
UNSEALED = "0" * 64
MARKS = (b'"format": "affcache-head"', b'"config_sha256": "')  # one of them stays where a byte is changed
KEYS: dict[str, type] = {
    "task": dict, "settings": dict, "epoch": int, "encoder": dict, "encoder_fingerprint": str, "width": int,
    "files": dict,
}  # fmt: skip
KINDS: Mapping[str, type[Task]] = {kind.kind: kind for kind in (Classes, Units, Values, MultiTask)}


def local_folder(location: Path | str) -> tuple[Path, str]:
    """Return the folder of a run or of a published head, fetched from the hub where it is there, and its name.

    Args:
        location: a folder, or ``hf-hub:OWNER/NAME``, with ``@REVISION`` where it isn't to be the newest.

    Raises:
        InputError: it can't be fetched.
    """
    name = location.as_posix() if isinstance(location, Path) else location
    if not name.startswith(HUB):
        return Path(name), name
    from huggingface_hub import snapshot_download

    repository, _, revision = name.removeprefix(HUB).partition("@")
    try:
        found = snapshot_download(repository, revision=revision or None, ignore_patterns=[f"*{end}" for end in GRAPHS])
    except Exception as error:  # a name, a network, a right to read: the hub's client raises nearly anything
        raise InputError(
            f"{name} can't be fetched from the Hugging Face hub ({type(error).__name__}: {first_line(error)}). "
            "Expected the name of a published head, hf-hub:OWNER/NAME, and a network. Check the name; for a private "
            "one log in with 'hf auth login'. Without a network, fetch it elsewhere with 'hf download OWNER/NAME "
            "--local-dir FOLDER', bring that folder here, and name it instead."
        ) from None
    return Path(found), name


def is_published(folder: Path) -> bool:
    """Say whether a folder is of a published head, be it damaged, rather than a run's."""
    with suppress(OSError):
        content = read_bytes(folder / CONFIG, LARGEST_JSON)
        return any(mark in content for mark in MARKS)
    return False


def write_sealed(folder: Path, config: Mapping[str, Any], files: Mapping[str, Path]) -> None:
    """Write config.json, with the sha256 of the folder's other files and its own.

    Raises:
        InputError: the system refuses.
    """
    sums = {name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for name, path in files.items()}
    text = json.dumps({**config, "files": sums, "config_sha256": UNSEALED}, indent=2, ensure_ascii=True) + "\n"
    found = hashlib.sha256(text.encode()).hexdigest()
    write_bytes(folder / CONFIG, SEAL.sub(found.encode(), text.encode()))


def read_published(folder: Path, name: str) -> dict[str, Any]:
    """Return config.json of a published head, once every file is known to be as it was published.

    Args:
        folder: where the files lie.
        name: what the user called it; graphs may be missing of one that the hub has, since they weren't fetched.

    Raises:
        StoreError: a file is missing, has changed, or holds weights that weren't published.
    """
    path = folder / CONFIG
    try:
        content = read_bytes(path, LARGEST_JSON)
        seals = SEAL.findall(content)
        unsealed = SEAL.sub(UNSEALED.encode(), content)
        if len(seals) != 1 or hashlib.sha256(unsealed).hexdigest().encode() != seals[0]:
            raise _changed(path, "it isn't what its own sha256 is of")
        config = parse_json(content)
        if (config["format"], config["format_version"]) != (FORMAT, FORMAT_VERSION):
            raise StoreError(
                f"{path} is of a published head of format {config['format']} {config['format_version']}; this affcache "
                f"reads {FORMAT} {FORMAT_VERSION}. Use the affcache that wrote it, {config['affcache']}."
            )
        wrong = [key for key, kind in KEYS.items() if type(config.get(key)) is not kind]
        sums = {file: str(said["sha256"]) for file, said in config["files"].items()}
        if wrong or not {CARD, HEAD} <= sums.keys() or any(Path(file).name != file for file in sums):
            raise ValueError(f"it lacks {', '.join(wrong) or 'files, or names some elsewhere'}")
        require_sound(config["encoder"], config["encoder_fingerprint"], config["width"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _changed(path, first_line(error)) from None
    for file, expected in sums.items():
        _require_same(folder / file, expected, may_be_missing=name.startswith(HUB) and file.endswith(GRAPHS))
    unknown = sorted(one.name for one in folder.iterdir() if one.suffix in WEIGHTS and one.name not in sums)
    if unknown:
        raise StoreError(
            f"{folder / unknown[0]} was not published with this head: {CONFIG} doesn't name it. Expected no other "
            "weights than those it names. Move it out of the folder, or fetch the folder anew."
        )
    return config


def _require_same(path: Path, expected: str, *, may_be_missing: bool) -> None:
    try:
        found = sha256_of(path)
    except FileNotFoundError:
        if may_be_missing:
            return
        raise _changed(path, "it is missing") from None
    except OSError as error:
        raise _changed(path, f"it can't be read: {error.strerror or error}") from None
    if found != expected:
        raise _changed(path, f"its sha256 is {found}, and {CONFIG} says {expected}")


def _changed(path: Path, reason: str) -> StoreError:
    return StoreError(
        f"{path} is not as it was published: {reason}. Expected every file as 'affcache publish' wrote it. Fetch or "
        "copy the folder anew, or publish the run again."
    )


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file; raises OSError where it can't be read."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def task_to_json(task: Task) -> dict[str, Any]:
    """Return what a task is, so that a head needs no table of tasks."""
    own = {"name": task.name, "kind": task.kind, "classes": list(task.classes), "description": task.description}
    if task.parts:
        return {**own, "parts": [task_to_json(part) for part in task.parts]}
    return {**own, "low": task.low, "high": task.high} if isinstance(task, Values) else own


def task_from_json(values: Mapping[str, Any]) -> Task:
    """Return the task that ``task_to_json`` wrote: ours, where it is the same. Raises ValueError where it is none."""
    classes, name, kind = values.get("classes"), values.get("name"), str(values.get("kind"))
    if not (isinstance(classes, list) and classes and all(isinstance(one, str) for one in classes)):
        raise ValueError("its task has no classes")
    if kind not in KINDS or not isinstance(name, str):
        raise ValueError(f"its task {name!r} is of kind {kind!r}")
    known = TASKS.get(name)
    if known is not None and task_to_json(known) == values:
        return known
    described = (name, tuple(classes), str(values.get("description", "")))
    if kind == MultiTask.kind:
        return _tasks_from_json(name, values)
    if kind == Values.kind:
        return Values(*described, low=float(values.get("low", -1)), high=float(values.get("high", 1)))
    return KINDS[kind](*described)


def _tasks_from_json(name: str, values: Mapping[str, Any]) -> MultiTask:
    """Return the several tasks at once that ``task_to_json`` wrote; raises ValueError where they are none."""
    said = values.get("parts")
    if not (isinstance(said, list) and all(isinstance(one, dict) for one in said)):
        raise ValueError(f"its task {name!r} has no parts")
    if any(one.get("kind") == MultiTask.kind for one in said):
        raise ValueError(f"a part of its task {name!r} has parts itself")
    parts = [task_from_json(one) for one in said]
    task = MultiTask.of(name, parts, str(values.get("description", "")))
    if list(task.classes) != values["classes"] or len({part.name for part in parts}) < len(parts):
        raise ValueError(f"its task {name!r} and the parts of it differ")
    return task


def settings_of_published(values: Mapping[str, Any]) -> FitSettings:
    """Return a published head's settings; where its labels and its store lay, they don't say.

    Raises:
        ConfigError: they were written by another affcache, which knows more of them.
    """
    try:
        return build(FitSettings, values)
    except ConfigError as error:
        raise ConfigError(f"This head was published by another affcache: {error} Use that one.") from None

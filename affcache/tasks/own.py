"""Tasks of one's own: their definitions, as TOML has them, and as runs and published heads keep them."""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from affcache.crops.names import canonical
from affcache.errors import ConfigError, did_you_mean
from affcache.settings import LARGEST_TOML, read_toml
from affcache.tasks.kinds import Classes, Units, Values
from affcache.tasks.label_columns import number_of
from affcache.tasks.multitask import MultiTask
from affcache.tasks.task import Task

KINDS: Mapping[str, type[Task]] = {kind.kind: kind for kind in (Classes, Units, Values)}
LEVELS = ("frame", "video")
ROLES = ("video", "frame", "path", "split", "label", "fold")  # of columns in a table of labels
KEYS: Mapping[str, tuple[type, str]] = {  # of a definition: the type of each, and that in words
    "kind": (str, "classes, units or values"),
    "names": (list, 'a list of texts such as ["calm", "bored"]'),
    "labels": (str, "the path of a CSV or Parquet file, or of a folder with Train_Set and Validation_Set"),
    "range": (list, "the smallest and the largest value, such as [0, 10]"),
    "level": (str, "frame or video"),
    "columns": (dict, 'a table such as {video = "clip", label = "mood"}'),
    "description": (str, "a text"),
}
LARGEST_VALUE = float(np.finfo(np.float32).max)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def read_task_file(path: Path, taken: Collection[str]) -> Task:
    """Read a TOML file that defines a task; unless it says ``name``, the file's stem is it.

    Args:
        path: the file.
        taken: names that a task of one's own can't have.

    Raises:
        ConfigError: it can't be read, or something is wrong in it: all of it at once.
    """
    try:
        content = read_toml(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--task {path} can't be read: {reason}. Expected a TOML file of at most {LARGEST_TOML:,} bytes that "
            "defines a task: kind, names and labels. Check the path, or correct the file."
        ) from None
    return task_of_table(content.pop("name", path.stem), content, path.absolute().parent, str(path), taken)


def task_of_table(name: Any, table: Any, folder: Path, where: str, taken: Collection[str]) -> Task:
    """Return the task that a table defines.

    Args:
        name: of the task.
        table: what TOML has.
        folder: what paths in it are relative to.
        where: the file, or the table in it, for messages.
        taken: names that a task of one's own can't have.

    Raises:
        ConfigError: something is wrong: all of it at once.
    """
    problems = [*_problems_of_name(name, taken), *_problems(table)]
    if problems:
        raise ConfigError(
            f"{where}: {'; '.join(problems)}. Expected a task: {', '.join(KEYS)}, of which kind, names and labels are "
            "needed, and for values range (docs/own-tasks.md). Correct the file."
        )
    common = {
        "name": name,
        "classes": tuple(table["names"]),
        "description": table.get("description", ""),
        "labels": folder / Path(table["labels"]).expanduser(),
        "level": table.get("level", "frame"),
        "columns": tuple(sorted(table.get("columns", {}).items())),
    }
    low, high = map(float, table.get("range", (-1, 1)))
    return Values(**common, low=low, high=high) if table["kind"] == Values.kind else KINDS[table["kind"]](**common)


def _problems_of_name(name: Any, taken: Collection[str]) -> Iterator[str]:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        yield f"the name {name!r} is none for a task; expected letters, digits, - and _"
    elif name in taken:
        yield f"the name {name!r} is that of a task of affcache; expected another than {', '.join(taken)}"


def _problems(table: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a definition."""
    yield from (f"unknown key {key!r}{did_you_mean(key, KEYS)}" for key in table if key not in KEYS)
    needed = ("kind", "names", "labels", *(["range"] if table.get("kind") == Values.kind else []))
    yield from (f"{key} is missing, expected {KEYS[key][1]}" for key in needed if key not in table)
    right: dict[str, Any] = {key: table[key] for key in KEYS if isinstance(table.get(key), KEYS[key][0])}
    for key in KEYS:
        if key in table and key not in right:
            yield f"{key} is {table[key]!r}, expected {KEYS[key][1]}"
    kind = right.get("kind")
    if kind is not None and kind not in KINDS:
        yield f"kind is {kind!r}{did_you_mean(kind, KINDS)}, expected {KEYS['kind'][1]}"
    yield from _problems_of_names(right.get("names"), kind)
    if right.get("labels", "/").startswith("~") and Path(right["labels"]).parts[0] != "~":
        yield f"labels is {right['labels']!r}, expected a path without the name of another user"
    if "range" in right:
        yield from _problems_of_range(right["range"], kind)
    if right.get("level", "frame") not in LEVELS:
        yield f"level is {right['level']!r}{did_you_mean(right['level'], LEVELS)}, expected frame or video"
    yield from _problems_of_columns(right.get("columns", {}), kind, right.get("level"))


def _problems_of_columns(columns: Mapping[str, Any], kind: Any, level: Any) -> Iterator[str]:
    if "label" in columns and kind in KINDS and kind != Classes.kind:
        yield f"columns names label, which is of classes; {kind} have a column for each of names"
    if level == "video" and (of_frames := [role for role in ("frame", "path") if role in columns]):
        yield f"columns names {' and '.join(of_frames)}, but level is video; expected video, of which a row is"
    elif "path" in columns and columns.keys() & {"video", "frame"}:
        yield "columns names path beside video or frame; expected it instead of these"
    for role, header in columns.items():
        if role not in ROLES:
            yield f"columns names {role!r}{did_you_mean(role, ROLES)}, expected some of {', '.join(ROLES)}"
        elif not isinstance(header, str):
            yield f"the column {role} is {header!r}, expected its name in the table"


def _problems_of_names(names: list[Any] | None, kind: Any) -> Iterator[str]:
    if names is None:
        return
    least = 2 if kind == Classes.kind else 1
    if wrong := [name for name in names if not isinstance(name, str) or not name.strip() or set(name) & set(",\n\r")]:
        yield f"names has {wrong[0]!r}, expected texts without commas"
        return
    if twice := [name for name, count in Counter(canonical(name.strip()) for name in names).items() if count > 1]:
        yield f"names has {twice[0]!r} twice, expected each once"
    elif kind == Classes.kind:
        counts = Counter(value for value in map(number_of, names) if not math.isnan(value))
        if same := [name for name in names if counts[number_of(name)] > 1]:
            yield f"names has {' and '.join(map(repr, same))}, which are equal as numbers, expected each number once"
    if spaced := [name for name in names if name != name.strip()]:
        yield f"names has {spaced[0]!r}, expected no spaces around a name"
    if len(names) < least:
        yield f"names has {len(names)}, expected at least {least}"


def _problems_of_range(limits: list[Any], kind: Any) -> Iterator[str]:
    if kind in KINDS and kind != Values.kind:
        yield f"range is given, but {kind} have none; expected it for values alone"
        return
    if not _are_limits(limits):
        yield f"range is {str(limits)[:80]}, expected {KEYS['range'][1]}, as float32 has them"
    elif limits[0] <= Values.invalid_value <= limits[1]:
        yield f"range is {limits!r}, which has {Values.invalid_value} in it, the mark of a frame without a label"


def _are_limits(limits: Sequence[Any]) -> bool:
    """Say whether they are two numbers, the smaller first, also in float32, which labels are."""
    numbers = [value for value in limits if isinstance(value, (int, float)) and not isinstance(value, bool)]
    sound = len(limits) == len(numbers) == 2 and all(abs(value) <= LARGEST_VALUE for value in numbers)  # of nan, too
    return sound and bool(np.float32(numbers[0]) < np.float32(numbers[1]))


def task_to_json(task: Task) -> dict[str, Any]:
    """Return what a task is, so that a head needs no table of tasks."""
    own: dict[str, Any] = {
        "name": task.name,
        "kind": task.kind,
        "classes": list(task.classes),
        "description": task.description,
    }
    if task.parts:
        return {**own, "parts": [task_to_json(part) for part in task.parts]}
    if isinstance(task, Values):
        own |= {"low": task.low, "high": task.high}
    if task.labels is not None:
        own["labels"] = str(task.labels)
    if task.level != "frame":
        own["level"] = task.level
    return {**own, "columns": dict(task.columns)} if task.columns else own


def task_from_json(values: Mapping[str, Any]) -> Task:
    """Return the task that ``task_to_json`` wrote. Raises ValueError where it is none."""
    if values.get("kind") == MultiTask.kind:
        return _tasks_from_json(values)
    classes, name, kind = values.get("classes"), values.get("name"), str(values.get("kind"))
    if not (isinstance(classes, list) and classes and all(isinstance(one, str) for one in classes)):
        raise ValueError("its task has no classes")
    if kind not in KINDS or not isinstance(name, str):
        raise ValueError(f"its task {name!r} is of kind {kind!r}")
    labels, level, columns = values.get("labels"), values.get("level", "frame"), values.get("columns", {})
    columns_ok = isinstance(columns, dict) and all(k in ROLES and isinstance(v, str) for k, v in columns.items())
    if not columns_ok or not isinstance(labels, (str, type(None))) or level not in LEVELS:
        raise ValueError(f"its task {name!r} has labels that aren't described")
    common = {
        "name": name,
        "classes": tuple(classes),
        "description": str(values.get("description", "")),
        "labels": None if labels is None else Path(labels),
        "level": level,
        "columns": tuple(sorted(columns.items())),
    }
    if kind == Values.kind:
        if not _are_limits(limits := (values.get("low", -1), values.get("high", 1))):
            raise ValueError(f"its task {name!r} has no range")
        return Values(**common, low=float(limits[0]), high=float(limits[1]))
    return KINDS[kind](**common)


def _tasks_from_json(values: Mapping[str, Any]) -> MultiTask:
    """Return the several tasks at once that ``task_to_json`` wrote; raises ValueError where they are none."""
    name, said = str(values.get("name")), values.get("parts")
    if not (isinstance(said, list) and said and all(isinstance(one, dict) for one in said)):
        raise ValueError(f"its task {name!r} has no parts")
    if any(one.get("kind") == MultiTask.kind for one in said):
        raise ValueError(f"a part of its task {name!r} has parts itself")
    parts = [task_from_json(one) for one in said]
    task = MultiTask.of(name, parts, str(values.get("description", "")))
    if list(task.classes) != values.get("classes") or len({part.name for part in parts}) < len(parts):
        raise ValueError(f"its task {name!r} and the parts of it differ")
    return task

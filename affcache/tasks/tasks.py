"""The tasks that affcache knows by name: a further task is a further entry of ``TASKS``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from affcache.config import CONFIG_NAME, OWN_TASKS, find_own_tasks
from affcache.errors import ConfigError, did_you_mean
from affcache.settings import TOML
from affcache.tasks import own
from affcache.tasks.kinds import Classes, Units, Values
from affcache.tasks.multitask import MultiTask
from affcache.tasks.task import Task

_SINGLE: dict[str, Task] = {
    task.name: task
    for task in (
        Classes(
            "expr",
            ("Neutral", "Anger", "Disgust", "Fear", "Happiness", "Sadness", "Surprise", "Other"),
            "Facial expression: one of 8 classes per frame, by macro F1",
            ("EXPR_Recognition_Challenge", "EXPR_Classification_Challenge"),
        ),
        Units(
            "au",
            ("AU1", "AU2", "AU4", "AU6", "AU7", "AU10", "AU12", "AU15", "AU23", "AU24", "AU25", "AU26"),
            "Facial action units: 12 present-or-absent labels per frame, by the mean of 12 F1",
            ("AU_Detection_Challenge",),
        ),
        Values(
            "va",
            ("valence", "arousal"),
            "Valence and arousal: two values in [-1, 1] per frame, by the mean of two CCC",
            ("VA_Estimation_Challenge",),
        ),
    )
}
DEFINING = (  # what a head follows from: keys of a definition, and attributes
    ("kind", "kind"), ("names", "classes"), ("lowest value", "low"), ("largest value", "high"), ("level", "level"),
)  # fmt: skip
TASKS: dict[str, Task] = {
    **_SINGLE,
    "mtl": MultiTask.of(
        "mtl",
        [_SINGLE[name] for name in ("va", "expr", "au")],  # in the order of the challenge's files
        "All three at once, from the labels of the multi-task challenge, by the sum of their metrics",
    ),
}


def find_task(name: str) -> Task:
    """Return a task by name, or by the TOML file that defines it.

    A name that isn't in ``TASKS`` is looked for in the tables [task.NAME] of the affcache.toml that counts in the
    working folder.

    Raises:
        ConfigError: there is none of that name, or what defines it is wrong.
    """
    if name in TASKS:
        return TASKS[name]
    if name.lower().endswith(TOML):
        return own.read_task_file(Path(name), TASKS)
    path, tables = find_own_tasks(Path())
    if name in tables:
        return own.task_of_table(name, tables[name], path.parent, f"{path}, [{OWN_TASKS}.{name}]", TASKS)
    known = " or ".join(f"{task.name} ({task.description})" for task in TASKS.values())
    raise ConfigError(
        f"--task {name!r} is unknown{did_you_mean(name, (*TASKS, *tables))}. Expected one of: {known}; or a task of "
        f"your own: --task FILE.toml, or a table [{OWN_TASKS}.{name}] in {CONFIG_NAME}, with kind, names and labels "
        "(docs/own-tasks.md)."
    )


def name_of_same(said: str, began: Task, refusal: str) -> str:
    """Return the name of a task that is said, by it or by a file, for a run of the task ``began``.

    Its labels, columns and description may be others. A run knows its task when nothing else does any more.

    Raises:
        ConfigError: there is none of that name, or the run's is defined otherwise.
    """
    try:
        now = find_task(said)
    except ConfigError:
        if said != began.name:
            raise
        return said
    both = [(key, getattr(began, attribute, None), getattr(now, attribute, None)) for key, attribute in DEFINING]
    changed = [f"{key} {then!r} then, {other!r} now" for key, then, other in both if then != other]
    if changed and now.name == began.name:
        raise ConfigError(
            f"{refusal}: task {now.name} is defined otherwise: {'; '.join(changed)}. Expected its own definition, "
            "which the run's folder keeps. Leave --task out, or train a new run, with another --run DIR."
        )
    return now.name


def is_own(task: Task) -> bool:
    """Say whether a task is none of ``TASKS``, nor some of the several of one, whatever its name."""
    return TASKS.get(task.name) != task and not task.parts


def task_from_json(values: Mapping[str, Any]) -> Task:
    """Return the task that ``task_to_json`` wrote: ours, where it is the same. Raises ValueError where it is none."""
    known = TASKS.get(str(values.get("name")))
    if known is not None and {**own.task_to_json(known), "description": values.get("description")} == values:
        return known
    return own.task_from_json(values)


def definition_of(task: Task) -> dict[str, Any]:
    """Return what a run's config.json says of a task beside its name: the definition of one that isn't ours."""
    return {"definition": own.task_to_json(task)} if TASKS.get(task.name) != task else {}


def task_of_run(config: Mapping[str, Any]) -> Task:
    """Return the task of a run, from its config.json.

    Raises:
        ConfigError: it has no definition, and there is none of that name.
        ValueError: its definition is damaged.
    """
    return task_from_json(config["definition"]) if "definition" in config else find_task(config["task"])

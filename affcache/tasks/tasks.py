"""The tasks that affcache knows by name: a further task is a further entry of ``TASKS``."""

from affcache.errors import ConfigError, did_you_mean
from affcache.tasks.kinds import Classes, Task, Units, Values
from affcache.tasks.multitask import MultiTask

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
TASKS: dict[str, Task] = {
    **_SINGLE,
    "mtl": MultiTask.of(
        "mtl",
        [_SINGLE[name] for name in ("va", "expr", "au")],  # in the order of the challenge's files
        "All three at once, from the labels of the multi-task challenge, by the sum of their metrics",
    ),
}


def find_task(name: str) -> Task:
    """Return a task by name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in TASKS:
        known = " or ".join(f"{task.name} ({task.description})" for task in TASKS.values())
        raise ConfigError(f"--task {name!r} is unknown{did_you_mean(name, TASKS)}. Expected one of: {known}.")
    return TASKS[name]

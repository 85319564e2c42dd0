"""Where the labels of a task are: a challenge's files, the multi-task challenge's one file, or one's own table."""

from pathlib import Path

from affcache.errors import InputError
from affcache.settings import ANNOTATIONS
from affcache.tabular import reading
from affcache.tasks.challenge_file import COLUMNS, FILES, ChallengeFile, find_challenge_files
from affcache.tasks.label_files import (
    SPLIT_FOLDERS,
    LabelFiles,
    LabelSource,
    NoLabels,
    UnlabelledSplit,
    find_label_files,
    require_one,
    require_split,
)
from affcache.tasks.label_table import SUFFIXES, read_label_table
from affcache.tasks.task import Task


def labels_of(task: Task, annotations: Path | None) -> Path:
    """Return where the labels of a task are: where ``annotations`` says, else the task itself, else the usual place."""
    return annotations or task.labels or ANNOTATIONS


def find_labels(annotations: Path | str, task: Task, split: str) -> LabelSource:
    """Return the labels of a split, train or validation.

    Where ``annotations`` is a file they are a table's; else files of a challenge, one a video, or the multi-task
    challenge's one file.

    Raises:
        UnlabelledSplit: no labels of it; says where it looked.
        InputError: no such split, labels of several releases, a table that can't be read, or files of frames where
            labels are of whole videos.
    """
    require_split(split)
    with reading(Path(annotations)):  # a name that is too long
        return _labels_at(Path(annotations), task, split)


def _labels_at(path: Path, task: Task, split: str) -> LabelSource:
    is_table = path.is_file() or (path.suffix.lower() in SUFFIXES and not path.is_dir())
    if is_table and path.name not in FILES.values():
        return read_label_table(path, task).of_split(split)
    if task.level == "video":
        raise InputError(
            f"The {split} labels of task {task.name} are of whole videos, and {path} is no table. Expected one in CSV "
            "or Parquet with a row for each video: label files have a line for each frame. Correct labels where the "
            'task is defined, or --annotations; or, for labels of frames, leave out level = "video".'
        )
    looked = []
    try:
        return LabelFiles(find_label_files(path, task, split), task)
    except NoLabels as none:
        looked.append(str(none))
    wanted = list(task.folders)
    if {part.name for part in task.parts or (task,)} <= COLUMNS.keys():
        files = find_challenge_files(path, split)
        require_one(files, path, task, split)
        if files:
            return ChallengeFile(files[0], task)
        looked.append(f"for {FILES[split]} in {path} and the folders in it")
        wanted.append(FILES[split])
    if not wanted:
        raise UnlabelledSplit(
            f"No {split} labels of task {task.name} found: looked {looked[0]}. Expected a folder with "
            f"{' and '.join(SPLIT_FOLDERS.values())}, or a table in CSV or Parquet. Correct labels where the task is "
            "defined, or say where they are with --annotations."
        )
    raise UnlabelledSplit(
        f"No {split} labels of task {task.name} found: looked {', and '.join(filter(None, looked))}. Say where the "
        'labels are with --annotations DIR, or with annotations = "..." in affcache.toml: the folder that holds '
        f"{' or '.join(wanted)}."
    )

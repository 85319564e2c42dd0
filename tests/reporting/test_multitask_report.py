"""A report of several tasks: a part for each, what is of the run once, and gaps in labels that are shown as gaps."""

import base64
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import affcache
from affcache.reporting.panels.timelines import TaskFrames, TimelineFrames, all_frames
from affcache.tasks.task import Task
from affcache.tasks.tasks import TASKS
from tests.conftest import write_crops
from tests.reporting.test_reporting import Elements
from tests.training.test_multitask_training import mtl_data

QUICK: dict[str, Any] = {"epochs": 4, "hidden_layers": 1, "hidden_width": 16, "batch_size": 16, "rho": 0.05}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and in gaps/ its labels with gaps within the frames: valence alone missing, two units missing."""
    folder = tmp_path_factory.mktemp("several")
    data = mtl_data(folder)
    affcache.fit(task="mtl", run=folder / "run", **data, **QUICK)
    for path in shutil.copytree(data["annotations"], folder / "gaps").iterdir():
        head, *lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            values = line.split(",")
            if number % 5 == 0:
                values[1] = "-5"
            if number % 4 == 0 and values[4] != "-1":
                values[4] = values[9] = "-1"
            lines[number] = ",".join(values)
        path.write_text("\n".join([head, *lines]) + "\n")
    return folder


def frames_of_parts(text: str) -> list[dict[str, Any]]:
    found = re.findall(r'<script type="application/json" class="frames">(.*?)</script>', text, re.DOTALL)
    return [json.loads(one) for one in found]


def bytes_of(text: str | None) -> Any:
    return np.frombuffer(base64.b64decode(text or ""), np.uint8)


def test_each_task_has_its_part_and_what_is_of_the_run_stands_once(made: Path) -> None:
    scored = affcache.score(run=made / "run")
    result = affcache.report(run=made / "run", crops=())
    text = Path(result.out).read_text()
    page = Elements(text)
    ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    ids = [str(one["id"]) for one in page.of("section")]
    assert all(re.fullmatch(r"[a-z-]+", one) for one in ids)
    assert [one["href"] for one in page.of("a")] == [f"#{one}" for one in ids]
    curves = {"va": [], "expr": ["curves"], "au": ["curves"]}
    for task, further in curves.items():
        own = [one for one in ids if one.startswith(f"{task}-")]
        expected = ["scores", *further, "timelines", "hardest-frames", "labels-that-may-be-wrong"]
        assert own == [f"{task}-{name}-section" for name in expected][: len(own)]
        assert len(own) >= len(expected) - 1
    assert ids[-2:] == ["training-section", "settings-section"]
    terms = " + ".join(f"{value:.3f}" for value in scored.scores.further.values())
    assert f"P {scored.scores.value:.3f}" in page.text
    sums = re.search(r"P is mean CCC (\S+) \+ macro F1 (\S+) \+ mean F1 (\S+), each over", page.text)
    assert sums
    assert " + ".join(sums.groups()) == terms
    for part in scored.parts:
        assert f"{part.frames} validation frames of 2 videos." in page.text
    assert f", epoch {scored.epoch}; {scored.frames} validation frames." in page.text
    for words in (
        '"hidden_width": 16',
        "The epoch was chosen on these validation frames",
        "Losses and P over epochs",
        "P is mean",
    ):
        assert page.text.count(words) == 1, words
    kinds = Counter(tag for tag, _ in page.found)
    assert (kinds["canvas"], kinds["article"], kinds["h3"]) == (3, 4, len(ids) - 2)
    assert result.frames == scored.frames
    assert len(page.of("button")) == 3 * 4 + result.hardest + result.suspicious


def test_one_task_has_no_part_of_that_name(made: Path, tmp_path: Path) -> None:
    data = {"store": made / "s.h5", "annotations": made / "labels"}
    affcache.fit(task="expr", run=tmp_path / "run", **data, **QUICK)
    page = Elements(Path(affcache.report(run=tmp_path / "run", crops=()).out).read_text())
    assert [one["id"] for one in page.of("section")][0::5] == ["scores-section", "settings-section"]
    assert not page.of("h3")


def test_gaps_in_labels_are_gaps(made: Path, tmp_path: Path) -> None:
    crops = write_crops(tmp_path / "crops", {"2-30-640x360": range(1, 41)})
    result = affcache.report(run=made / "run", annotations=made / "gaps", crops=(crops,), out=tmp_path / "r.html")
    assert result.pictures > 20
    text = (tmp_path / "r.html").read_text()
    assert "nan" not in re.sub(r"<script.*?</script>|<img[^>]*>", "", text, flags=re.DOTALL).lower()
    affect, expression, units = (part["tasks"][0] for part in frames_of_parts(text))
    assert expression["labelled"] is None
    for one, width in ((affect, 2), (units, 12)):
        labelled, labels = (bytes_of(one[name]).reshape(-1, width) for name in ("labelled", "labels"))
        share = (labelled == 0).mean(axis=0)
        assert ((share > 0.1) == ([True, False] if width == 2 else [unit in (0, 5) for unit in range(12)])).all()
        assert (labels[labelled == 0] == (128 if width == 2 else 0)).all()
        assert (labelled.sum(axis=1) > 0).all(), "frames without any label of the task aren't there"
    assert re.search(r"<b>-, -?\d\.\d\d</b>", text)
    assert "; 2 not labelled</b>" in text


@pytest.mark.parametrize(
    ("task", "labels", "expected", "labelled"),
    [
        (TASKS["expr"], [3, 0], [3, 0], None),
        (TASKS["au"], [[1] * 12, [0] * 12], [1] * 12 + [0] * 12, None),
        (TASKS["au"], [[1] * 12, [-1, 1] * 6], [1] * 12 + [0, 1] * 6, [1] * 12 + [0, 1] * 6),
        (TASKS["va"], [[1, np.nan], [-1, 0.2]], [255, 128, 0, 153], [1, 0, 1, 1]),
    ],
)
def test_labels_of_a_timeline(task: Task, labels: list[Any], expected: list[int], labelled: list[int] | None) -> None:
    given = np.array(labels, task.label_dtype)
    said = TaskFrames(task, np.zeros((2, task.outputs)), np.nan_to_num(given), given)
    (found,) = all_frames(TimelineFrames(["a"], np.zeros(2, np.int64), np.arange(2), [said]))["tasks"]
    assert bytes_of(found["labels"]).tolist() == expected
    assert (None if found["labelled"] is None else bytes_of(found["labelled"]).tolist()) == labelled

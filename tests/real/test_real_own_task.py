"""A task of one's own on real photographs: eight expressions merged into three classes, in one table."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import f1_score

import affcache
from affcache.files import read_tensors
from affcache.tasks.label_files import find_label_files, read_label_file
from affcache.tasks.tasks import TASKS
from tests.conftest import REAL

NAMES = ("neutral", "pleased", "displeased")
MERGED = (0, 2, 2, 2, 1, 2, 1, 2)  # of Neutral, Anger, Disgust, Fear, Happiness, Sadness, Surprise, Other

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not REAL.is_dir(), reason="shared/real is not beside the checkout"),
]


def labelled() -> Iterator[tuple[str, int, str, int]]:
    """Yield the video, the frame number, the split and the merged class of each label; -1 without."""
    for split in ("train", "validation"):
        for video, path in find_label_files(REAL / "annotations", TASKS["expr"], split).items():
            labels, valid = read_label_file(path, TASKS["expr"])
            for number, (one, there) in enumerate(zip(labels.tolist(), valid.tolist(), strict=True), start=1):
                yield video, number, split, MERGED[one] if there else -1


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """The file that defines the task, beside its table."""
    with (tmp_path / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        rows = [("image", "split", "class")]
        rows += [(f"crops/{v}/{n:05d}.jpg", split, NAMES[one] if one >= 0 else "") for v, n, split, one in labelled()]
        csv.writer(file, delimiter=";").writerows(rows)
    path = tmp_path / "mood.toml"
    path.write_text(f"kind = 'classes'\nnames = {json.dumps(NAMES)}\nlabels = 'labels.csv'\n")
    return path


def write_files(folder: Path) -> Path:
    """Write the same labels as Aff-Wild2's files."""
    lines: dict[tuple[str, str], list[str]] = {}
    for video, _, split, one in labelled():
        lines.setdefault((split, video), [",".join(NAMES)]).append(str(one))
    for (split, video), of_video in lines.items():
        path = folder / {"train": "Train_Set", "validation": "Validation_Set"}[split] / f"{video}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(of_video) + "\n")
    return folder


def test_three_merged_classes_from_one_table(real_store: Path, task: Path, tmp_path: Path) -> None:
    recipe: dict[str, Any] = {"store": real_store, "epochs": 8, "device": "cpu"}
    fitted = affcache.fit(task=str(task), run=tmp_path / "run", **recipe)
    ridge = affcache.fit(task=str(task), run=tmp_path / "ridge", store=real_store, head="ridge")
    assert fitted.value > 0.5, "a third is chance"
    assert ridge.value > 0.5

    files = write_files(tmp_path / "files")
    same = affcache.fit(task=str(task), annotations=files, run=tmp_path / "same", **recipe)
    assert same.value == fitted.value
    (tensors, _), (expected, _) = (read_tensors(tmp_path / run / "head.safetensors") for run in ("same", "run"))
    assert all(tensors[name].equal(expected[name]) for name in expected)

    task.unlink()
    scored = affcache.score(run=tmp_path / "run")
    assert scored.scores.value == fitted.value
    assert [one.name for one in scored.scores.classes] == list(NAMES)
    page = tmp_path / "report.html"
    affcache.report(run=tmp_path / "run", crops=(REAL / "cropped_aligned",), out=page)
    assert "displeased" in page.read_text()
    affcache.publish(run=tmp_path / "run", out=tmp_path / "head", data="press photographs", license="apache-2.0")
    model = affcache.load(tmp_path / "head")
    assert model.classes == NAMES

    said = affcache.predict(inputs=(real_store,), run=(tmp_path / "head",), out=tmp_path / "said.csv")
    assert said.rows == 4103
    with Path(said.out).open(encoding="utf-8") as file:
        decided = {(row["input"], int(row["frame"])): row["mood"] for row in csv.DictReader(file)}
    known = {(v, n): NAMES[one] for v, n, split, one in labelled() if split == "validation" and one >= 0}
    both = sorted(decided.keys() & known.keys())
    assert len(both) == fitted.validation_frames
    value = f1_score([known[key] for key in both], [decided[key] for key in both], labels=NAMES, average="macro")
    assert value == pytest.approx(fitted.value, abs=1e-12)

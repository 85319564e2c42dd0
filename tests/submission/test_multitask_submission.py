"""Submissions of the multi-task challenge: by one trunk, or by three runs together; every line filled, in order."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import affcache
from affcache.errors import ConfigError, InputError
from affcache.submission.submit import check_submission, header_of, write_submission
from affcache.submission.template import Template
from affcache.tasks.multitask import MultiTask
from affcache.tasks.tasks import TASKS
from tests.conftest import write_store
from tests.submission.test_submit import HELD, templates
from tests.tasks.challenge import write_challenge
from tests.training.test_multitask_training import WIDTH, mtl_data

MTL = TASKS["mtl"]
assert isinstance(MTL, MultiTask)
HEADER = "image,valence,arousal,expression,aus"
QUICK: dict[str, Any] = {
    "epochs": 2,
    "hidden_layers": 1,
    "hidden_width": 8,
    "batch_size": 16,
    "rho": 0.05,
    "held_out": 0.3,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of all tasks at once, three runs of one each, and a store of test videos."""
    folder = tmp_path_factory.mktemp("runs")
    data = mtl_data(folder)
    for task in ("mtl", "va", "expr", "au"):
        affcache.fit(task=task, run=folder / task, **data, **QUICK)
    features = np.random.default_rng(1).normal(size=(sum(map(len, HELD.values())), WIDTH)).astype(np.float16)
    write_store(folder / "test.h5", HELD, features, unreadable=[1])
    three = [folder / name for name in ("expr", "va", "au")]
    return {"mtl": [folder / "mtl"], "three": three, "store": folder / "test.h5", "data": data}


@pytest.mark.parametrize("by", ["mtl", "three"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(template=templates())
def test_every_line_of_any_template_is_filled_in_order(
    runs: dict[str, Any], tmp_path: Path, by: str, template: tuple[str, list[str]]
) -> None:
    text, locations = template
    file, out = tmp_path / "template.txt", tmp_path / "predictions.txt"
    file.write_bytes(text.encode().replace(b"image_location,", HEADER.encode()))
    result = affcache.submit(run=runs[by], template=file, store=runs["store"], out=out, overwrite=True)
    header, *lines = out.read_text().splitlines()
    assert header == HEADER
    assert [line.partition(",")[0] for line in lines] == locations
    for line in lines:
        fields = line.split(",")
        assert len(fields) == 16
        assert all(-1 <= float(value) <= 1 for value in fields[1:3])
        assert fields[3] in set("01234567")
        assert set(fields[4:]) <= {"0", "1"}
    assert (result.task, result.lines) == ("mtl", len(locations))
    assert list(result.videos_without_crops) == ["no crops"] * any("no crops" in location for location in locations)


def test_three_runs_say_together_what_each_says_alone(runs: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text("".join(f"{video}/{n:05d}.jpg,\n" for video, numbers in HELD.items() for n in (*numbers, 99)))
    said = {}
    for name in ("expr", "va", "au", "three"):
        run = runs["three"] if name == "three" else [path for path in runs["three"] if path.name == name]
        affcache.submit(run=run, template=file, store=runs["store"], out=tmp_path / name)
        said[name] = [line.split(",") for line in (tmp_path / name).read_text().splitlines()[1:]]
    for together, expression, affect, units in zip(*(said[n] for n in ("three", "expr", "va", "au")), strict=True):
        assert together == [*affect, *expression[1:], *units[1:]]


def test_frames_with_crops_are_decided_as_score_decides_them(runs: dict[str, Any], tmp_path: Path) -> None:
    scored = affcache.score(run=runs["mtl"], decide="fitted", smooth="mean", smooth_width=3)
    with h5py.File(scored.predictions_file) as file:
        names = file["au"]["video_name"].asstr()[:]
        keys = [
            f"{names[v]}/{n:05d}.jpg"
            for v, n in zip(file["au"]["video"][:], file["au"]["frame_number"][:], strict=True)
        ]
        decided = dict(zip(keys, file["au"]["decided"][:].tolist(), strict=True))
    template = tmp_path / "t.txt"
    template.write_text("\n".join(f"{key}," for key in keys))
    how = {"decide": "fitted", "smooth": "mean", "smooth_width": 3}
    result = affcache.submit(run=runs["mtl"], template=template, store=runs["data"]["store"], out=tmp_path / "o", **how)
    assert result.rules == {part.task: part.rule for part in scored.parts}
    for line in (tmp_path / "o").read_text().splitlines()[1:]:
        location, *values = line.split(",")
        assert list(map(int, values[3:])) == decided[location]


def test_what_the_challenge_wants_and_runs_lack_is_named(runs: dict[str, Any], tmp_path: Path) -> None:
    data = mtl_data(tmp_path, only="expr")
    run = affcache.fit(task="mtl", run=tmp_path / "run", **data, **QUICK).run
    template = tmp_path / "t.txt"
    template.write_text(f"{HEADER}\n2/00007.jpg,\n")
    with pytest.raises(InputError, match="the runs don't predict va and au"):
        affcache.submit(run=run, template=template, store=runs["store"], out=tmp_path / "o")
    both = [run, *(path for path in runs["three"] if path.name != "expr")]
    assert affcache.submit(run=both, template=template, store=runs["store"], out=tmp_path / "o").lines == 1
    template.write_text(f"image_location,{TASKS['expr'].header}\n2/00007.jpg,\n")
    with pytest.raises(InputError, match="but the run is of mtl"):
        affcache.submit(run=runs["mtl"], template=template, store=runs["store"], out=tmp_path / "p")
    template.write_text("2/00007.jpg,\n")
    with pytest.raises(ConfigError, match="--weights is '1,2'"):
        affcache.submit(run=runs["three"], template=template, store=runs["store"], out=tmp_path / "p", weights="1,2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("image,", "image_location,"), "has the header"),
        (lambda text: text.replace("0.250000", "1.250000"), "line 2"),
        (lambda text: text.replace(",3,0,", ",3.5,0,"), "line 2"),
        (
            lambda text: text.replace(",3,0,", ",8,0,"),
            "line 2: .*with 15 values from -1 to 1 and from 0 to 7 and from 0 to 1",
        ),
        (lambda text: text.replace(",3,0,", ",3,2,"), "line 2"),
        (lambda text: text.replace(",3,0,", ",3,"), "line 2"),
    ],
)
def test_a_file_that_is_not_its_templates_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    template, file = Template(["a/00001.jpg"], ["a"], np.array([1])), tmp_path / "p.txt"
    write_submission(file, template, np.float32([[0.25, -1, 3, *[0] * 12]]), MTL)
    assert file.read_text() == f"{HEADER}\na/00001.jpg,0.250000,-1.000000,3,0,0,0,0,0,0,0,0,0,0,0,0\n"
    assert header_of(MTL) == HEADER
    check_submission(file, template, MTL)
    file.write_text(change(file.read_text()))
    with pytest.raises(InputError, match=message):
        check_submission(file, template, MTL)


def test_a_submission_reads_back_as_labels(runs: dict[str, Any], tmp_path: Path) -> None:
    template = tmp_path / "t.txt"
    template.write_text("".join(f"{video}/{n:05d}.jpg,\n" for video, numbers in HELD.items() for n in numbers))
    write_challenge(tmp_path, "train", {("2", 7): (0, 0, 0, None)})
    out = tmp_path / "training_set_annotations.txt"
    affcache.submit(run=runs["mtl"], template=template, store=runs["store"], out=out, overwrite=True)
    from affcache.tasks.annotations import join_labels

    joined = join_labels(affcache.EmbeddingStore.open(runs["store"]), tmp_path, "mtl", "train")
    assert len(joined) == sum(map(len, HELD.values())) - 1, "all but the one that can't be read"
    assert joined.account.partial == 0

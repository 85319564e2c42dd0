"""Submission files: every template line is filled, in order, whatever the template looks like; then checked again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from affcache.errors import ConfigError, InputError, StoreError
from affcache.scoring.score import score
from affcache.store.reading import EmbeddingStore
from affcache.submission.submit import check_submission, submit, write_submission
from affcache.submission.template import Template, read_frame_counts, read_template
from affcache.tasks.tasks import TASKS
from affcache.training.fit import fit
from tests.conftest import Heard, MakeData, spoil_features, write_labels, write_store

QUICK: dict[str, Any] = {"epochs": 1, "hidden_layers": 1, "hidden_width": 8, "batch_size": 16, "rho": 0.05}
NAMES = ("1-30-640x360", "1-30-640x360_left", "video7_right", "2", "no crops")
HELD = {"1-30-640x360": [3, 4, 9], "1-30-640x360_left": [1], "video7_right": [2, 50], "2": [7, 8], "elsewhere": [1, 2]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each task on random embeddings, and a store of test videos, "store"."""
    folder = tmp_path_factory.mktemp("runs")
    random, found = np.random.default_rng(0), {}
    for task in ("expr", "au", "va"):
        store = folder / f"{task}.h5"
        features = random.normal(size=(120, 16)).astype(np.float16)
        write_store(store, {f"train{i}": range(1, 31) for i in range(4)}, features)
        values = {
            "expr": random.integers(0, 8, 120).tolist(),
            "au": [",".join(map(str, row)) for row in random.integers(0, 2, (120, 12))],
            "va": [",".join(f"{value:.3f}" for value in row) for row in random.uniform(-1, 1, (120, 2))],
        }[task]
        for i in range(4):
            split = "validation" if i == 3 else "train"
            write_labels(folder, task, split, {f"train{i}": values[30 * i : 30 * i + 30]})
        fit(task=task, store=store, annotations=folder, run=folder / task, **QUICK)
        found[task] = folder / task
    features = random.normal(size=(sum(map(len, HELD.values())), 16)).astype(np.float16)
    write_store(folder / "test.h5", HELD, features, unreadable=[1])  # frame 4 of the first video
    return {**found, "store": folder / "test.h5"}


@st.composite
def templates(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A template's text and its locations: gaps anywhere, whole videos missing, either line end, dummies or none."""
    locations = [
        f"{video}/{number:05d}.jpg"
        for video in draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
        for number in sorted(draw(st.sets(st.integers(1, 60), min_size=1, max_size=12)))
    ]
    if not any(location.split("/")[0] in HELD for location in locations):
        locations.append("2/00001.jpg")
    ending = draw(st.sampled_from(["\n", "\r\n"]))
    tail = draw(st.sampled_from([",", ",0", ",-5,-5", ",0,0,0,0,0,0,0,0,0,0,0,0", ""]))
    header = draw(st.sampled_from(["image_location,", "image_location", ""]))
    start = draw(st.sampled_from(["", "\ufeff"]))
    end = draw(st.sampled_from(["", ending, ending * 3]))
    lines = [*([header] if header else []), *(location + tail for location in locations)]
    return start + ending.join(lines) + end, locations


@pytest.mark.parametrize("task", ["expr", "au", "va"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(template=templates())
def test_every_line_of_any_template_is_filled_in_order(
    runs: dict[str, Path], tmp_path: Path, task: str, template: tuple[str, list[str]]
) -> None:
    text, locations = template
    file, out = tmp_path / "template.txt", tmp_path / "predictions.txt"
    file.write_bytes(text.encode())
    result = submit(run=runs[task], template=file, store=runs["store"], out=out, overwrite=True)
    header, *lines = out.read_text().splitlines()
    assert header == "image_location," + ",".join(TASKS[task].classes)
    assert [line.partition(",")[0] for line in lines] == locations
    low, high = TASKS[task].valid_range
    for line in lines:
        values = line.split(",")[1:]
        assert len(values) == TASKS[task].values_per_line
        assert all(low <= float(value) <= high for value in values)
        assert task == "va" or all(value.isdigit() for value in values)
    assert result.lines == len(locations)
    assert list(result.videos_without_crops) == ["no crops"] * any("no crops" in location for location in locations)


def predictions_of(
    run: Path, runs: dict[str, Path], frames: dict[str, list[int]], tmp_path: Path, **more: Any
) -> list[list[str]]:
    file = tmp_path / "template.txt"
    file.write_text("\n".join(f"{video}/{n:05d}.jpg," for video, numbers in frames.items() for n in numbers))
    submit(run=run, template=file, store=runs["store"], out=tmp_path / "out.txt", **more, overwrite=True)
    return [line.split(",")[1:] for line in (tmp_path / "out.txt").read_text().splitlines()[1:]]


def test_gaps_lie_on_the_line_between_neighbours_and_ends_repeat(runs: dict[str, Path], tmp_path: Path) -> None:
    frames = {"1-30-640x360": [1, 3, 4, 5, 6, 9, 40], "video7_right": [2, 14, 50], "no crops": [1]}
    found = np.array(predictions_of(runs["va"], runs, frames, tmp_path), dtype=float)
    one, three, four, five, six, nine, forty = found[:7]
    np.testing.assert_allclose([one, forty], [three, nine])
    for number, value in ((4, four), (5, five), (6, six)):  # frame 4 has a crop that can't be read
        np.testing.assert_allclose(value, three + (nine - three) * (number - 3) / 6, atol=2e-6)
    np.testing.assert_allclose(found[8], found[7] + (found[9] - found[7]) / 4, atol=2e-6)
    np.testing.assert_allclose(found[10], (three + nine + found[7] + found[9]) / 4, atol=2e-6)


def test_frames_with_crops_are_decided_as_score_decides_them(
    learnable: MakeData, tmp_path: Path, runs: dict[str, Path]
) -> None:
    data = learnable()
    run = tmp_path / "run"
    fit(store=data[0], annotations=data[1], run=run, **{**QUICK, "epochs": 4})
    scored = score(run=run)
    store = EmbeddingStore.open(data[0])
    names = [name for index, name in enumerate(store.video_names) if index % 3 == 2]
    counts = tmp_path / "frames.csv"
    counts.write_text("video,frames\n" + "".join(f"{name},40\n" for name in names))
    result = submit(run=run, frames=counts, store=data[0], out=tmp_path / "out.txt")
    decided = [int(line.rpartition(",")[2]) for line in (tmp_path / "out.txt").read_text().splitlines()[1:]]
    labels = np.concatenate(
        [
            np.loadtxt(data[1] / "EXPR_Recognition_Challenge" / "Validation_Set" / f"{name}.txt", skiprows=1)
            for name in names
        ]
    )
    assert TASKS["expr"].score(labels, np.array(decided)).value == scored.scores.value
    assert (result.filled, result.videos, result.lines) == (0, 2, 80)


def test_what_is_filled_and_missing_is_said(runs: dict[str, Path], tmp_path: Path) -> None:
    file, heard = tmp_path / "t.txt", Heard()
    file.write_text("2/00007.jpg,\n2/00009.jpg,\nno crops/00001.jpg,\n1-30-640x360/00004.jpg,\n")
    result = submit(run=runs["expr"], template=file, store=runs["store"], out=tmp_path / "o.txt", listener=heard)
    assert (result.filled, result.videos, result.videos_without_crops) == (2, 3, ("no crops",))
    assert any("The template has 1 video without a crop" in text and "no crops" in text for text in heard.warnings)


def test_smoothing_and_averages_go_into_a_submission(runs: dict[str, Path], tmp_path: Path) -> None:
    frames = {"2": [7, 8]}
    plain = np.array(predictions_of(runs["va"], runs, frames, tmp_path), dtype=float)
    smoothed = np.array(predictions_of(runs["va"], runs, frames, tmp_path, smooth="mean", smooth_width=3), dtype=float)
    np.testing.assert_allclose(smoothed, np.repeat(plain.mean(axis=0)[None], 2, axis=0), atol=2e-6)
    chosen = predictions_of(runs["expr"], runs, frames, tmp_path, decide="fitted", fit_on="validation")
    assert len(chosen) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "names no frame"),
        ("image_location,\n", "names no frame"),
        ("a/00001.jpg,\nb,\n", "line 2: 'b,' names no frame"),
        ("a/00001.jpg,\na/x.jpg,\n", "line 2: 'a/x.jpg,' names no frame"),
        ("a/00001.jpg,\n\na/00002.jpg,\n", "line 2: '' names no frame"),
        ("a/00001.jpg,\na/00001.jpg,0\n", "names frame 1 of a twice"),
    ],
)
def test_a_template_with_a_mistake_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "t.txt").write_text(content)
    with pytest.raises(InputError, match=message):
        read_template(tmp_path / "t.txt")
    with pytest.raises(InputError, match="can't be read"):
        read_template(tmp_path / "missing.txt")


def test_frame_counts_name_all_frames(tmp_path: Path) -> None:
    file = tmp_path / "counts.csv"
    file.write_text("video,frames\na_left,2\nb\t1\n")
    found = read_frame_counts(file)
    assert found.locations == ["a_left/00001.jpg", "a_left/00002.jpg", "b/00001.jpg"]
    assert found.frame_numbers.tolist() == [1, 2, 1]
    for content, message in (("a,2\nb,many\n", "line 2: 'b,many' is no video"), ("a,0\n", "names no frame")):
        file.write_text(content)
        with pytest.raises(InputError, match=message):
            read_frame_counts(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("Neutral", "neutral"), "has the header"),
        (lambda text: text.replace("a/00002.jpg,3\n", ""), "has 2 lines after the header. Expected the template's 3"),
        (lambda text: text + "a/00009.jpg,0\n", "has 4 lines"),
        (lambda text: text.replace("a/00002.jpg,3", "a/00002.jpg,8"), "line 3: 'a/00002.jpg,8'"),
        (lambda text: text.replace("a/00002.jpg,3", "a/00002.jpg,"), "line 3"),
        (lambda text: text.replace("a/00002.jpg,3", "a/00002.jpg,3,3"), "line 3"),
        (lambda text: text.replace("a/00002.jpg", "a/00004.jpg"), "Expected a/00002.jpg with 1 values from 0 to 7"),
    ],
)
def test_a_file_that_is_not_its_templates_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    template = Template([f"a/0000{i}.jpg" for i in (1, 2, 3)], ["a"] * 3, np.array([1, 2, 3]))
    file = tmp_path / "p.txt"
    write_submission(file, template, np.array([0, 3, 7]), TASKS["expr"])
    check_submission(file, template, TASKS["expr"])
    file.write_text(change(file.read_text()))
    with pytest.raises(InputError, match=message):
        check_submission(file, template, TASKS["expr"])


def test_a_template_of_another_task_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    for task in ("expr", "au", "va"):
        file.write_text(f"image_location,{TASKS[task].header}\n2/00007.jpg,\n")
        submit(run=runs[task], template=file, store=runs["store"], out=tmp_path / "o.txt", overwrite=True)
        other = {"expr": "au", "au": "va", "va": "expr"}[task]
        with pytest.raises(InputError, match=f"The template's header names .*, but the run is of {other}"):
            submit(run=runs[other], template=file, store=runs["store"], out=tmp_path / "o.txt", overwrite=True)


def test_what_is_missing_is_asked_for(runs: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text("a/00001.jpg,\n")
    with pytest.raises(ConfigError, match="Expected one of --template FILE"):
        submit(run=runs["expr"], store=runs["store"])
    with pytest.raises(ConfigError, match="Expected --store FILE"):
        submit(run=runs["expr"], template=file)
    with pytest.raises(InputError, match="No video of the template has a crop"):
        submit(run=runs["expr"], template=file, store=runs["store"], out=tmp_path / "o.txt", overwrite=True)
    assert not (tmp_path / "o.txt").exists()


def test_damaged_embeddings_are_not_submitted(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("2/00007.jpg,")
    store = tmp_path / "test.h5"
    store.write_bytes(runs["store"].read_bytes())
    spoil_features(store)
    with pytest.raises(StoreError, match="its features don't match their checksum"):
        submit(run=runs["expr"], template=tmp_path / "t.csv", store=store, out=tmp_path / "o.txt")
    assert not (tmp_path / "o.txt").exists()


def test_a_folder_is_no_list(tmp_path: Path) -> None:
    for read in (read_template, read_frame_counts):
        with pytest.raises(InputError, match=rf"^{tmp_path} can't be read: Is a directory\. Expected a text file"):
            read(tmp_path)


def test_a_file_that_is_there_is_written_over_only_when_told(runs: dict[str, Path], tmp_path: Path) -> None:
    template = tmp_path / "template.txt"
    template.write_text("2/00007.jpg\n")
    words: dict[str, Any] = {"run": (runs["expr"],), "store": runs["store"], "template": template}
    with pytest.raises(ConfigError, match=r"template.txt is there already.*--out FILE, or say --overwrite"):
        submit(**words, out=template)
    assert template.read_text() == "2/00007.jpg\n"
    for overwrite in (False, True):
        assert submit(**words, out=tmp_path / "out.txt", overwrite=overwrite).lines == 1


def test_accents_of_a_template_may_be_characters_of_their_own(runs: dict[str, Path], tmp_path: Path) -> None:
    store = write_store(tmp_path / "s.h5", {"vid\u00e9o": [1, 2]}, np.ones((2, 16), np.float16))
    for name, content in (("template", "vide\u0301o/00001.jpg\n"), ("frames", "vide\u0301o,2\n")):
        (tmp_path / name).write_text(content, encoding="utf-8")
        result = submit(run=(runs["expr"],), store=store.path, out=tmp_path / f"{name}.out", **{name: tmp_path / name})
        assert (result.videos_without_crops, result.filled) == ((), 0)
        assert (
            (tmp_path / f"{name}.out").read_text(encoding="utf-8").splitlines()[1].startswith("vide\u0301o/00001.jpg,")
        )


@pytest.mark.parametrize("count", ["2000000000", "1" * 20, "9" * 5000, "10000001"])
def test_more_frames_than_any_video_has(tmp_path: Path, count: str) -> None:
    (tmp_path / "videos.csv").write_text(f"a,{count}\n")
    with pytest.raises(InputError, match=r"line 1: 'a,\d+' makes more than 5,000,000 frames"):
        read_frame_counts(tmp_path / "videos.csv")


@pytest.mark.parametrize("number", ["2147483648", "1" * 20, "9" * 5000])
def test_a_frame_number_that_no_frame_has(tmp_path: Path, number: str) -> None:
    (tmp_path / "template.txt").write_text(f"a/00001.jpg,\nb/{number}.jpg,\n")
    with pytest.raises(InputError, match=r"line 2: 'b/\d+.* names no frame"):
        read_template(tmp_path / "template.txt")


@pytest.mark.parametrize("text", ["a/00001.jpg\na/1.jpg\n", "vid\u00e9o/1.jpg\nvide\u0301o/1.jpg\n"])
def test_a_frame_in_two_spellings_is_named_twice(tmp_path: Path, text: str) -> None:
    (tmp_path / "template.txt").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"names frame 1 of \w+ twice"):
        read_template(tmp_path / "template.txt")


def test_a_name_with_a_comma_is_no_video_of_a_submission(tmp_path: Path) -> None:
    (tmp_path / "videos.csv").write_text("q,uote,30\n")
    with pytest.raises(InputError, match="is no video with its frame count"):
        read_frame_counts(tmp_path / "videos.csv")


DEEP = {"1/V1/Q3": [1, 2], "1/V2/Q3": [1, 2], "2/V1/Q4": [1, 2]}


@pytest.mark.parametrize(
    "videos",
    [list(DEEP), [f"test/crops/{video}" for video in DEEP], ["V1/Q3", "1/V2/Q3", "Q4"]],
    ids=["full", "folders before", "short"],
)
def test_videos_of_several_levels_are_found_by_their_names(
    runs: dict[str, Path], tmp_path: Path, videos: list[str]
) -> None:
    features = np.random.default_rng(1).normal(size=(6, 16)).astype(np.float16)
    store = write_store(tmp_path / "s.h5", DEEP, features).path
    (tmp_path / "template").write_text("".join(f"{video}/{n:05d}.jpg\n" for video in videos for n in (1, 2)))
    (tmp_path / "frames").write_text("".join(f"{video},2\n" for video in videos))
    expected = predictions_of(runs["va"], {"store": store}, {video: [1, 2] for video in DEEP}, tmp_path)
    for name in ("template", "frames"):
        out = tmp_path / f"{name}.out"
        result = submit(run=runs["va"], store=store, out=out, **{name: tmp_path / name})
        assert (result.videos_without_crops, result.filled, result.videos) == ((), 0, 3)
        lines = out.read_text().splitlines()[1:]
        assert [line.split(",")[1:] for line in lines] == expected
        assert lines[0].startswith(f"{videos[0]}/00001.jpg,")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("Q3/1.jpg\n", r"template: Q3 may be any of 2 videos, 1/V1/Q3, 1/V2/Q3\. "),
        ("Q4/1.jpg\n2/V1/Q4/1.jpg\n", r"template names frame 1 of 2/V1/Q4 twice"),
        ("9/V1/Q3/1.jpg\n", "No video of the template has a crop"),
    ],
)
def test_a_template_line_is_never_of_another_video(
    runs: dict[str, Path], tmp_path: Path, lines: str, said: str
) -> None:
    store = write_store(tmp_path / "s.h5", DEEP, np.ones((6, 16), np.float16)).path
    (tmp_path / "template").write_text(lines)
    with pytest.raises(InputError, match=said):
        submit(run=runs["expr"], store=store, template=tmp_path / "template", out=tmp_path / "o")

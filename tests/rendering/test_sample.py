"""The rendered sample: Aff-Wild2's layout and irregularities, exact labels, fair splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data.rendering.sample
from affcache.errors import InputError
from data.rendering.identity import Identity
from data.rendering.plan import EXPRESSION_SHARES, SPLITS, Challenge, plan_sample
from data.rendering.render import ACTION_UNITS
from data.rendering.sample import FOLDERS, HEADERS, SampleSummary, write_sample
from data.rendering.timeline import EXPRESSIONS, PROTOTYPES, Episode, Performance, perform

VIDEOS, FRAMES = 18, 14


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> SampleSummary:
    return write_sample(tmp_path_factory.mktemp("sample"), videos=VIDEOS, frames=FRAMES)


def label_files(folder: Path, challenge: str) -> Iterator[Path]:
    yield from sorted((folder / "annotations" / challenge).glob("*/*.txt"))


def rows_of(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines()[1:] if line]


def frame_numbers(folder: Path, video: str) -> list[int]:
    return sorted(int(crop.stem) for crop in (folder / "cropped_aligned" / video).glob("*.jpg"))


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    total = hashlib.sha256()
    for path in files:
        total.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


def test_crops_are_numbered_rgb_jpegs(sample: SampleSummary) -> None:
    crops = list((sample.folder / "cropped_aligned").glob("*/*"))
    assert len(crops) == sample.crops
    assert sample.videos == VIDEOS
    for crop in crops[:: len(crops) // 20]:
        assert len(crop.stem) == 5
        assert int(crop.stem) >= 1
        with Image.open(crop) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (112, 112))


@pytest.mark.parametrize("challenge", FOLDERS)
def test_label_files_have_the_published_headers_and_rows(sample: SampleSummary, challenge: Challenge) -> None:
    fields = {"EXPR": 1, "AU": 12, "VA": 2}[challenge]
    files = list(label_files(sample.folder, FOLDERS[challenge]))
    assert {path.parent.name for path in files} == set(SPLITS)
    for path in files:
        assert path.read_text().splitlines()[0] == HEADERS[challenge]
        for row in rows_of(path):
            values = [float(field) for field in row.split(",")]
            assert len(values) == fields
            if challenge == "EXPR":
                assert values[0] in range(-1, 8)
            elif challenge == "AU":
                assert set(values) <= {-1, 0, 1}
            else:
                assert values == [-5, -5] or max(map(abs, values)) <= 1


def test_the_irregularities_of_the_original_are_there(sample: SampleSummary) -> None:
    folder = sample.folder
    assert (folder / "cropped_aligned" / ".DS_Store").is_file()
    videos = [path.name for path in (folder / "cropped_aligned").iterdir() if path.is_dir()]
    stems = {name.removesuffix("_left").removesuffix("_right") for name in videos}
    assert any({f"{stem}_left", f"{stem}_right"} <= set(videos) for stem in stems)
    assert any({stem, f"{stem}_right"} <= set(videos) for stem in stems)
    numbers = {name: frame_numbers(folder, name) for name in videos}
    assert any(found[0] > 1 for found in numbers.values()), "no video starts without a face"
    assert any(found != list(range(found[0], found[-1] + 1)) for found in numbers.values()), "no gap"
    extra = {path.stem: len(rows_of(path)) - numbers[path.stem][-1] for path in label_files(folder, FOLDERS["AU"])}
    assert {-1, 1} <= set(extra.values())
    for challenge in FOLDERS.values():
        texts = [path.read_bytes() for path in label_files(folder, challenge)]
        assert any(b"\r\n" in text for text in texts)
        assert any(text.endswith(b"\n\n") for text in texts)
        assert 0 < len(texts) < len(videos)
    rows = {name: [row for path in label_files(folder, FOLDERS[name]) for row in rows_of(path)] for name in FOLDERS}
    assert "-1" in rows["EXPR"]
    assert "-5,-5" in rows["VA"]
    partly = [row.split(",") for row in rows["AU"] if "-1" in row]
    assert any(set(row) == {"-1"} for row in partly)
    assert any(set(row) != {"-1"} for row in partly)


def test_no_person_and_no_video_is_in_both_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    people: list[Identity] = []

    class Recorder:
        @staticmethod
        def draw(rng: np.random.Generator, skin: tuple[int, int, int]) -> Identity:
            people.append(Identity.draw(rng, skin))
            return people[-1]

    monkeypatch.setattr(data.rendering.sample, "Identity", Recorder)
    summary = write_sample(tmp_path, videos=12, frames=8)
    assert len(set(people)) == len(people) == 12
    names: dict[str, set[str]] = {split: set() for split in SPLITS}
    for path in (tmp_path / "annotations").glob("*/*/*.txt"):
        names[path.parent.name].add(path.stem.removesuffix("_left").removesuffix("_right"))
    assert not names["Train_Set"] & names["Validation_Set"]
    assert (summary.train.videos, summary.validation.videos) == (8, 4)


def test_labels_are_the_generators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played: list[Performance] = []

    def record(*arguments: object) -> Performance:
        played.append(perform(*arguments))  # type: ignore[arg-type]
        return played[-1]

    monkeypatch.setattr(data.rendering.sample, "perform", record)
    write_sample(tmp_path, videos=6, frames=20)
    plans = plan_sample(6, 20, np.random.default_rng([0]))
    compared = dict.fromkeys(FOLDERS, 0)
    for plan, performance in zip(plans, played, strict=True):
        played_labels: dict[Challenge, np.ndarray] = {
            "EXPR": performance.expression[:, None],
            "AU": performance.action_unit_labels,
            "VA": performance.valence_arousal,  # written with three decimals
        }
        for challenge, expected in played_labels.items():
            path = tmp_path / "annotations" / FOLDERS[challenge] / plan.split / f"{plan.name}.txt"
            if not path.exists():
                continue
            rows = np.array([[float(field) for field in row.split(",")] for row in rows_of(path)])[: plan.frames]
            valid = (rows != {"EXPR": -1, "AU": -1, "VA": -5}[challenge]).all(1)
            np.testing.assert_allclose(rows[valid], expected[: len(rows)][valid], atol=6e-4)
            compared[challenge] += int(valid.sum())
    assert min(compared.values()) > 60


def test_valence_and_arousal_follow_the_expression_smoothly() -> None:
    rng = np.random.default_rng(1)
    length = 24  # frames; the onset takes 4 of them
    for prototype in PROTOTYPES:
        played = perform([Episode(prototype, 20, length, 1.0)], 64, rng)
        values = played.valence_arousal
        assert np.abs(values).max() <= 1
        assert not values[[0, 5, 58, 63]].any(), "a neutral face is at the origin"
        assert np.abs(np.diff(values, axis=0)).max() < 0.5, "no jump from frame to frame"
        expected = played.action_units[30:34].max(1, keepdims=True) * [prototype.valence, prototype.arousal]
        assert np.abs(values[30:34] - expected).max() < 0.15, "both follow the intensity"
    quadrants = {p.expression: (np.sign(p.valence), np.sign(p.arousal)) for p in PROTOTYPES}
    assert quadrants["Happiness"] == (1, 1)
    assert quadrants["Anger"] == quadrants["Fear"] == quadrants["Disgust"] == (-1, 1)
    assert quadrants["Sadness"] == (-1, -1)
    assert quadrants["Surprise"] == (1, 1)


def test_the_summary_counts_what_lies_on_disk(sample: SampleSummary) -> None:
    counts = dict.fromkeys(EXPRESSIONS, 0)
    positives = np.zeros(12, dtype=int)
    for path in label_files(sample.folder, FOLDERS["EXPR"]):
        rows, frames = rows_of(path), frame_numbers(sample.folder, path.stem)
        if path.parent.name == "Train_Set":
            for value in (int(rows[frame - 1]) for frame in frames if frame <= len(rows)):
                if value >= 0:
                    counts[EXPRESSIONS[value]] += 1
    for path in label_files(sample.folder, FOLDERS["AU"]):
        rows, frames = rows_of(path), frame_numbers(sample.folder, path.stem)
        if path.parent.name == "Train_Set":
            for row in (rows[frame - 1] for frame in frames if frame <= len(rows)):
                if "-1" not in row:
                    positives += np.array([int(field) for field in row.split(",")])
    assert counts == sample.train.expression_frames
    assert dict(zip(ACTION_UNITS, positives.tolist(), strict=True)) == sample.train.action_unit_positives
    valued = 0
    for path in (path for path in label_files(sample.folder, FOLDERS["VA"]) if path.parent.name == "Train_Set"):
        rows, frames = rows_of(path), frame_numbers(sample.folder, path.stem)
        valued += sum(rows[frame - 1] != "-5,-5" for frame in frames if frame <= len(rows))
    assert valued == sample.train.valence_arousal_frames


def test_classes_come_in_the_shares_of_aff_wild2() -> None:
    for split in SPLITS:
        plans = [plan for plan in plan_sample(150, 200, np.random.default_rng(0)) if plan.split == split]
        total = sum(plan.frames for plan in plans)
        for name, share in list(zip(EXPRESSIONS, EXPRESSION_SHARES, strict=True))[1:]:
            planned = sum(n for plan in plans for prototype, n in plan.episodes if prototype.expression == name)
            assert planned / total == pytest.approx(share, rel=0.1), name


@pytest.mark.parametrize("seed", [0, 1])
def test_the_shipped_size_has_every_class_on_several_people(seed: int) -> None:
    plans = plan_sample(30, 40, np.random.default_rng([seed]))
    for split, people, frames in (("Train_Set", 3, 20), ("Validation_Set", 2, 10)):
        for name in EXPRESSIONS[1:]:
            shown = [
                sum(length for prototype, length in plan.episodes if prototype.expression == name)
                for plan in plans
                if plan.split == split and "EXPR" in plan.challenges
            ]
            assert sum(length > 0 for length in shown) >= people, (split, name)
            assert sum(shown) >= frames, (split, name)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    digests = []
    for name, seed in (("first", 7), ("again", 7), ("other", 8)):
        write_sample(tmp_path / name, videos=2, frames=8, seed=seed)
        digests.append(digest(tmp_path / name))
    assert digests[0] == digests[1] != digests[2]


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    write_sample(tmp_path / "new", videos=3, frames=8, progress=lambda done, total: calls.append((done, total)))
    assert len(calls) == 3
    assert calls[-1][0] == calls[-1][1]
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


@pytest.mark.parametrize("bad", [{"videos": 1}, {"frames": 7}, {"seed": -1}, {"quality": 0}, {"quality": 96}])
def test_values_out_of_range_are_refused(tmp_path: Path, bad: dict[str, int]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(bad))} must be between"):
        write_sample(tmp_path / "new", **bad)  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not lose me")
    with pytest.raises(InputError, match=r"thesis\.txt.*Name another folder"):
        write_sample(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        write_sample(tmp_path / "thesis.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_shipped_sample_is_small_and_whole() -> None:
    shipped = Path(__file__).parents[2] / "data" / "sample"
    files = [path for path in shipped.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2_900_000
    assert 1_000 <= len(list((shipped / "cropped_aligned").glob("*/*.jpg"))) <= 1_300
    for challenge, folder in FOLDERS.items():
        for path in label_files(shipped, folder):
            assert path.read_text().splitlines()[0] == HEADERS[challenge]
            assert frame_numbers(shipped, path.stem), f"{path.stem} has labels and no crops"


def test_the_shipped_labels_are_what_the_generator_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte, by `python -m data.rendering DIR --seed 1`; crops are left out: their bytes depend on Pillow."""
    monkeypatch.setattr(data.rendering.sample, "_write_crops", lambda *arguments: None)
    write_sample(tmp_path, seed=1)
    shipped = Path(__file__).parents[2] / "data" / "sample"
    assert {path.relative_to(shipped) for path in shipped.glob("annotations/*/*/*.txt")} == {
        path.relative_to(tmp_path) for path in tmp_path.glob("annotations/*/*/*.txt")
    }
    assert digest(shipped / "annotations") == digest(tmp_path / "annotations")


def test_a_place_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/sample can't be written: Not a directory\. Expected a new or empty"):
        write_sample(tmp_path / "file" / "sample", videos=2, frames=8)

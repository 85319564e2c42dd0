"""The layout of BAH from crops to everything that is made of them: <person>/<visit>/<question>/<name>-<n>.jpg."""

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import pyarrow.parquet as pq
import pytest

import affcache
from affcache.prediction.inputs import holds_crops
from affcache.submission.submit import submit
from tests.conftest import write_crops
from tests.crops.test_video_names import packed
from tests.tasks.test_label_names import write_nested

VIDEOS = {f"{person}/Visit{visit}/Q{q}": range(1, 4) for person in "1234" for visit in (1, 2) for q in (1, 3)}
QUICK: dict[str, Any] = {"epochs": 1, "hidden_layers": 1, "hidden_width": 8, "batch_size": 4, "device": "cpu"}


@pytest.fixture(scope="module")
def bah(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: str) -> Path:
    """A folder with crops, as folder, zip and tar, a store, nested labels, and a run."""
    folder = tmp_path_factory.mktemp("bah")
    write_crops(folder / "crops", VIDEOS)
    for path in sorted((folder / "crops").rglob("*.jpg")):
        path.rename(path.with_name(f"face-{int(path.stem)}.jpg"))
    for kind in (".zip", ".tar"):
        packed(folder / "crops", kind, "cropped-aligned-faces/")
    affcache.extract(crops=folder / "crops", store=folder / "s.h5", model=tiny_encoder, device="cpu")
    for split, persons in (("train", "123"), ("validation", "4")):
        write_nested(folder, {v: [(int(v[0]) + n) % 8 for n in range(4)] for v in VIDEOS if v[0] in persons}, split)
    affcache.fit(task="expr", store=folder / "s.h5", annotations=folder, run=folder / "run", held_out=0.3, **QUICK)
    return folder


def test_every_crop_is_encoded_wherever_it_lies(bah: Path, tmp_path: Path, tiny_encoder: str) -> None:
    assert affcache.EmbeddingStore.open(bah / "s.h5").video_names == tuple(sorted(VIDEOS))
    for kind in ("crops.zip", "crops.tar"):
        affcache.extract(crops=bah / kind, store=tmp_path / f"{kind}.h5", model=tiny_encoder, device="cpu")
        assert (tmp_path / f"{kind}.h5").read_bytes() == (bah / "s.h5").read_bytes()


def test_labels_join_and_scores_and_reports_name_videos_in_full(bah: Path, tmp_path: Path) -> None:
    labels = json.loads((bah / "run" / "config.json").read_text())["labels"]
    held_out = labels["train"]["held_out_videos"]
    assert (labels["train"]["used"] + 3 * len(held_out), labels["validation"]["used"]) == (36, 12)
    assert set(held_out) < set(VIDEOS)
    scored = affcache.score(
        run=bah / "run", annotations=bah, decide="fitted", figures=tmp_path / "figures", device="cpu"
    )
    assert (scored.frames, scored.videos) == (12, 4)
    predictions = next((bah / "run").glob("predictions*.h5"))
    with h5py.File(predictions) as file:
        assert file["video_name"].asstr()[:].tolist() == sorted(VIDEOS)
    for crops in ("crops", "crops.tar"):
        out = tmp_path / f"{crops}.html"
        affcache.report(run=bah / "run", annotations=bah, crops=bah / crops, out=out, device="cpu")
        text = out.read_text(encoding="utf-8")
        assert '"name": "4/Visit1/Q3"' in text
        assert text.count("data:image/jpeg") >= 6


def test_crops_and_stores_are_predicted(bah: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"  # with a prefix, numbers of small pictures are taken for photos' names
    shutil.copytree(bah / "crops", plain)
    for path in sorted(plain.rglob("*.jpg")):
        path.rename(path.with_name(path.name.removeprefix("face-")))
    tables = []
    for name, given in (("folder", plain), ("zip", bah / "crops.zip"), ("store", bah / "s.h5")):
        out = tmp_path / f"{name}.parquet"
        page = tmp_path / f"{name}.html"
        assert affcache.predict(inputs=given, run=bah / "run", out=out, page=page, device="cpu").rows == 48
        tables.append(pq.read_table(out))
        assert ("data:image/jpeg" in page.read_text(encoding="utf-8")) == (name != "store")
    ends = [f"/{video}" for video in sorted(VIDEOS) for _ in range(3)]
    for table in tables:
        assert all(f"/{one}".endswith(end) for one, end in zip(table["input"].to_pylist(), ends, strict=True))
        assert table["expr_Anger"].to_pylist() == tables[0]["expr_Anger"].to_pylist()


def test_a_template_of_another_part_of_the_path_is_filled(bah: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("".join(f"faces/{video}/face-{n}.jpg\n" for video in VIDEOS for n in (1, 2, 3, 4)))
    result = submit(run=bah / "run", store=bah / "s.h5", template=tmp_path / "t.csv", out=tmp_path / "o", device="cpu")
    assert (result.lines, result.filled, result.videos_without_crops) == (64, 16, ())


def test_no_picture_is_shown_where_it_may_be_of_another_video(bah: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    shutil.copytree(bah / "crops" / "4" / "Visit1" / "Q3", flat / "Q3")  # of which person, nothing says
    result = affcache.report(run=bah / "run", annotations=bah, crops=flat, out=tmp_path / "r.html", device="cpu")
    assert "data:image/jpeg" not in Path(result.out).read_text(encoding="utf-8")


def test_crops_at_any_depth_are_told_from_videos_with_small_pictures(tmp_path: Path) -> None:
    write_crops(tmp_path / "crops", {"1/Visit1/Q3": [1], "2": []})
    assert holds_crops(tmp_path / "crops")
    write_crops(tmp_path / "recordings", {"day1/thumbs": [1]})
    assert holds_crops(tmp_path / "recordings")
    (tmp_path / "recordings" / "day1" / "clip.mp4").touch()
    assert not holds_crops(tmp_path / "recordings")

"""Names of videos with accents: whatever form a disk or an archive keeps them in, the same video is the same video."""

import unicodedata
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import affcache
from affcache.crops.crop_list import keep_listed
from affcache.crops.folders import find_crops
from affcache.errors import InputError, StoreError
from affcache.extraction.extract import open_begun
from affcache.reporting.frames import ReportContext, crops_below
from affcache.scoring.predict import Predictions
from affcache.tasks.annotations import join_labels
from affcache.tasks.splits import group_frames
from affcache.tasks.tasks import TASKS
from tests.conftest import write_crops, write_labels, write_store
from tests.exchange.sources import matrix, write_published

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "vidéo-1") for form in ("NFC", "NFD"))
assert COMPOSED != DECOMPOSED
both = pytest.mark.parametrize(("one", "other"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)], ids=["NFC", "NFD"])


class Unflagged(zipfile.ZipInfo):
    """Written in UTF-8 without the flag for it, as zip -r and macOS do."""

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:
        return self.filename.encode(), self.flag_bits & ~0x800


@pytest.mark.parametrize("name", [COMPOSED, DECOMPOSED, "видео", "動画"])
def test_a_zip_whose_names_are_utf8_without_the_flag(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "crops.zip", "w") as archive:
        archive.writestr(Unflagged(f"{name}/00001.jpg"), b"1")
    assert find_crops([tmp_path / "crops.zip"]).video_names == (name,)


@both
def test_labels_lists_and_pictures_join(tmp_path: Path, one: str, other: str) -> None:
    root = write_crops(tmp_path / "crops", {one: [1, 2, 3], "b": [1]})
    crops = find_crops([root])
    (tmp_path / "list.txt").write_text(f"{other}/00002.jpg\nb/00001.jpg\n", encoding="utf-8")
    kept, missing = keep_listed(crops, tmp_path / "list.txt")
    assert (sorted(kept.frame_number), missing) == ([1, 2], 0)
    store = write_store(tmp_path / "s.h5", {one: [1, 2, 3], "b": [1]}, np.ones((4, 3), np.float16))
    labels = write_labels(tmp_path, "expr", "train", {other: [0, 1, 2]})
    joined = join_labels(store, labels, TASKS["expr"], "train")
    assert (joined.labels.tolist(), joined.account.videos_without_crops) == ([0, 1, 2], ())
    assert group_frames(store, joined)[0] == [COMPOSED]
    written = write_store(tmp_path / "t.h5", {other: [1, 2, 3], "b": [1]}, np.ones((4, 3), np.float16))
    given = Predictions(written, np.arange(4), np.zeros((4, 8)), None)  # type: ignore[arg-type]
    context: Any = SimpleNamespace(
        hardest=[0, 1],
        suspicious=[2, 3],
        crops=crops_below([root]),
        video_names=written.video_names,
        task=TASKS["expr"],
    )
    context.frame_names = given.videos, given.frame_numbers
    assert sorted(ReportContext.pictures.func(context)) == [0, 1, 2, 3]


@both
def test_stores_and_crops_of_either_form_are_the_same(tmp_path: Path, one: str, other: str) -> None:
    features = np.ones((2, 3), np.float16)
    store, second = (write_store(tmp_path / f"{n}.h5", {v: [1, 2]}, features) for n, v in enumerate((one, other)))
    assert store.has_frames_of(second)
    open_begun(store.path, find_crops([write_crops(tmp_path / "crops", {other: [1, 2]})]), 1)
    # "e" and an accent sorts before "f", a composed "é" after it
    two = write_store(tmp_path / "two.h5", {"f": [1], unicodedata.normalize("NFC", "é"): [1]}, features)
    with pytest.raises(StoreError, match=r"the order of the videos, by the form of accents"):
        open_begun(two.path, find_crops([write_crops(tmp_path / "more", {"f": [1], "e\u0301": [1]})]), 1)


def test_a_video_in_both_forms_is_taken_once(tmp_path: Path) -> None:
    first, second = (write_crops(tmp_path / name, {name: [1]}) for name in (COMPOSED, DECOMPOSED))
    found = find_crops([first, second])
    assert (found.video_names, found.shadowed_folders) == ((COMPOSED,), (second / DECOMPOSED,))
    labels = write_labels(tmp_path, "expr", "train", {COMPOSED: [0], DECOMPOSED: [0]})
    store = write_store(tmp_path / "s.h5", {COMPOSED: [1]}, np.ones((1, 3), np.float16))
    with pytest.raises(InputError, match="two label files of the video"):
        join_labels(store, labels, TASKS["expr"], "train")


def test_imports_of_both_forms_are_one_video(tmp_path: Path) -> None:
    sources = [
        write_published(
            tmp_path, matrix(2, seed=split), [f"{name}/0000{split}{n}.jpg" for n in (1, 2)], name=f"{split}"
        )
        for split, name in enumerate((COMPOSED, DECOMPOSED))
    ]
    files, lists = zip(*sources, strict=True)
    affcache.import_embeddings(sources=files, list=lists, store=tmp_path / "s.h5", model="m")
    store = affcache.EmbeddingStore.open(tmp_path / "s.h5")
    assert (len(store.video_names), store.frame_number.tolist()) == (1, [1, 2, 11, 12])

"""Extraction: every crop has its row, bad ones too; a run can stop anywhere and continue; nothing mixes."""

import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from affcache import ExtractSettings, doctor, extract
from affcache.crops.folders import find_crops
from affcache.errors import ConfigError, InputError, StoreError
from affcache.extraction.pipeline import PHOTOS
from affcache.progress import Listener
from affcache.store.reading import EmbeddingStore
from affcache.store.writing import writing_lock
from tests.conftest import write_crops, write_tiny_encoder

VIDEOS = {"a": [1, 2, 3, 5, 8, 13], "b_left": range(1, 31), "c": range(0, 40, 4)}  # 46 rows
ROWS = 46


class Recorder(Listener):
    """Keeps what it hears; may interrupt the run once so many crops are done."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.messages: list[str] = []
        self.warnings: list[str] = []
        self.steps: list[tuple[int, int, str, str]] = []
        self.interrupt_at = interrupt_at

    def message(self, text: str) -> None:
        self.messages.append(text)

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        self.steps.append((done, total, unit, note))
        if unit == "crop" and self.interrupt_at is not None and done >= self.interrupt_at:
            raise KeyboardInterrupt


@pytest.fixture
def crops(tmp_path: Path) -> Path:
    return write_crops(tmp_path / "crops", VIDEOS)


@pytest.fixture
def settings(tmp_path: Path, crops: Path, tiny_encoder: str) -> ExtractSettings:
    return ExtractSettings(
        crops=(crops,),
        store=tmp_path / "s.h5",
        model=tiny_encoder,
        precision="fp32",
        batch_size=4,
        workers=2,
        device="cpu",
    )


@pytest.fixture
def again(settings: ExtractSettings) -> Callable[..., ExtractSettings]:
    """The same settings with some changed."""
    return lambda **changes: ExtractSettings(**{**vars(settings), **changes})


def spoil(crops: Path) -> dict[Path, str]:
    """Damage four crops of the listing, and return the reason for each."""
    empty, text, half, small = (
        crops / name for name in ("a/00001.jpg", "a/00005.jpg", "b_left/00030.jpg", "c/00000.jpg")
    )
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    empty.write_bytes(b"")
    text.write_text("no image")
    Image.new("RGB", (1, 1)).save(small)
    return {
        empty: "the file is empty (0 bytes)",
        text: "not an image",
        half: "damaged: image file is truncated",
        small: "1x1 pixels; a face crop has 8 to 8000 on a side",
    }


def test_a_run_and_what_it_says(settings: ExtractSettings, tiny_encoder: str) -> None:
    recorder = Recorder()
    result = extract(settings, listener=recorder)
    assert (result.rows, result.encoded, result.unreadable, result.encoded_now) == (ROWS, ROWS, 0, ROWS)
    assert result.store == str(settings.store)
    assert result.unreadable_list is None
    assert result.converted == {}
    assert (result.device, result.precision) == ("cpu", "fp32")
    assert result.rate == pytest.approx(ROWS / result.seconds)
    assert sum(result.shares.values()) == pytest.approx(1)
    assert result.to_json()["rows"] == ROWS
    store = EmbeddingStore.open(result.store)
    store.verify()
    assert store.video_names == ("a", "b_left", "c")
    assert store.frame_number[:6].tolist() == [1, 2, 3, 5, 8, 13]
    assert store.encoder["model"] == tiny_encoder
    loading = f"loading the encoder {tiny_encoder}"  # on the disk already: nothing is fetched
    chosen = "encoding to D = 24 on cpu in fp32, 4 crops a call"
    assert recorder.messages == ["46 crops in 3 videos", loading, chosen]
    assert recorder.warnings == []
    listing = [step for step in recorder.steps if step[2] == "video"]
    assert listing == [(1, 3, "video", "listing"), (2, 3, "video", "listing"), (3, 3, "video", "listing")]
    encoding = [step for step in recorder.steps if step[2] == "crop"]
    assert [done for done, *_ in encoding] == [*range(4, ROWS, 4), ROWS]
    assert {total for _, total, *_ in encoding} == {ROWS}
    assert "encode" in encoding[-1][3]


def test_single_settings_by_name(crops: Path, tmp_path: Path, tiny_encoder: str) -> None:
    result = extract(crops=(crops,), store=tmp_path / "s.h5", model=tiny_encoder)
    assert result.encoded == ROWS
    with pytest.raises(ConfigError, match=r"Unknown setting 'crop' \(did you mean 'crops'\?\)"):
        extract(crop=(crops,), model=tiny_encoder)


def test_unreadable_crops_are_listed_with_reasons(settings: ExtractSettings, crops: Path) -> None:
    reasons = spoil(crops)
    result = extract(settings)
    assert (result.rows, result.encoded, result.unreadable) == (ROWS, ROWS - 4, 4)
    assert result.unreadable_list == f"{settings.store}.unreadable.txt"
    lines = Path(result.unreadable_list).read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4
    for line, (path, reason) in zip(lines, reasons.items(), strict=True):  # in the order of rows
        name, said = line.split("\t")
        assert name == str(path)
        assert said.startswith(reason)
    store = EmbeddingStore.open(result.store)
    store.verify()
    listing = find_crops([crops])
    assert [listing.path(int(row)) for row in np.flatnonzero(store.status == 2)] == list(reasons)
    assert not store.features[store.status == 2].any()


def test_a_bad_crop_never_shifts_a_row(again: Callable[..., ExtractSettings], crops: Path, tmp_path: Path) -> None:
    without = tmp_path / "without"
    shutil.copytree(crops, without)
    bad = spoil(crops)
    for path in bad:
        (without / path.relative_to(crops)).unlink()
    extract(again(batch_size=1))
    extract(again(batch_size=1, crops=(without,), store=tmp_path / "without.h5"))
    mixed, clean = EmbeddingStore.open(tmp_path / "s.h5"), EmbeddingStore.open(tmp_path / "without.h5")
    assert (len(mixed), len(clean)) == (ROWS, ROWS - 4)

    def by_frame(store: EmbeddingStore) -> dict[tuple[str, int], bytes]:
        return {
            (store.video_names[video], int(frame)): features.tobytes()
            for video, frame, features, status in zip(
                store.video_of_rows(), store.frame_number, store.features, store.status, strict=True
            )
            if status == 1
        }

    assert by_frame(mixed) == by_frame(clean)
    assert len(set(by_frame(clean).values())) == ROWS - 4  # no two crops look alike


def test_converted_crops_are_counted_by_mode(settings: ExtractSettings, crops: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    Image.fromarray(pixels).save(crops / "a" / "00001.jpg")
    Image.fromarray(pixels).save(crops / "a" / "00002.jpg")
    Image.fromarray(pixels).convert("CMYK").save(crops / "a" / "00003.jpg")
    Image.fromarray(pixels.astype(np.uint16) * 256).save(crops / "a" / "00004.png")
    result = extract(settings)
    assert result.converted == {"CMYK": 1, "I;16": 1, "L": 2}
    assert result.unreadable == 0


@pytest.mark.parametrize("stops", [(4,), (24,), (4, 16, 40)])
def test_an_interrupted_run_continues_to_the_same_bytes(
    again: Callable[..., ExtractSettings], crops: Path, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    spoil(crops)
    whole = extract(again(store=tmp_path / "whole.h5"))
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            extract(again(), listener=Recorder(interrupt_at=stop))
        assert EmbeddingStore.open(tmp_path / "s.h5").counts["pending"] == ROWS - stop
    recorder = Recorder()
    result = extract(again(), listener=recorder)
    assert f"continuing: {stops[-1]} of 46 rows are committed" in recorder.messages
    assert result.encoded_now == ROWS - stops[-1]
    assert (result.rows, result.encoded, result.unreadable) == (whole.rows, whole.encoded, whole.unreadable)
    assert (tmp_path / "s.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
    lists = [(tmp_path / f"{name}.h5.unreadable.txt").read_text() for name in ("s", "whole")]
    assert lists[0] == lists[1]


def test_a_finished_store_is_left_as_it_is(settings: ExtractSettings, tmp_path: Path) -> None:
    extract(settings)
    before = (tmp_path / "s.h5").read_bytes()
    recorder = Recorder()
    result = extract(settings, listener=recorder)
    assert (result.encoded, result.encoded_now) == (ROWS, 0)
    assert result.rate == 0
    assert [step for step in recorder.steps if step[2] == "crop"] == []
    assert (tmp_path / "s.h5").read_bytes() == before


def test_a_checksum_that_a_kill_left_out_is_made_up_for(settings: ExtractSettings, tmp_path: Path) -> None:
    extract(settings)
    before = (tmp_path / "s.h5").read_bytes()
    with h5py.File(tmp_path / "s.h5", "r+") as file:
        file["block_checksum"][0] = 0
    assert extract(settings).encoded_now == 0
    EmbeddingStore.open(tmp_path / "s.h5").verify()
    assert (tmp_path / "s.h5").read_bytes() == before


def test_no_crop_could_be_read(settings: ExtractSettings, crops: Path) -> None:
    for path in crops.rglob("*.jpg"):
        path.write_bytes(b"")
    first, listed = crops / "a" / "00001.jpg", f"{settings.store}.unreadable.txt"
    with pytest.raises(InputError) as caught:
        extract(settings)
    assert str(caught.value) == (
        f"None of the 46 crops could be read. The first one, {first}: the file is empty (0 bytes). Expected image "
        f"files. They are all listed in {listed}; mend them, then run the same command again with --retry-unreadable."
    )
    assert len(Path(listed).read_text().splitlines()) == ROWS
    with pytest.raises(InputError, match=r"^None of the 46 crops could be read. Expected image files."):
        extract(settings)
    assert "the file is empty (0 bytes)" in Path(listed).read_text()  # the reasons of the first run stay


def test_mended_crops_are_read_when_asked_for(
    again: Callable[..., ExtractSettings], crops: Path, tmp_path: Path
) -> None:
    sound = tmp_path / "sound"
    shutil.copytree(crops, sound)
    extract(again(crops=(sound,), store=tmp_path / "sound.h5"))
    bad = list(spoil(crops))
    extract(again())
    for path in bad[:3]:
        shutil.copy(sound / path.relative_to(crops), path)
    assert extract(again()).unreadable == 4  # not unless asked for
    result = extract(again(retry_unreadable=True))
    assert (result.encoded, result.unreadable, result.encoded_now) == (ROWS - 1, 1, 4)
    assert Path(f"{tmp_path / 's.h5'}.unreadable.txt").read_text().startswith(f"{bad[3]}\t1x1 pixels")
    EmbeddingStore.open(tmp_path / "s.h5").verify()
    shutil.copy(sound / bad[3].relative_to(crops), bad[3])
    result = extract(again(retry_unreadable=True, batch_size=4))
    assert (result.encoded, result.unreadable, result.unreadable_list) == (ROWS, 0, None)
    assert not Path(f"{tmp_path / 's.h5'}.unreadable.txt").exists()
    mended, expected = EmbeddingStore.open(tmp_path / "s.h5"), EmbeddingStore.open(tmp_path / "sound.h5")
    mended.verify()
    np.testing.assert_allclose(mended.features, expected.features, rtol=2e-3, atol=2e-3)


def test_another_encoder_is_refused_and_the_differences_named(
    again: Callable[..., ExtractSettings], tmp_path: Path, tiny_encoder: str
) -> None:
    extract(again())
    before = (tmp_path / "s.h5").read_bytes()
    (tmp_path / "other").mkdir()
    other = write_tiny_encoder(tmp_path / "other", seed=1)
    start = (
        f"{tmp_path / 's.h5'} was made with another encoder. Expected the same one; these differ (store against now):"
    )
    with pytest.raises(StoreError) as caught:
        extract(again(model=other))
    heading, difference, forward = str(caught.value).splitlines()
    assert heading == start
    assert difference.startswith("  weights_sha256: '")
    assert forward == "Choose another --store FILE for these, or delete that store to make it anew."
    with pytest.raises(StoreError) as caught:
        extract(again(activation="quick_gelu", precision="bf16"))
    assert str(caught.value).splitlines()[1:3] == [
        "  activation: 'gelu' against 'quick_gelu'",
        "  precision: 'fp32' against 'bf16'",
    ]
    assert (tmp_path / "s.h5").read_bytes() == before
    shutil.copytree(tiny_encoder.removeprefix("local-dir:"), tmp_path / "moved")
    extract(again(model=f"local-dir:{tmp_path / 'moved'}"))  # the same weights from elsewhere are the same


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("a video more", "1 video new (first: d)"),
        ("a video less", "1 video gone (first: c)"),
        ("a video renamed", "1 video gone (first: c); 1 video new (first: cc)"),
        ("a crop more", "46 crops in the store, 47 now"),
        ("a crop less", "46 crops in the store, 45 now"),
        ("a frame renumbered", "the frame numbers"),
    ],
)
def test_other_crops_are_refused(settings: ExtractSettings, crops: Path, change: str, difference: str) -> None:
    extract(settings)
    if change == "a video more":
        shutil.copytree(crops / "c", crops / "d")
    elif change == "a video less":
        shutil.rmtree(crops / "c")
    elif change == "a video renamed":
        (crops / "c").rename(crops / "cc")
    elif change == "a crop more":
        shutil.copy(crops / "a" / "00001.jpg", crops / "a" / "00004.jpg")
    elif change == "a crop less":
        (crops / "a" / "00001.jpg").unlink()
    else:
        (crops / "a" / "00001.jpg").rename(crops / "a" / "00004.jpg")
    with pytest.raises(StoreError) as caught:
        extract(settings)
    assert str(caught.value) == (
        f"{settings.store} was made of other crops. Expected the same ones; these differ: {difference}. "
        "Choose another --store FILE for these, or delete that store to make it anew."
    )


def test_what_is_ignored_or_left_out_is_said(
    again: Callable[..., ExtractSettings], crops: Path, tmp_path: Path
) -> None:
    (crops / "a" / "notes.txt").touch()
    (crops / "a" / "cover.jpg").touch()
    (crops / "a" / ".DS_Store").touch()
    second = write_crops(tmp_path / "second", {"a": [1], "d": [1, 2]})
    recorder = Recorder()
    result = extract(again(crops=(crops, second)), listener=recorder)
    assert result.rows == ROWS + 2
    assert recorder.messages[:2] == [
        "48 crops in 4 videos",
        "files ignored: 1 without digits at the end of the name (cover.jpg); 1 with the suffix .txt (notes.txt)",
    ]
    assert recorder.warnings == [f"{second / 'a'} is left out: a video of that name was found before it"]


class FolderGoes(Recorder):
    """Takes the crops away once the first of them are encoded."""

    def __init__(self, crops: Path) -> None:
        super().__init__()
        self.crops = crops

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        super().progress(done, total, unit, note)
        if unit == "crop" and self.crops.exists():
            self.crops.rename(self.crops.with_name("away"))


def test_crops_that_vanish_stop_the_run_and_mark_nothing(
    again: Callable[..., ExtractSettings], crops: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"The crops folder .* can't be read any more .*Reconnect it and run the same"):
        extract(again(), listener=FolderGoes(crops))
    store = EmbeddingStore.open(tmp_path / "s.h5")
    assert store.counts["unreadable"] == 0
    assert store.counts["pending"] > 0
    crops.with_name("away").rename(crops)
    extract(again(store=tmp_path / "whole.h5"))
    assert extract(again()).encoded == ROWS
    assert (tmp_path / "s.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_embeddings_too_large_for_float16_are_an_error(
    again: Callable[..., ExtractSettings], tmp_path: Path, tiny_encoder: str
) -> None:
    folder = tmp_path / "large"
    shutil.copytree(tiny_encoder.removeprefix("local-dir:"), folder)
    weights = load_file(folder / "open_clip_model.safetensors")
    weights["visual.proj"] *= 1e7
    save_file(weights, folder / "open_clip_model.safetensors")
    with pytest.raises(StoreError, match=r"^The embedding of row 0 is not finite in float16.* try --precision fp32"):
        extract(again(model=f"local-dir:{folder}"))
    assert EmbeddingStore.open(tmp_path / "s.h5").counts["encoded"] == 0


def test_a_store_in_use_is_refused(settings: ExtractSettings) -> None:
    assert settings.store is not None
    with (
        writing_lock(settings.store, Listener()),
        pytest.raises(StoreError, match=r"is being written by another process"),
    ):
        extract(settings)


def test_no_crops_leaves_no_store(again: Callable[..., ExtractSettings], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"^No crops found in"):
        extract(again(crops=(tmp_path / "empty",)))
    assert not (tmp_path / "s.h5").exists()


def test_names_of_any_bytes_can_be_listed(settings: ExtractSettings, crops: Path) -> None:
    try:
        (crops / "a" / "bad\udcff99.jpg").touch()
    except (OSError, UnicodeEncodeError):
        pytest.skip("this system takes file names in UTF-8 only")
    result = extract(settings)
    assert (result.rows, result.unreadable) == (ROWS + 1, 1)
    assert (
        Path(f"{settings.store}.unreadable.txt").read_bytes().endswith(b"bad\xff99.jpg\tthe file is empty (0 bytes)\n")
    )
    assert extract(settings).unreadable == 1


def test_names_go_over_settings(again: Callable[..., ExtractSettings], tmp_path: Path) -> None:
    result = extract(again(), store=tmp_path / "elsewhere.h5")
    assert result.store == str(tmp_path / "elsewhere.h5")
    with pytest.raises(ConfigError, match=r"Unknown setting 'stor' \(did you mean 'store'\?\)"):
        extract(again(), stor=tmp_path / "s.h5")


def test_a_list_of_unreadable_crops_that_can_not_be_written_hides_no_error(
    again: Callable[..., ExtractSettings], crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(crops)
    (tmp_path / "s.h5.unreadable.txt").mkdir()
    heard = Recorder(interrupt_at=ROWS)
    with pytest.raises(KeyboardInterrupt):
        extract(again(), listener=heard)
    assert [text for text in heard.warnings if "s.h5.unreadable.txt can't be written: " in text]
    with pytest.raises(InputError, match=r"s.h5.unreadable.txt can't be written: "):
        extract(again())
    (tmp_path / "s.h5.unreadable.txt").rmdir()
    assert extract(again()).encoded_now == 0
    assert (tmp_path / "s.h5.unreadable.txt").is_file()


def test_whole_photos_are_warned_of_once(tmp_path: Path, tiny_encoder: str) -> None:
    words = {"model": tiny_encoder, "device": "cpu", "batch_size": 2}
    for name, videos in (("photos", {"a": range(1, 22)}), ("few", {"a": [1]})):
        root, heard = write_crops(tmp_path / name, videos, size=(520, 30)), Recorder()
        extract(crops=(root,), store=tmp_path / f"{name}.h5", listener=heard, **words)
        assert [text for text in heard.warnings if "Most images are more than 512 pixels" in text] == [PHOTOS]
        checks = doctor(crops=(root,), model=tiny_encoder, device="cpu").checks
        assert [check.state for check in checks if check.finding == PHOTOS] == ["warning"]
    write_crops(root, {"a": [2]}, size=(512, 512))
    heard = Recorder()
    extract(crops=(root,), store=tmp_path / "half.h5", listener=heard, **words)
    assert heard.warnings == []

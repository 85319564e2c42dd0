"""The detector: its file, where it comes from, and the faces it gives, held against OpenCV called by hand."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import cv2
import huggingface_hub
import numpy as np
import pytest

from affcache.errors import ConfigError, InputError
from affcache.faces import detector as detector_module
from affcache.faces.detector import (
    DETECTORS,
    YUNET_BYTES,
    YUNET_FILE,
    YUNET_SHA256,
    YuNet,
    detector_at_hand,
    load_detector,
)
from affcache.faces.media import Media, read_photo, require_video_extra
from tests.faces.clips import Pixels, frames_of


def by_hand(weights: Path, pixels: Pixels, confidence: float = 0.7) -> np.ndarray:
    """Return OpenCV's own rows (K, 15), the surest first."""
    network = cv2.FaceDetectorYN.create(str(weights), "", (pixels.shape[1], pixels.shape[0]), confidence, 0.3, 5000)
    _, found = network.detect(np.ascontiguousarray(pixels[:, :, ::-1]))
    return np.empty((0, 15), np.float32) if found is None else found[np.argsort(-found[:, 14])]


def rows_of(faces: list[detector_module.Face]) -> np.ndarray:
    """Return faces as OpenCV has them (K, 15)."""
    return np.array([[*face.box, *face.landmarks.ravel(), face.confidence] for face in faces], np.float32).reshape(
        -1, 15
    )


# The file


def test_a_file_of_other_bytes_is_refused_with_both_hashes(tmp_path: Path) -> None:
    other = tmp_path / YUNET_FILE
    other.write_bytes(b"another network")
    with pytest.raises(InputError, match="is not the expected one") as caught:
        load_detector(str(other))
    message = str(caught.value)
    assert hashlib.sha256(b"another network").hexdigest() in message
    assert YUNET_SHA256 in message
    assert "https://huggingface.co/opencv/face_detection_yunet" in message
    assert "--detector FILE" in message


def test_a_file_that_is_far_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "large.onnx").write_bytes(bytes(3 * YUNET_BYTES))
    with pytest.raises(InputError, match=r"can't be read: it has 697,767 bytes.* Expected .* of 232,589 bytes"):
        load_detector(str(tmp_path / "large.onnx"))


def test_a_folder_is_no_detector(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be read: Is a directory"):
        load_detector(str(tmp_path))


def test_a_name_that_is_neither_file_nor_detector_is_a_mistake() -> None:
    with pytest.raises(
        ConfigError, match=r"--detector yunnet is neither a file nor a detector\. Expected yunet, or face"
    ):
        load_detector("yunnet")


def test_without_a_network_it_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route to the hub\nand a second line")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(InputError, match=r"could not be fetched \(ConnectionError: no route to the hub\)") as caught:
        load_detector("yunet")
    assert f"fetch https://huggingface.co/opencv/face_detection_yunet/resolve/main/{YUNET_FILE}" in str(caught.value)
    assert "--detector FILE" in str(caught.value)
    assert detector_at_hand() is None


def test_what_the_hub_gives_is_checked_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def download(repository: str, name: str, local_files_only: bool) -> str:
        asked.append((repository, name, local_files_only))
        (tmp_path / name).write_bytes(b"changed on the way")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(InputError, match="is not the expected one"):
        load_detector("yunet")
    assert detector_at_hand() is None
    assert asked == [
        ("opencv/face_detection_yunet", YUNET_FILE, False),
        ("opencv/face_detection_yunet", YUNET_FILE, True),
    ]


def test_another_detector_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(file: Path | None) -> Any:
        return lambda confidence, side: (file, confidence, side)

    monkeypatch.setattr(detector_module, "DETECTORS", {**DETECTORS, "mine": mine})
    assert load_detector("mine")(0.4, 200) == (None, 0.4, 200)


@pytest.mark.parametrize("package", ["av", "cv2"])
def test_without_the_extra_it_says_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require_video_extra()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{package} can't be imported .*Expected the extra 'video'") as caught:
        require_video_extra()
    assert "pip install 'affcache[video]'" in str(caught.value)
    photos = [Media(Path("a.jpg"), "a"), Media(Path("b.PNG"), "b")]
    if package == "cv2":
        assert detector_at_hand() is None
        with pytest.raises(ConfigError, match="cv2 can't be imported"):
            require_video_extra(photos)
    else:
        require_video_extra(photos)  # they need nothing to decode videos
        with pytest.raises(ConfigError, match="av can't be imported"):
            require_video_extra([*photos, Media(Path("c.mp4"), "c")])


# The faces


class Network:
    """Stands for OpenCV's: keeps what it is shown, and answers with the same rows each time."""

    def __init__(self, *rows: list[float]) -> None:
        self.rows = np.array(rows, np.float32).reshape(-1, 15)
        self.size, self.shown = (0, 0), np.empty(0, np.uint8)

    def setInputSize(self, size: tuple[int, int]) -> None:
        self.size = size

    def detect(self, pixels: Pixels) -> tuple[int, np.ndarray | None]:
        self.shown = pixels
        assert self.size == (pixels.shape[1], pixels.shape[0])
        return 1, self.rows if len(self.rows) else None


def detector_with(monkeypatch: pytest.MonkeyPatch, network: Network, side: int) -> YuNet:
    monkeypatch.setattr(cv2.FaceDetectorYN, "create", lambda *_: network)
    return YuNet(b"weights", 0.7, side)


ROW = [10.0, 20, 30, 40, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0.8]


def test_a_larger_picture_is_looked_at_smaller_and_its_faces_are_scaled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(ROW)
    (face,) = detector_with(monkeypatch, network, 100).detect(np.zeros((200, 403, 3), np.uint8))
    assert network.shown.shape == (50, 100, 3)
    assert face.box.tolist() == pytest.approx([40.3, 80, 120.9, 160])
    assert face.landmarks.tolist()[1] == pytest.approx([3 * 4.03, 4 * 4])
    assert face.confidence == pytest.approx(0.8)


@pytest.mark.parametrize("shape", [(100, 60), (60, 100), (8, 8)])
def test_a_picture_that_is_no_larger_is_looked_at_as_it_is(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Network(ROW)
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    (face,) = detector_with(monkeypatch, network, 100).detect(pixels)
    np.testing.assert_array_equal(network.shown, pixels[:, :, ::-1])  # in OpenCV's order of colours
    assert [*face.box, *face.landmarks.ravel()] == ROW[:14]


def test_the_surest_face_comes_first_and_what_is_no_number_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [[*ROW[:14], 0.75], [np.nan, *ROW[1:14], 0.99], [*ROW[:14], 0.9], [*ROW[:14], 0.8]]
    faces = detector_with(monkeypatch, Network(*rows), 100).detect(np.zeros((50, 50, 3), np.uint8))
    assert [face.confidence for face in faces] == pytest.approx([0.9, 0.8, 0.75])


def test_a_picture_without_a_face_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert detector_with(monkeypatch, Network(), 100).detect(np.zeros((50, 50, 3), np.uint8)) == []


@pytest.mark.real
@pytest.mark.parametrize("name", ["single_face.jpg", "multi_face.jpg"])
def test_faces_are_those_of_opencv_called_by_hand(name: str, weights: Path, media: Path) -> None:
    pixels = read_photo(media / name)
    found = rows_of(load_detector(str(weights))(0.7, 8192).detect(pixels))
    expected = by_hand(weights, pixels)
    assert len(expected) == {"single_face.jpg": 1, "multi_face.jpg": 5}[name]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.real
def test_faces_of_a_video_are_those_of_opencv_called_by_hand(weights: Path, media: Path) -> None:
    detector = load_detector(str(weights))(0.7, 1024)
    seen = 0
    for frame in frames_of(media / "face_noface.mov")[::12]:
        expected = by_hand(weights, frame.pixels)
        np.testing.assert_array_equal(rows_of(detector.detect(frame.pixels)), expected)
        seen += len(expected)
    assert seen > 3


@pytest.mark.real
def test_a_larger_confidence_leaves_the_less_sure_faces_out(weights: Path, media: Path) -> None:
    pixels = read_photo(media / "multi_face.jpg")
    make = load_detector(str(weights))
    sure = [face.confidence for face in make(0.5, 8192).detect(pixels)]
    middle = (sure[2] + sure[3]) / 2
    assert [face.confidence for face in make(middle, 8192).detect(pixels)] == pytest.approx(sure[:3])
    assert make(0.999, 8192).detect(pixels) == []


@pytest.mark.real
def test_a_picture_made_smaller_has_its_faces_in_the_same_place(weights: Path, media: Path) -> None:
    pixels = read_photo(media / "multi_face.jpg")
    make = load_detector(str(weights))
    whole, small = (sorted(make(0.7, side).detect(pixels), key=lambda face: float(face.box[0])) for side in (8192, 600))
    assert max(pixels.shape) > 600
    assert len(whole) == len(small) == 5
    for one, other in zip(whole, small, strict=True):
        assert np.abs(one.landmarks - other.landmarks).max() < 0.15 * one.box[2]


@pytest.mark.real
def test_pictures_of_any_shape_can_be_looked_at(weights: Path) -> None:
    detector = load_detector(str(weights))(0.7, 256)
    for shape in ((1, 1), (8, 8), (8, 5000), (5000, 8), (33, 31)):
        assert detector.detect(np.zeros((*shape, 3), np.uint8)) == []

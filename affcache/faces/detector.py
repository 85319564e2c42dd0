"""Finding faces in a picture: the protocol of a detector, YuNet, and where its weights come from."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from affcache.errors import ConfigError, InputError, first_line
from affcache.files import read_bytes

# YuNet of OpenCV's model zoo, MIT: Wu, Peng and Yu, YuNet: A Tiny Millisecond-level Face Detector, 2023
YUNET_REPOSITORY, YUNET_FILE = "opencv/face_detection_yunet", "face_detection_yunet_2023mar.onnx"
YUNET_SHA256 = "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4"
YUNET_BYTES = 232_589
YUNET_URL = f"https://huggingface.co/{YUNET_REPOSITORY}/resolve/main/{YUNET_FILE}"
MOST_OVERLAP = 0.3  # of two boxes, intersection over union; of those that overlap more, the surer one stays
MOST_CANDIDATES = 5_000
LOG_ERRORS = 2  # OpenCV's LOG_LEVEL_ERROR


@dataclass(frozen=True)
class Face:
    """One face in a picture, in pixels of it, (0, 0) being the upper left corner."""

    box: npt.NDArray[np.float32]  # (4,) x and y of the upper left corner, width, height; may reach beyond the picture
    landmarks: npt.NDArray[np.float32]  # (5, 2) x and y of LANDMARKS
    confidence: float  # in [0, 1]


# as a person has them: the right eye is on the left of the picture
LANDMARKS = ("right_eye", "left_eye", "nose", "mouth_right", "mouth_left")


class Detector(Protocol):
    """What finds faces. One is used by one thread at a time."""

    def detect(self, pixels: npt.NDArray[np.uint8]) -> list[Face]:
        """Return the faces in pixels (height, width, 3) RGB, the surest first."""
        ...


Load = Callable[[Path | None], Callable[[float, int], Detector]]


class YuNet:
    """OpenCV's YuNet, which has five landmarks.

    It was trained on faces of 10 to 300 pixels, so that a larger picture is made smaller first.

    Args:
        weights: the bytes of its ONNX file.
        confidence: the least that counts, in [0, 1].
        side: pixels that the longer side of a picture has at most when it is looked at.
    """

    def __init__(self, weights: bytes, confidence: float, side: int) -> None:
        import cv2

        self._side = side
        content = np.frombuffer(weights, dtype=np.uint8)
        with _quiet_opencv():
            self._network: Any = cv2.FaceDetectorYN.create(
                "onnx", content, np.empty(0, np.uint8), (320, 320), confidence, MOST_OVERLAP, MOST_CANDIDATES
            )

    def detect(self, pixels: npt.NDArray[np.uint8]) -> list[Face]:
        """Return the faces in pixels (height, width, 3) RGB, the surest first."""
        import cv2

        height, width = pixels.shape[:2]
        scale = min(self._side / max(height, width), 1.0)
        if scale < 1:
            size = (max(round(width * scale), 1), max(round(height * scale), 1))
            pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
        self._network.setInputSize((pixels.shape[1], pixels.shape[0]))
        _, found = self._network.detect(np.ascontiguousarray(pixels[:, :, ::-1]))  # BGR
        if found is None:
            return []
        back = np.array([width / pixels.shape[1], height / pixels.shape[0]], np.float32)  # to the picture's own pixels
        return [
            Face(row[:4] * np.tile(back, 2), row[4:14].reshape(5, 2) * back, float(row[14]))
            for row in found[np.argsort(-found[:, 14], kind="stable")]
            if np.isfinite(row).all()
        ]


@contextmanager
def _quiet_opencv() -> Iterator[None]:
    """Keep OpenCV's remarks on its own networks from standard error for a while."""
    import cv2

    log: Any = getattr(cv2.utils, "logging", cv2)  # of OpenCV 5; 4 has the functions at its top
    before = log.getLogLevel()
    log.setLogLevel(LOG_ERRORS)
    try:
        yield
    finally:
        log.setLogLevel(before)


def yunet(file: Path | None) -> Callable[[float, int], Detector]:
    """Return what makes detectors of YuNet's weights: of a file, or fetched from the model hub on first use.

    Raises:
        InputError: the weights can't be had, or aren't YuNet's.
    """
    path = file or _fetch_yunet()
    try:
        weights = read_bytes(path, 2 * YUNET_BYTES)
    except OSError as error:
        raise InputError(
            f"The detector's file {path} can't be read: {error.strerror or error}. Expected {YUNET_FILE} of "
            f"{YUNET_BYTES:,} bytes. Check --detector."
        ) from None
    if (found := hashlib.sha256(weights).hexdigest()) != YUNET_SHA256:
        raise InputError(
            f"The detector's file {path} is not the expected one: its sha256 is {found}. Expected {YUNET_FILE} with "
            f"{YUNET_SHA256}. Fetch it from {YUNET_URL}, and say --detector FILE."
        )
    return lambda confidence, side: YuNet(weights, confidence, side)


def _fetch_yunet(*, here_only: bool = False) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(YUNET_REPOSITORY, YUNET_FILE, local_files_only=here_only))
    except Exception as error:  # of the network, the hub or the disk: its client raises nearly anything
        raise InputError(
            f"The detector's weights could not be fetched ({type(error).__name__}: {first_line(error)}). Expected a "
            f"connection to the model hub. Without one, fetch {YUNET_URL} elsewhere, and say --detector FILE."
        ) from None


# by the name that --detector takes; a further detector is a file with a function like ``yunet``, and a line here
YUNET = "yunet"
DETECTORS: Mapping[str, Load] = {YUNET: yunet}


def load_detector(name: str) -> Callable[[float, int], Detector]:
    """Return what makes detectors, one for each thread, from the least confidence and the longest side in pixels.

    Args:
        name: one of ``DETECTORS``, or the path of YuNet's file.

    Raises:
        InputError: its weights can't be had, or are others.
        ConfigError: there is no such detector.
    """
    if name in DETECTORS:
        return DETECTORS[name](None)
    if not Path(name).exists():
        raise ConfigError(
            f"--detector {name} is neither a file nor a detector. Expected {', '.join(DETECTORS)}, or {YUNET_FILE}."
        )
    return yunet(Path(name))


def detector_at_hand() -> Callable[[float, int], Detector] | None:
    """Return what makes YuNet's detectors where all it needs is here already; None where it isn't."""
    try:
        import cv2  # noqa: F401

        return yunet(_fetch_yunet(here_only=True))
    except (ImportError, InputError):
        return None

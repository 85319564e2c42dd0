"""What kind of pictures crops are: aligned as Aff-Wild2's, loose, or whole photos; by the landmarks in them."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from affcache.crops.archives import UnreadableCropError
from affcache.crops.crop_list import CropList
from affcache.crops.images import decode_crop
from affcache.faces.align import SIDE, TEMPLATE
from affcache.faces.detector import Detector

# RMS distance of five landmarks to the template, in pixels of a crop of 112: 3.1 in the median of faces that were
# aligned here and found anew, 8.8 in crops of press photographs, 10 to 18 in squares around a detector's box
ALIGNED = 5.0
# Longer side of a face's box, as a share of the picture's: 0.8 to 1 in crops, 0.33 in a portrait, 0.13 in a group
PHOTO = 0.4
LEAST_CONFIDENCE = 0.5  # of the detector
LEAST_FOUND = 0.5  # of the pictures looked at, to say anything


@dataclass(frozen=True)
class CropKind:
    """What pictures are; distances are in pixels of a picture scaled to 112."""

    kind: str  # aligned, loose, photos, or unknown where few have a face
    looked_at: int
    found: int  # pictures with a face
    distance: float = float("nan")  # median over pictures of the RMS distance of landmarks to the template
    eyes: tuple[float, float] = (float("nan"),) * 2  # where they lie on average: x and y
    mouth: tuple[float, float] = (float("nan"),) * 2
    share: float = float("nan")  # median of a face's longer side against the picture's

    @property
    def sentence(self) -> str:
        """What was found, for people."""
        if self.kind == "unknown":
            return f"a face was found in {self.found} of {self.looked_at}; crops of faces have one each"
        wanted_eyes, wanted_mouth = TEMPLATE[:2].mean(axis=0), TEMPLATE[3:].mean(axis=0)
        what = {
            "aligned": "aligned as Aff-Wild2's",
            "loose": "loose crops, not aligned",
            "photos": "whole photos, of which faces are a small part",
        }[self.kind]
        return (
            f"{what}: scaled to {SIDE} pixels, eyes lie at ({self.eyes[0]:.0f}, {self.eyes[1]:.0f}) on average and the "
            f"mouth at ({self.mouth[0]:.0f}, {self.mouth[1]:.0f}); aligned ones have ({wanted_eyes[0]:.0f}, "
            f"{wanted_eyes[1]:.0f}) and ({wanted_mouth[0]:.0f}, {wanted_mouth[1]:.0f}). Landmarks are "
            f"{self.distance:.1f} pixels away, a face takes {self.share:.0%} of the longer side"
        )


def sample_of(crops: CropList, count: int) -> list[npt.NDArray[np.uint8]]:
    """Decode some crops, spread over all; those that can't be read are left out."""
    pictures = []
    for row in np.unique(np.linspace(0, len(crops) - 1, count).astype(np.int64)).tolist():
        with suppress(OSError, UnreadableCropError):
            pictures.append(decode_crop(crops.read(row)).pixels)
    return pictures


def crop_kind(pictures: Sequence[npt.NDArray[np.uint8]], detector: Detector) -> CropKind:
    """Say what kind of pictures (height, width, 3) are.

    The largest face of each counts. Pictures get a black margin, without which a face that fills one isn't found.
    """
    landmarks, shares = [], []
    for pixels in pictures:
        height, width = pixels.shape[:2]
        longer = max(height, width)
        margin = longer // 2
        padded = np.pad(pixels, ((margin, margin), (margin, margin), (0, 0)))
        faces = detector.detect(padded)
        if faces:
            face = max(faces, key=lambda face: float(face.box[2] * face.box[3]))
            landmarks.append((face.landmarks - margin) * SIDE / longer)
            shares.append(float(max(face.box[2:])) / longer)
    if len(landmarks) < LEAST_FOUND * len(pictures) or not landmarks:
        return CropKind("unknown", len(pictures), len(landmarks))
    points = np.stack(landmarks)  # (n, 5, 2)
    distance = float(np.median(np.sqrt(((points - TEMPLATE) ** 2).sum(axis=2).mean(axis=1))))
    share = float(np.median(shares))
    kind = "photos" if share < PHOTO else "aligned" if distance <= ALIGNED else "loose"
    (eye_x, eye_y), (mouth_x, mouth_y) = points[:, :2].mean(axis=(0, 1)), points[:, 3:].mean(axis=(0, 1))
    eyes, mouth = (float(eye_x), float(eye_y)), (float(mouth_x), float(mouth_y))
    return CropKind(kind, len(pictures), len(landmarks), distance, eyes, mouth, share)

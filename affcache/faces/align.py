"""Cutting faces out: turned and scaled so that eyes, nose and mouth lie where they do in aligned crops, or loosely."""

import numpy as np
import numpy.typing as npt

SIDE = 112  # pixels that the template is for
# where aligned crops of 112 pixels have the five landmarks: ArcFace's template (insightface, arcface_dst), in the order
# of ``detector.LANDMARKS``
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
Points = npt.NDArray[np.floating]


def similarity(points: Points, onto: Points) -> npt.NDArray[np.float64]:
    """Return the rotation, scaling and shift that brings points (n, 2) nearest to others (n, 2), as a matrix (2, 3).

    The least-squares solution of Umeyama (Least-Squares Estimation of Transformation Parameters Between Two Point
    Patterns, 1991) without reflections, which in the plane is one division of complex numbers.
    """
    source, target = (np.asarray(p, np.float64) @ [1, 1j] for p in (points, onto))  # (n,) x + iy
    centred = source - source.mean()
    spread = float((np.abs(centred) ** 2).sum())
    turn = (centred.conj() * (target - target.mean())).sum() / spread if spread else 1.0 + 0j
    shift = target.mean() - turn * source.mean()
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])


def aligned_crop(pixels: npt.NDArray[np.uint8], landmarks: Points, side: int = SIDE) -> npt.NDArray[np.uint8]:
    """Cut a face out of pixels (height, width, 3) so that its landmarks (5, 2) lie on the template.

    Returns:
        uint8 (side, side, 3); what lies beyond the picture is black.
    """
    scale = side / SIDE
    # pixel centres lie at whole numbers, edges half a pixel before
    return _warped(pixels, similarity(landmarks, (TEMPLATE + 0.5) * scale - 0.5), side)


def loose_crop(pixels: npt.NDArray[np.uint8], box: Points, margin: float, side: int = SIDE) -> npt.NDArray[np.uint8]:
    """Cut the square around a face's box, larger by ``margin`` of its longer side all around, and resize it.

    Returns:
        uint8 (side, side, 3); what lies beyond the picture is black.
    """
    x, y, width, height = map(float, box)
    whole = max(width, height) * (1 + 2 * margin)
    scale = side / max(whole, 1.0)
    left, top = x + (width - whole) / 2, y + (height - whole) / 2
    shift = [(0.5 - left) * scale - 0.5, (0.5 - top) * scale - 0.5]
    return _warped(pixels, np.array([[scale, 0, shift[0]], [0, scale, shift[1]]]), side)


def _warped(pixels: npt.NDArray[np.uint8], matrix: npt.NDArray[np.float64], side: int) -> npt.NDArray[np.uint8]:
    """Warp a picture by a similarity; what gets much smaller is averaged first: bilinear weights skip pixels."""
    import cv2

    scale = float(np.hypot(matrix[0, 0], matrix[1, 0]))
    if scale <= 0.5:
        pixels, matrix = _halved(pixels, matrix, int(0.999 / scale), side)
    warped = cv2.warpAffine(pixels, matrix, (side, side), flags=cv2.INTER_LINEAR, borderValue=(0, 0, 0))
    return np.asarray(warped, np.uint8)


def _halved(
    pixels: npt.NDArray[np.uint8], matrix: npt.NDArray[np.float64], times: int, side: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
    """Make the part of a picture that a crop of it needs so many times smaller, by means of whole pixels."""
    import cv2

    inverse = np.asarray(cv2.invertAffineTransform(matrix))
    corners = np.array([[-1, -1, 1], [side, -1, 1], [-1, side, 1], [side, side, 1]]) @ inverse.T  # (4, 2)
    first = np.clip(np.floor(corners.min(axis=0)).astype(int) - times, 0, None)
    last = np.clip(np.ceil(corners.max(axis=0)).astype(int) + times, first + times, None)
    part = pixels[first[1] : last[1], first[0] : last[0]]
    height, width = part.shape[0] // times * times, part.shape[1] // times * times
    if not height or not width:  # all of it lies beyond the picture
        return pixels, matrix
    small = cv2.resize(part[:height, :width], (width // times, height // times), interpolation=cv2.INTER_AREA)
    # a small pixel's centre is the middle of those it stands for
    turn = matrix[:, :2] * times
    shift = matrix[:, 2] + matrix[:, :2] @ (first + (times - 1) / 2)
    return np.asarray(small, np.uint8), np.column_stack([turn, shift])

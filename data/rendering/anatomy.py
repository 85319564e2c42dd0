"""How action units move a face: every curve of the face as a function of identity and intensities.

All curves are float64 arrays of shape (n, 2), x and y in crop pixels (112 x 112, y down) of the upright frontal face.
`side` is -1 for the image's left half of the face and 1 for its right half.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from affcache import TASKS
from data.rendering.identity import Identity, UnlabelledMotion

Curve = NDArray[np.float64]

ACTION_UNITS = TASKS["au"].classes
SIDES = (-1, 1)
CENTRE_X = 56.0
EYE_Y, EYE_X = 48.0, 17.5
NOSE_Y, MOUTH_Y, CHIN_Y = 66.0, 82.0, 103.0


@dataclass(frozen=True)
class Units:
    """The twelve intensities by name, so that the anatomy reads as in the manual."""

    au1: float
    au2: float
    au4: float
    au6: float
    au7: float
    au10: float
    au12: float
    au15: float
    au23: float
    au24: float
    au25: float
    au26: float


@dataclass(frozen=True)
class Eye:
    """One eye: lid curves from the inner to the outer corner, and the iris."""

    upper: Curve
    lower: Curve
    crease: Curve
    iris: tuple[float, float]
    iris_radius: float


@dataclass(frozen=True)
class Mouth:
    """Lip borders from the image's left corner to its right, top to bottom; the opening lies between the inner two."""

    upper_outer: Curve
    upper_inner: Curve
    lower_inner: Curve
    lower_outer: Curve
    opening: float
    """Height of the opening at its middle, pixels."""


def closed_spline(points: Curve, steps: int = 6) -> Curve:
    """Return a closed Catmull-Rom spline through `points` (n, 2) as (n * steps, 2)."""
    before, after, beyond = np.roll(points, 1, 0), np.roll(points, -1, 0), np.roll(points, -2, 0)
    t = (np.arange(steps) / steps)[None, :, None]
    first, second, third, fourth = (p[:, None, :] for p in (before, points, after, beyond))
    curve = 0.5 * (
        2 * second
        + (third - first) * t
        + (2 * first - 5 * second + 4 * third - fourth) * t**2
        + (3 * second - first - 3 * third + fourth) * t**3
    )
    return np.asarray(curve.reshape(-1, 2))


def head_outline(identity: Identity, units: Units) -> Curve:
    """Return the closed outline of the face; AU26 lowers the jaw, AU6 and AU12 fill the cheeks."""
    width, jaw = identity.face_width, identity.face_width * identity.jaw_width
    drop = 6.5 * units.au26
    chin = CHIN_Y + identity.chin_length + drop
    half = np.array(
        [
            [12, -2],
            [26, 6],
            [33.5 * width, 26],
            [35.5 * width, 48],
            [(34.0 + 0.8 * max(units.au6, units.au12)) * width, 64],
            [(29.5 - 0.8 * units.au26) * jaw, 82 + 0.4 * drop],
            [(20.5 - 1.2 * units.au26) * jaw, chin - 8],
            [9.5 * jaw, chin - 0.8],
        ]
    )
    left = half[::-1] * [-1, 1]
    return closed_spline(np.concatenate([half, left]) + [CENTRE_X, 0])


def corner_pull(units: Units, motion: UnlabelledMotion, side: int) -> float:
    """Return AU12 as it acts on one side of a smile that may be lopsided, 0 to 1."""
    return units.au12 * min(1.0, max(0.0, 1 + motion.asymmetry * side))


def brow(identity: Identity, units: Units, side: int) -> Curve:
    """Return the brow's middle line from its inner to its outer end (AU1, AU2, AU4)."""
    t = np.linspace(0, 1, 12)
    x = 7.6 + 20.5 * t - 2.6 * units.au4 * (1 - t)
    y = EYE_Y - 9.6 - 2.2 * identity.brow_arch * np.sin(np.pi * t**1.1) + 1.6 * t**2
    y = y - 6.8 * units.au1 * (1 - t) ** 1.4 - 6.8 * units.au2 * np.sin(0.72 * np.pi * t**1.15)
    y = y + units.au4 * (4.5 - 2.4 * t)
    return np.stack([CENTRE_X + side * x, y], 1)


def eye(identity: Identity, units: Units, motion: UnlabelledMotion, side: int) -> Eye:
    """Return one eye: AU6 and AU7 narrow it, widening and AU1 with AU2 open it, a blink closes it."""
    size = identity.eye_size
    widening = max(motion.eye_widening, 0.3 * min(units.au1, units.au2))
    up = size * (4.3 + 2.4 * widening - 1.5 * units.au7 - 0.7 * units.au6 - 0.4 * units.au4)
    down = size * (3.0 + 0.8 * widening - 1.3 * units.au7 - 1.5 * units.au6)
    up = up * (1 - motion.blink) - motion.blink * (down - 0.5)
    t = np.linspace(-1, 1, 15)
    x = EYE_X + 8.3 * size * t
    axis = EYE_Y + 0.6 - 0.5 * identity.eye_tilt * t
    # The upper lid peaks towards the nose, the lower lid away from it.
    upper = axis - up * (1 - t**2) ** 0.62 * (1 - 0.12 * t)
    lower = axis + down * (1 - t**2) ** 0.75 * (1 + 0.15 * t)
    crease = np.minimum(upper, axis - 1.5) - 1.9 + 0.9 * units.au4 + 0.5 * (1 - t**2)
    columns = CENTRE_X + side * x
    return Eye(
        upper=np.stack([columns, upper], 1),
        lower=np.stack([columns, lower], 1),
        crease=np.stack([columns, crease], 1),
        iris=(CENTRE_X + side * EYE_X + 2.2 * motion.gaze, EYE_Y + 0.2),
        iris_radius=3.9 * size,
    )


def nose_wing_height(units: Units, motion: UnlabelledMotion) -> float:
    """Return the y of the nostril wings; AU10 and wrinkling the nose lift them."""
    return NOSE_Y + 1.5 - 1.6 * units.au10 - 1.6 * motion.nose_wrinkle


def mouth(identity: Identity, units: Units, motion: UnlabelledMotion) -> Mouth:
    """Return the lips: AU10, AU12, AU15, AU23, AU24, AU25, AU26 and the stretch of fear."""
    t = np.linspace(-1, 1, 31)
    side_of = np.where(t < 0, -1, 1)
    pull = np.array([corner_pull(units, motion, side) for side in SIDES])[(side_of + 1) // 2]
    bow = 1 - t**2
    rounding = units.au26 * (1 - pull) * (1 - motion.lip_stretch)
    half_width = 14.0 * identity.mouth_width + 5.0 * pull + 4.6 * motion.lip_stretch - 2.4 * rounding
    half_width = half_width + 0.6 * units.au15 - 5.4 * units.au23 + 0.8 * units.au24
    x = CENTRE_X + half_width * t

    corner = -7.0 * pull + 6.3 * units.au15 + 3.0 * units.au10 + 1.6 * motion.lip_stretch + 1.4 * units.au26
    middle = MOUTH_Y + 0.8 * pull - 1.6 * units.au15 - 2.8 * units.au10 - 1.4 * units.au24
    at_rest = max(0.0, 1 - units.au25 - units.au26 - units.au12 - units.au24)
    ripple = 0.5 * at_rest * np.cos(2 * np.pi * t) * (1 - np.abs(t))
    line = middle + corner * np.abs(t) ** 1.7 + ripple

    # A smile opens as a crescent: the upper lip stays on the line and the lower one drops.
    gap_up = 1.9 * units.au25 * (1 - 0.5 * pull) + 1.6 * units.au26 + 2.0 * units.au10 * units.au25
    gap_down = 3.0 * units.au25 + 1.4 * units.au12 * units.au25 + 8.6 * units.au26
    bow_sharpness = 0.75 - 0.2 * units.au26
    upper_inner = line - gap_up * bow**bow_sharpness
    lower_inner = line + gap_down * bow**bow_sharpness

    thinness = (1 - 0.42 * units.au23) * (1 - 0.85 * units.au24) * (1 - 0.25 * pull)
    upper_height = 3.4 * identity.lip_fullness * thinness
    lower_height = 4.5 * identity.lip_fullness * thinness
    # AU10 lifts the upper lip beside its middle, into the square shape of disgust.
    lift = 3.0 * units.au10 * np.exp(-(((np.abs(t) - 0.42) / 0.3) ** 2))
    cupid = (1 - np.abs(t) ** 1.7) * (1 - 0.28 * np.exp(-((t / 0.16) ** 2)))
    upper_outer = upper_inner - upper_height * cupid - lift * (1 - np.abs(t) ** 3)
    lower_outer = lower_inner + lower_height * bow**0.8
    return Mouth(
        upper_outer=np.stack([x, upper_outer], 1),
        upper_inner=np.stack([x, upper_inner - 0.4 * lift], 1),
        lower_inner=np.stack([x, lower_inner], 1),
        lower_outer=np.stack([x, lower_outer], 1),
        opening=float((lower_inner - upper_inner)[len(t) // 2]),
    )

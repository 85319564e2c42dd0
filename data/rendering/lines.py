"""The folds and bulges that action units raise in the skin, and those of age."""

from __future__ import annotations

import numpy as np

from data.rendering.anatomy import (
    CENTRE_X,
    EYE_X,
    EYE_Y,
    SIDES,
    Curve,
    Mouth,
    Units,
    brow,
    corner_pull,
    nose_wing_height,
)
from data.rendering.canvas import Canvas
from data.rendering.identity import Identity, UnlabelledMotion


def arc(start: tuple[float, float], end: tuple[float, float], bulge: float, points: int = 9) -> Curve:
    """Return a curve (points, 2) that leaves the straight line by `bulge` pixels, to its right on the way."""
    t = np.linspace(0, 1, points)[:, None]
    first, last = np.array(start), np.array(end)
    along = last - first
    normal = np.array([-along[1], along[0]]) / max(float(np.hypot(*along)), 1e-9)
    return np.asarray(first + along * t + normal * bulge * 4 * t * (1 - t))


def draw_lines(canvas: Canvas, identity: Identity, units: Units, motion: UnlabelledMotion, lips: Mouth) -> None:
    """Draw every fold; call it once the parts are painted."""
    _forehead(canvas, identity, units)
    _nose_root(canvas, units, motion)
    for side in SIDES:
        _around_eye(canvas, identity, units, side)
        _cheek(canvas, identity, units, motion, lips, side)
    _around_mouth(canvas, units, lips)


def _forehead(canvas: Canvas, identity: Identity, units: Units) -> None:
    for height, reach in ((25.5, 10.0), (29.5, 12.0)):
        depth = max(0.75 * units.au1, 0.22 * identity.age)
        lift = 2.0 * units.au1
        canvas.crease(arc((CENTRE_X - reach, height - lift), (CENTRE_X + reach, height - lift), 1.2), 1.6, depth)
    for side in SIDES:
        for gap in (4.2, 7.6):
            line = brow(identity, units, side)[3:11] - [0, gap]
            canvas.crease(line, 1.5, 0.7 * units.au2)


def _nose_root(canvas: Canvas, units: Units, motion: UnlabelledMotion) -> None:
    for side in SIDES:
        top = (CENTRE_X + side * 2.6, 35.0)
        canvas.crease(arc(top, (CENTRE_X + side * 3.4, 43.5), -0.8 * side), 1.8, 0.95 * units.au4)
    wrinkle = motion.nose_wrinkle
    for row in range(3):
        y = 48.5 + 3.2 * row
        canvas.crease(arc((CENTRE_X - 4.4, y - 0.8), (CENTRE_X + 4.4, y - 0.8), 1.2), 1.5, 0.75 * wrinkle, protrusion=4)
    canvas.tone(CENTRE_X, 42, 4, 3.5, -0.12 * units.au4)


def _around_eye(canvas: Canvas, identity: Identity, units: Units, side: int) -> None:
    x = CENTRE_X + side * EYE_X
    corner = CENTRE_X + side * (EYE_X + 10.0)
    depth = max(0.85 * units.au6, 0.22 * identity.age)
    for rise in (-3.6, 0.2, 4.0):
        inner, outer = (corner, EYE_Y + 0.6 + 0.3 * rise), (corner + side * 5.5, EYE_Y + 0.8 + rise)
        canvas.crease(arc(inner, outer, 0.4), 1.4, depth)
    # The raised cheek folds the skin well under the eye; a tightened lid folds just under the lashes.
    fold_y = EYE_Y + 6.8 - 1.6 * units.au6
    pouch = arc((x - side * 6.5, fold_y - 0.6), (x + side * 7.0, fold_y - 0.8), side * 1.8)
    canvas.crease(pouch, 1.5, max(0.75 * units.au6, 0.28 * identity.age))
    lid = arc((x - side * 7.0, EYE_Y + 2.6), (x + side * 7.0, EYE_Y + 2.4), side * 1.3)
    canvas.crease(lid, 1.5, 0.7 * units.au7)
    canvas.tone(x, EYE_Y - 3.4, 6.5, 1.5, -0.10 * units.au7)


def _cheek(canvas: Canvas, identity: Identity, units: Units, motion: UnlabelledMotion, lips: Mouth, side: int) -> None:
    pull = corner_pull(units, motion, side)
    corner = lips.upper_outer[0 if side < 0 else -1]
    wing = nose_wing_height(units, motion)
    start = (CENTRE_X + side * 9.0, wing - 2.5)
    end = (float(corner[0]) + side * 4.0, float(corner[1]) + 1.0 + 2.5 * pull)
    depth = max(0.7 * pull, 0.22 * identity.age)
    canvas.crease(arc(start, end, -side * (1.0 + 1.6 * pull)), 1.7, depth)
    sneer = arc((CENTRE_X + side * 8.2, wing - 6.5), (CENTRE_X + side * 15.0, wing + 9.0), -side * 1.6)
    canvas.crease(sneer, 2.2, 0.72 * units.au10)
    canvas.tone(CENTRE_X + side * 11, wing + 4, 3.0, 4.0, -0.10 * units.au10)
    apple_y = 64 - 3.0 * units.au6
    canvas.tone(CENTRE_X + side * 22, apple_y, 6.0, 4.5, 0.10 * units.au6 + 0.05 * pull)
    canvas.tone(CENTRE_X + side * 24, apple_y + 10, 5.5, 3.0, -0.08 * max(units.au6, pull))
    canvas.flush(CENTRE_X + side * 22, apple_y, 5.5, 0.35 * units.au6)
    canvas.tone(float(corner[0]) + side * 1.5, float(corner[1]) + 0.3, 1.6, 1.8, -0.22 * pull)


def _around_mouth(canvas: Canvas, units: Units, lips: Mouth) -> None:
    for index, side in ((0, -1), (-1, 1)):
        corner = lips.upper_outer[index]
        x, y = float(corner[0]), float(corner[1])
        canvas.crease(arc((x + side * 0.8, y - 0.6), (x + side * 3.4, y + 6.0), -side * 0.8), 1.6, 0.55 * units.au15)
        canvas.tone(x + side * 2.2, y + 1.5, 2.6, 3.2, -0.16 * units.au15)
        # Tightening gathers the skin around the narrowed lips.
        at = CENTRE_X + side * 3.4
        canvas.crease(arc((at, y - 6.2), (at + side * 0.8, y - 3.0), 0.0, 5), 1.3, 0.38 * units.au23)
        canvas.crease(arc((at, y + 4.0), (at + side * 0.8, y + 7.0), 0.0, 5), 1.3, 0.38 * units.au23)
        canvas.crease(arc((x + side * 1.6, y - 3.2), (x + side * 1.6, y + 3.2), -side * 1.2), 1.8, 0.6 * units.au23)
        canvas.tone(x + side * 2.6, y, 2.4, 3.0, -0.16 * units.au23)
    middle = len(lips.lower_outer) // 2
    top, bottom = float(lips.upper_outer[middle, 1]), float(lips.lower_outer[middle, 1])
    canvas.tone(CENTRE_X, top - 2.2, 8.0, 1.7, 0.22 * units.au24)
    canvas.tone(CENTRE_X, bottom + 2.6, 8.5, 2.2, 0.28 * units.au24)
    canvas.crease(arc((CENTRE_X - 8, bottom + 5.2), (CENTRE_X + 8, bottom + 5.2), -1.6), 2.2, 0.85 * units.au24)
    canvas.crease(arc((CENTRE_X - 6, bottom + 4.2), (CENTRE_X + 6, bottom + 4.2), -2.0), 1.5, 0.55 * units.au15)

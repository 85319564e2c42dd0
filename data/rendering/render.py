"""Drawing one face whose action units are known exactly: `render_face`.

The faces are practice material: they show that a pipeline runs and learns, and say nothing about people.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from affcache.errors import InputError
from data.rendering.anatomy import ACTION_UNITS, SIDES, Units, mouth
from data.rendering.canvas import CROP_SIZE, Canvas
from data.rendering.identity import Identity, Lighting, Pose, UnlabelledMotion
from data.rendering.lines import draw_lines
from data.rendering.parts import (
    paint_behind,
    paint_brow,
    paint_eye,
    paint_front_hair,
    paint_glasses,
    paint_head,
    paint_mouth,
    paint_nose,
)

__all__ = ["ACTION_UNITS", "CROP_SIZE", "Identity", "Lighting", "Pose", "UnlabelledMotion", "render_face"]


def render_face(
    identity: Identity,
    action_units: NDArray[np.float64],
    pose: Pose | None = None,
    lighting: Lighting | None = None,
    motion: UnlabelledMotion | None = None,
) -> NDArray[np.uint8]:
    """Draw one aligned face crop.

    `action_units` is float (12,) in [0, 1], in the order of `ACTION_UNITS`: 0 at rest, 1 at the apex.
    Returns uint8 RGB (112, 112, 3), the same for the same arguments.
    Raises InputError when the intensities have another shape or lie outside [0, 1].
    """
    intensities = np.asarray(action_units, dtype=np.float64)
    if intensities.shape != (len(ACTION_UNITS),):
        raise InputError(f"action_units must have shape ({len(ACTION_UNITS)},), got {intensities.shape}.")
    # Written this way round so that a NaN is refused too.
    if not bool(np.all((intensities >= 0) & (intensities <= 1))):
        raise InputError(f"action_units must lie in [0, 1], got {intensities.tolist()}.")
    pose, lighting, motion = pose or Pose(), lighting or Lighting(), motion or UnlabelledMotion()
    units = Units(*intensities.tolist())
    canvas = Canvas(pose, lighting.background)
    paint_behind(canvas, identity)
    paint_head(canvas, identity, units)
    paint_nose(canvas, identity, units, motion)
    for side in SIDES:
        paint_eye(canvas, identity, units, motion, side)
        paint_brow(canvas, identity, units, side)
    paint_mouth(canvas, identity, units, motion)
    draw_lines(canvas, identity, units, motion, mouth(identity, units, motion))
    paint_front_hair(canvas, identity)
    if identity.glasses:
        paint_glasses(canvas, identity)
    return canvas.finish(lighting)

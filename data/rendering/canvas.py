"""The canvas a face is drawn on: antialiased shapes, thin creases, soft shading, and the light over all of it."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from data.rendering.anatomy import CENTRE_X, Curve
from data.rendering.identity import Colour, Lighting, Pose

CROP_SIZE = 112
SHAPE_SCALE = 4
MASK_SCALE = 2
HEAD_CENTRE = np.array([CENTRE_X, 58.0])
LANDMARKS = np.array([[38.5, 48.0], [73.5, 48.0], [56.0, 66.0], [44.0, 82.0], [68.0, 82.0]])
"""Eyes, nose and mouth corners of a neutral frontal face; the crops are aligned on them."""
SHADOW_TINT = np.array([0.85, 1.0, 1.05])
"""Shadows on skin keep their red."""


class Projection:
    """From the upright frontal face to the crop: a curved head, rotated, then aligned on five landmarks."""

    def __init__(self, pose: Pose) -> None:
        yaw, pitch, roll = math.radians(pose.yaw), math.radians(pose.pitch), math.radians(pose.roll)
        self._yaw, self._pitch = (math.cos(yaw), math.sin(yaw)), (math.cos(pitch), math.sin(pitch))
        cos, sin = math.cos(roll), math.sin(roll)
        self._roll = np.array([[cos, sin], [-sin, cos]])
        self._shift = np.zeros(2)
        self._shift = (LANDMARKS - self(LANDMARKS)).mean(0)

    def __call__(self, points: Curve, protrusion: float = 0.0) -> Curve:
        """Project points (n, 2) that stand `protrusion` pixels out of the head's surface."""
        offset = points - HEAD_CENTRE
        x, y = offset[:, 0], offset[:, 1]
        depth = protrusion - x * x / 75 - y * y / 170
        rotated = np.empty_like(offset)
        rotated[:, 0] = x * self._yaw[0] + depth * self._yaw[1]
        rotated[:, 1] = y * self._pitch[0] + (depth * self._yaw[0] - x * self._yaw[1]) * self._pitch[1]
        return np.asarray(rotated @ self._roll + (HEAD_CENTRE + self._shift))


class Canvas:
    """Layers of one face. Every coordinate is that of the upright frontal face; the canvas applies the pose."""

    def __init__(self, pose: Pose, background: Colour) -> None:
        self._pose = pose
        self._project = Projection(pose)
        self._shapes = Image.new("RGB", (CROP_SIZE * SHAPE_SCALE,) * 2, background)
        self._pen = ImageDraw.Draw(self._shapes)
        self._creases = Image.new("L", (CROP_SIZE * MASK_SCALE,) * 2, 0)
        self._crease_pen = ImageDraw.Draw(self._creases)
        self._person = Image.new("L", (CROP_SIZE,) * 2, 0)
        self._person_pen = ImageDraw.Draw(self._person)
        self._spots: list[tuple[float, float, float, float, float, float]] = []

    def fill(self, points: Curve, colour: Colour, *, protrusion: float = 0.0, person: bool = False) -> None:
        """Fill a polygon (n, 2); `person` marks it as lit by the key light."""
        where = self._project(points, protrusion)
        self._pen.polygon((where * SHAPE_SCALE).ravel().tolist(), fill=colour)
        if person:
            self._person_pen.polygon(where.ravel().tolist(), fill=255)

    def stroke(
        self, points: Curve, width: float | NDArray[np.float64], colour: Colour, *, protrusion: float = 0.0
    ) -> None:
        """Draw a line (n, 2) whose width in pixels is one number or (n,)."""
        self.fill(_ribbon(points, width), colour, protrusion=protrusion)

    def soft_fill(self, points: Curve, colour: Colour, share: float, radius: float) -> None:
        """Blend a polygon into what is drawn so far: `share` of `colour`, its edge blurred over `radius` pixels."""
        mask = Image.new("L", (CROP_SIZE,) * 2, 0)
        ImageDraw.Draw(mask).polygon(self._project(points).ravel().tolist(), fill=round(255 * share))
        mask = mask.filter(ImageFilter.GaussianBlur(radius)).resize(self._shapes.size, Image.Resampling.BILINEAR)
        self._shapes.paste(colour, (0, 0), mask)

    def crease(self, points: Curve, width: float, depth: float, *, protrusion: float = 0.0) -> None:
        """Draw a skin fold (n, 2) that fades at both ends; `depth` 0 (none) to 1 (dark)."""
        if depth < 0.04:
            return
        taper = width * np.sin(np.pi * np.linspace(0.12, 0.88, len(points)))
        where = self._project(_ribbon(points, taper), protrusion)
        self._crease_pen.polygon((where * MASK_SCALE).ravel().tolist(), fill=round(255 * min(depth, 1.0)))

    def tone(self, x: float, y: float, spread_x: float, spread_y: float, amount: float) -> None:
        """Lighten (amount > 0) or darken (< 0) a soft spot; the amount is a share of the brightness."""
        self._spots.append((x, y, spread_x, spread_y, amount, 0.0))

    def flush(self, x: float, y: float, spread: float, amount: float) -> None:
        """Redden a soft spot, amount 0 to 1."""
        self._spots.append((x, y, spread, spread, 0.0, amount))

    def finish(self, lighting: Lighting) -> NDArray[np.uint8]:
        """Return the lit picture, uint8 (112, 112, 3)."""
        picture = np.asarray(self._shapes.reduce(SHAPE_SCALE), dtype=np.float64)  # (112, 112, 3)
        creases = self._creases.filter(ImageFilter.GaussianBlur(0.9)).reduce(MASK_SCALE)
        fold = np.asarray(creases, dtype=np.float64)[..., None] / 255
        picture *= 1 - 0.66 * fold * SHADOW_TINT
        tone, flush = self._soft_shading()
        picture *= 1 + tone[..., None]
        picture *= 1 + flush[..., None] * [0.10, -0.12, -0.10]
        person = np.asarray(self._person.filter(ImageFilter.GaussianBlur(0.8)), dtype=np.float64)[..., None] / 255
        shade, backdrop = _key_light(lighting, self._pose.yaw)
        picture *= person * shade[..., None] + (1 - person) * backdrop[..., None]
        picture *= lighting.exposure * (1 + lighting.warmth * np.array([0.06, 0.0, -0.09]))
        return np.clip(np.rint(picture), 0, 255).astype(np.uint8)

    def _soft_shading(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Add up the soft spots: tone and flush, each (112, 112)."""
        spots = np.array(self._spots).reshape(-1, 6)
        centre, spread = self._project(spots[:, :2]), spots[:, 2:4]
        grid = np.arange(CROP_SIZE)
        across = np.exp(-0.5 * ((grid - centre[:, :1]) / spread[:, :1]) ** 2)  # (spots, 112)
        down = np.exp(-0.5 * ((grid - centre[:, 1:]) / spread[:, 1:]) ** 2)
        return (down * spots[:, 4:5]).T @ across, (down * spots[:, 5:6]).T @ across


def _ribbon(points: Curve, width: float | NDArray[np.float64]) -> Curve:
    along = np.empty_like(points)
    along[1:-1] = points[2:] - points[:-2]
    along[0], along[-1] = points[1] - points[0], points[-1] - points[-2]
    length = np.maximum(np.hypot(along[:, 0], along[:, 1]), 1e-9)
    reach = np.asarray(width) / 2 / length  # (n,)
    half = np.stack([-along[:, 1] * reach, along[:, 0] * reach], 1)
    return np.concatenate([points + half, (points - half)[::-1]])


@lru_cache(maxsize=64)
def _key_light(lighting: Lighting, yaw: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the light on an egg-shaped head and on the background, both (112, 112) factors around 1."""
    grid = np.arange(CROP_SIZE)
    normal_x = np.clip((grid - CENTRE_X + 0.2 * yaw) / 46, -0.9, 0.9)[None, :]
    normal_y = np.clip((grid - 56) / 74, -0.9, 0.9)[:, None]
    normal_z = np.sqrt(np.maximum(1 - normal_x**2 - normal_y**2, 0.08))
    azimuth, elevation = np.radians([lighting.azimuth, lighting.elevation])
    facing = (
        normal_x * np.sin(azimuth) * np.cos(elevation)
        - normal_y * np.sin(elevation)
        + normal_z * np.cos(azimuth) * np.cos(elevation)
    )
    shade = 1.04 + lighting.strength * (1.1 * np.maximum(facing, -0.2) - 0.85)
    backdrop = 1.05 - 0.22 * (grid / CROP_SIZE)[:, None] * np.ones(CROP_SIZE)[None, :]
    return shade, backdrop

"""Painting the parts of a face, back to front: head, ears, hair, nose, eyes, brows, mouth, glasses."""

from __future__ import annotations

import numpy as np

from data.rendering.anatomy import (
    CENTRE_X,
    EYE_X,
    EYE_Y,
    NOSE_Y,
    SIDES,
    Curve,
    Units,
    brow,
    closed_spline,
    eye,
    head_outline,
    mouth,
    nose_wing_height,
)
from data.rendering.canvas import Canvas
from data.rendering.identity import Colour, Identity, UnlabelledMotion, mix, scale_colour

EYE_WHITE: Colour = (244, 241, 236)
LASH: Colour = (34, 24, 24)
TEETH: Colour = (246, 242, 232)
MOUTH_INSIDE: Colour = (74, 24, 30)
TONGUE: Colour = (186, 86, 92)


def ellipse(x: float, y: float, radius_x: float, radius_y: float, points: int = 24) -> Curve:
    """Return an ellipse as (points, 2)."""
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return np.stack([x + radius_x * np.cos(angle), y + radius_y * np.sin(angle)], 1)


def both_sides(half: Curve) -> Curve:
    """Mirror a right-hand outline, given as offsets from the face's middle, into a closed outline (2n, 2)."""
    return np.concatenate([half, half[::-1] * [-1, 1]]) + [CENTRE_X, 0]


def paint_behind(canvas: Canvas, identity: Identity) -> None:
    """Paint what lies behind the face: back hair, neck, shoulders and ears."""
    hair = scale_colour(identity.hair, 0.82)
    if identity.hair_style == "long":
        canvas.fill(both_sides(np.array([[0, -20], [44, -4], [46, 60], [44, 118], [0, 118]], float)), hair, person=True)
    elif identity.hair_style == "curly":
        for angle in np.linspace(-0.15, np.pi + 0.15, 11):
            canvas.fill(ellipse(CENTRE_X + 40 * np.cos(angle), 38 - 36 * np.sin(angle), 11, 12), hair, person=True)
    skin = scale_colour(identity.skin, 0.8)
    shoulders = both_sides(np.array([[14, 104], [30, 109], [62, 116], [62, 130], [0, 130]], float))
    canvas.fill(shoulders, identity.clothes, protrusion=-6, person=True)
    neck = both_sides(np.array([[18, 84], [18, 106], [12, 114], [0, 117]], float))
    canvas.fill(neck, skin, protrusion=-4, person=True)
    if identity.hair_style == "scarf":
        shawl = np.array([[0, -20], [40, -6], [43.5, 50], [39, 88], [34, 118], [0, 118]], float)
        canvas.fill(both_sides(shawl), identity.clothes, person=True)
        return
    for side in SIDES:
        ear = CENTRE_X + side * 36.0 * identity.face_width
        canvas.fill(ellipse(ear, 56, 4.2, 8.5), scale_colour(identity.skin, 0.9), person=True)
        canvas.fill(ellipse(ear + side * 0.6, 56.5, 2.0, 5.0), scale_colour(identity.skin, 0.78))


def paint_head(canvas: Canvas, identity: Identity, units: Units) -> None:
    """Paint the face's skin with its resting soft shading, and the beard."""
    outline = head_outline(identity, units)
    canvas.fill(outline, identity.skin, person=True)
    if identity.beard:
        drop = 6.5 * units.au26
        half = np.array([[33, 58], [30, 70], [24, 77], [16, 76], [9, 72.5], [0, 72.5], [0, 74]], float)
        lower = np.array([[0, 103 + drop], [14, 102 + drop], [25, 92 + drop], [31, 80], [34, 66]], float)
        right = np.concatenate([lower, half[:-1]]) + [CENTRE_X, 0]
        beard = mix(identity.skin, identity.brow, 0.6)
        for region in (right, right * [-1, 1] + [2 * CENTRE_X, 0]):
            canvas.soft_fill(region, beard, 0.6 * identity.beard, 2.5)
    chin = 99 + identity.chin_length + 6.5 * units.au26
    canvas.tone(CENTRE_X, 24, 16, 8, 0.07)
    canvas.tone(CENTRE_X, chin - 3, 6, 3.5, 0.06)
    for side in SIDES:
        canvas.tone(CENTRE_X + side * 33, 76, 5, 14, -0.12)
        canvas.tone(CENTRE_X + side * 33, 34, 5, 12, -0.07)
        canvas.flush(CENTRE_X + side * 21, 64, 6.5, 0.45)


def paint_nose(canvas: Canvas, identity: Identity, units: Units, motion: UnlabelledMotion) -> None:
    """Paint bridge, wings, nostrils and tip."""
    wings, width = nose_wing_height(units, motion), 6.6 * identity.nose_width * (1 + 0.12 * units.au10)
    tip = NOSE_Y - 0.6 * (units.au10 + motion.nose_wrinkle)
    shadow = scale_colour(identity.skin, 0.7)
    canvas.tone(CENTRE_X, 56, 1.9, 8, 0.09)
    canvas.tone(CENTRE_X, tip - 0.5, 2.6, 2.2, 0.12)
    canvas.tone(CENTRE_X, tip + 4.6, 5.5, 1.5, -0.16)
    for side in SIDES:
        canvas.tone(CENTRE_X + side * 5.6, 54, 1.8, 7, -0.10)
        wing = [[width - 1.2, wings - 4], [width, wings - 1.4], [width - 0.4, wings + 0.8], [width - 2.2, wings + 1.6]]
        canvas.stroke(np.array(wing) * [side, 1] + [CENTRE_X, 0], np.array([0.3, 0.8, 0.9, 0.4]), shadow, protrusion=4)
        nostril = ellipse(CENTRE_X + side * 0.48 * width, tip + 2.9 - 0.5 * units.au10, 1.75, 0.95, 14)
        canvas.fill(nostril, scale_colour(identity.skin, 0.42), protrusion=6)


def paint_eye(canvas: Canvas, identity: Identity, units: Units, motion: UnlabelledMotion, side: int) -> None:
    """Paint one eye: white, iris clipped by the lids, lashes and the upper lid's fold."""
    shape = eye(identity, units, motion, side)
    skin_shadow = scale_colour(identity.skin, 0.66)
    canvas.tone(CENTRE_X + side * EYE_X, EYE_Y - 4.5, 8, 2.6, -0.10)
    canvas.fill(np.concatenate([shape.upper, shape.lower[::-1]]), EYE_WHITE)
    iris_x, iris_y = shape.iris
    for radius, colour in (
        (shape.iris_radius, scale_colour(identity.iris, 0.6)),
        (shape.iris_radius - 0.6, identity.iris),
        (shape.iris_radius * 0.48, (14, 12, 14)),
    ):
        canvas.fill(_between_lids(ellipse(iris_x, iris_y, radius, radius), shape.upper, shape.lower), colour)
    glint = ellipse(iris_x - 1.2, iris_y - 1.3, 0.85, 0.85, 10)
    canvas.fill(_between_lids(glint, shape.upper, shape.lower), (255, 255, 255))
    swell = np.sin(np.pi * np.linspace(0.08, 0.94, len(shape.upper)))
    canvas.stroke(shape.lower, 0.25 + 0.35 * swell, mix(skin_shadow, LASH, 0.25))
    canvas.stroke(shape.upper, 0.5 + 1.05 * swell, LASH)
    canvas.crease(shape.crease, 1.2, 0.5)


def _between_lids(points: Curve, upper: Curve, lower: Curve) -> Curve:
    order = np.argsort(upper[:, 0])
    columns = upper[order, 0]
    top = np.interp(points[:, 0], columns, upper[order, 1])
    bottom = np.interp(points[:, 0], columns, lower[order, 1])
    return np.stack([points[:, 0], np.minimum(np.maximum(points[:, 1], top), bottom)], 1)


def paint_brow(canvas: Canvas, identity: Identity, units: Units, side: int) -> None:
    """Paint one brow, thickest in its inner half."""
    line = brow(identity, units, side)
    t = np.linspace(0, 1, len(line))
    thickness = identity.brow_thickness * (1 - 0.75 * t**2.2) * np.minimum(1, 0.6 + 3 * t)
    canvas.stroke(line, thickness, identity.brow)


def paint_mouth(canvas: Canvas, identity: Identity, units: Units, motion: UnlabelledMotion) -> None:
    """Paint lips and, where they part, teeth and tongue."""
    lips = mouth(identity, units, motion)
    upper_lip = scale_colour(identity.lip, 0.88)
    if lips.opening > 0.4:
        canvas.fill(np.concatenate([lips.upper_inner, lips.lower_inner[::-1]]), MOUTH_INSIDE)
        _paint_teeth_and_tongue(canvas, lips.upper_inner, lips.lower_inner, lips.opening, units)
    canvas.fill(np.concatenate([lips.upper_outer, lips.upper_inner[::-1]]), upper_lip)
    canvas.fill(np.concatenate([lips.lower_inner, lips.lower_outer[::-1]]), identity.lip)
    if lips.opening <= 1.2:
        swell = np.sin(np.pi * np.linspace(0.1, 0.9, len(lips.upper_inner)))
        line = 0.5 * (lips.upper_inner + lips.lower_inner)
        canvas.stroke(line, 0.5 + 0.7 * swell + 0.9 * units.au24, mix(scale_colour(identity.lip, 0.4), LASH, 0.3))
    middle = len(lips.lower_outer) // 2
    centre = 0.5 * (lips.lower_inner[middle] + lips.lower_outer[middle])
    canvas.tone(CENTRE_X, float(centre[1]), 5, 1.2, 0.12 * (1 - units.au24))
    canvas.tone(CENTRE_X, float(lips.lower_outer[middle, 1]) + 2.2, 6, 1.5, -0.14)


def _paint_teeth_and_tongue(canvas: Canvas, upper: Curve, lower: Curve, opening: float, units: Units) -> None:
    depth = np.minimum(3.4, 0.75 * (lower[:, 1] - upper[:, 1]))
    inside = slice(3, -3)
    edge = np.stack([upper[:, 0], upper[:, 1] + depth], 1)
    canvas.fill(np.concatenate([upper[inside], edge[inside][::-1]]), TEETH)
    if opening > 6:
        tongue = ellipse(CENTRE_X, float(lower[len(lower) // 2, 1]) + 0.5, 6.0, 3.6)
        canvas.fill(_between_lids(tongue, edge, lower), TONGUE)


def paint_front_hair(canvas: Canvas, identity: Identity) -> None:
    """Paint the hair (or headscarf) that frames the forehead."""
    line, style = identity.hairline, identity.hair_style
    if style == "bald":
        return
    shapes: dict[str, list[list[float]]] = {
        "short": [[-35, 46], [-33.5, 34], [-27, line + 4], [0, line], [27, line + 4], [33.5, 34], [35, 46]],
        "side": [[-36, 44], [-33, 30], [-18, line - 3], [-8, line - 6], [16, line + 3], [31, 28], [36, 46]],
        "fringe": [[-35, 56], [-33, 36], [-26, 24], [0, 20], [26, 24], [33, 36], [35, 56]],
        "long": [[-35, 84], [-34, 50], [-29, 25], [-15, line], [0, line - 4], [15, line], [29, 25], [34, 50], [35, 84]],
        "curly": [[-36, 46], [-32, 32], [-22, line + 4], [0, line], [22, line + 4], [32, 32], [36, 46]],
        "bun": [[-36, 42], [-32, 26], [-20, line - 1], [0, line - 5], [20, line - 1], [32, 26], [36, 42]],
        "scarf": [[-30, 92], [-33.5, 60], [-31, 30], [0, line], [31, 30], [33.5, 60], [30, 92]],
    }
    inner = np.array(shapes[style], float)
    control = np.concatenate([inner, np.array([[44, 40], [42, 6], [24, -16], [-24, -16], [-42, 6], [-44, 40]], float)])
    colour = identity.clothes if style == "scarf" else identity.hair
    canvas.fill(closed_spline(control + [CENTRE_X, 0]), colour, protrusion=2, person=True)
    t = np.linspace(0, 1, 9)
    sheen = np.stack([CENTRE_X - 22 + 42 * t, line - 9 - 3 * np.sin(np.pi * t)], 1)
    canvas.stroke(sheen, 1.6 * np.sin(np.pi * t), scale_colour(colour, 1.25), protrusion=2)


def paint_glasses(canvas: Canvas, identity: Identity) -> None:
    """Paint a thin frame that leaves brows and lids visible."""
    frame: Colour = (52, 44, 46)
    for side in SIDES:
        angle = np.linspace(0, 2 * np.pi, 33)
        ring = np.stack([CENTRE_X + side * EYE_X + 12.2 * np.cos(angle), EYE_Y + 2 + 9.8 * np.sin(angle)], 1)
        canvas.stroke(ring, 0.9, frame, protrusion=5)
    bridge = np.array([[CENTRE_X - 5.4, 47.6], [CENTRE_X, 46.4], [CENTRE_X + 5.4, 47.6]])
    canvas.stroke(bridge, 1.0, frame, protrusion=5)

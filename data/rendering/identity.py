"""Who is drawn and how the camera sees them: identity, head pose, lighting, motion outside the action units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Colour = tuple[int, int, int]
"""Red, green, blue, each in [0, 255]."""

HairStyle = Literal["bald", "short", "side", "fringe", "long", "curly", "bun", "scarf"]

SKIN_TONES: tuple[Colour, ...] = (
    (248, 216, 194),
    (243, 204, 176),
    (240, 196, 162),
    (228, 178, 138),
    (210, 156, 114),
    (188, 132, 92),
    (160, 108, 74),
    (132, 87, 60),
    (108, 71, 51),
    (88, 58, 43),
)
HAIR_COLOURS: tuple[Colour, ...] = (
    (28, 24, 26),
    (48, 34, 28),
    (84, 56, 38),
    (124, 84, 50),
    (186, 142, 84),
    (150, 74, 40),
)
GREY_HAIR: Colour = (176, 174, 172)
IRIS_COLOURS: tuple[Colour, ...] = ((74, 48, 30), (52, 34, 24), (104, 76, 40), (72, 104, 72), (76, 114, 150))
CLOTHES: tuple[Colour, ...] = (
    (70, 90, 120),
    (150, 70, 70),
    (90, 110, 84),
    (60, 60, 66),
    (200, 196, 186),
    (120, 90, 130),
)
BACKGROUNDS: tuple[Colour, ...] = (
    (196, 206, 214),
    (214, 202, 188),
    (150, 168, 172),
    (180, 186, 164),
    (122, 130, 146),
    (206, 190, 200),
    (170, 150, 132),
)


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """Return the colour `share` of the way (0 to 1) from `first` to `second`."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def scale_colour(colour: Colour, factor: float) -> Colour:
    """Return `colour` made darker (factor < 1) or lighter (factor > 1), clipped to [0, 255]."""
    red, green, blue = (min(255, max(0, round(channel * factor))) for channel in colour)
    return red, green, blue


@dataclass(frozen=True)
class Identity:
    """What stays the same about a person. Lengths are in crop pixels, proportions are factors around 1."""

    skin: Colour
    hair: Colour
    hair_style: HairStyle
    hairline: float
    """Height of the hairline's middle, pixels from the crop's top."""
    brow: Colour
    brow_thickness: float
    brow_arch: float
    iris: Colour
    eye_size: float
    eye_tilt: float
    """How much higher the outer eye corner lies than the inner, pixels."""
    face_width: float
    jaw_width: float
    chin_length: float
    """Pixels added to the chin's height."""
    nose_width: float
    lip_fullness: float
    lip: Colour
    mouth_width: float
    age: float
    """0 (no lines) to 1 (lines at rest)."""
    glasses: bool
    beard: float
    """0 (shaven) to 1 (dense stubble)."""
    clothes: Colour

    @classmethod
    def draw(cls, rng: np.random.Generator, skin: Colour | None = None) -> Identity:
        """Draw a random person; `skin` fixes the skin tone, so that a caller can spread the tones evenly."""
        tone = skin if skin is not None else SKIN_TONES[rng.integers(len(SKIN_TONES))]
        darkness = 1 - sum(tone) / 765
        # Light hair is rare on dark skin, and grey hair belongs to age.
        hair = HAIR_COLOURS[rng.integers(2 if darkness > 0.45 else len(HAIR_COLOURS))]
        age = float(rng.uniform(0, 1) ** 1.6)
        brow = mix(scale_colour(hair, 0.7), (30, 22, 20), 0.45)
        if age > 0.65:
            hair = mix(hair, GREY_HAIR, 0.75)
        masculine = bool(rng.random() < 0.5)
        styles: tuple[HairStyle, ...] = (
            ("bald", "short", "short", "side", "curly")
            if masculine
            else ("fringe", "long", "long", "curly", "bun", "side", "scarf")
        )
        lip_tint = (178, 74, 74) if masculine else (190, 58, 72)
        return cls(
            skin=tone,
            hair=hair,
            hair_style=styles[rng.integers(len(styles))],
            hairline=float(rng.uniform(12, 18)),
            brow=brow,
            brow_thickness=float(rng.uniform(2.9, 3.5) if masculine else rng.uniform(2.4, 3.0)),
            brow_arch=float(rng.uniform(0.6, 1.6)),
            iris=IRIS_COLOURS[rng.integers(2 if darkness > 0.4 else len(IRIS_COLOURS))],
            eye_size=float(rng.uniform(0.95, 1.1)),
            eye_tilt=float(rng.uniform(-0.3, 1.3)),
            face_width=float(rng.uniform(0.95, 1.05)),
            jaw_width=float(rng.uniform(0.97, 1.1) if masculine else rng.uniform(0.9, 1.0)),
            chin_length=float(rng.uniform(-1.5, 1.5)),
            nose_width=float(rng.uniform(0.88, 1.18)),
            lip_fullness=float(rng.uniform(0.85, 1.2)),
            lip=mix(scale_colour(tone, 0.86), lip_tint, 0.42 if masculine else 0.6),
            mouth_width=float(rng.uniform(0.95, 1.06)),
            age=age,
            glasses=bool(rng.random() < 0.12),
            beard=float(rng.uniform(0.4, 0.9)) if masculine and rng.random() < 0.3 else 0.0,
            clothes=CLOTHES[rng.integers(len(CLOTHES))],
        )


@dataclass(frozen=True)
class Pose:
    """Head rotation in degrees: yaw > 0 turns to the image's right, pitch > 0 nods down, roll > 0 is clockwise."""

    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Pose:
        """Draw a moderate head pose."""
        return cls(float(rng.normal(0, 3.5)), float(rng.normal(0, 2)), float(rng.normal(0, 0.9)))


@dataclass(frozen=True)
class Lighting:
    """One soft key light and a plain background."""

    azimuth: float = -30.0
    """Degrees, negative from the image's left."""
    elevation: float = 35.0
    """Degrees above the horizon."""
    strength: float = 0.35
    """0 (flat) to 1 (hard)."""
    warmth: float = 0.0
    """-1 (blue) to 1 (orange)."""
    exposure: float = 1.0
    """Factor on every pixel."""
    background: Colour = BACKGROUNDS[0]

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Lighting:
        """Draw moderate indoor light."""
        return cls(
            azimuth=float(rng.uniform(-60, 60)),
            elevation=float(rng.uniform(15, 55)),
            strength=float(rng.uniform(0.15, 0.42)),
            warmth=float(rng.uniform(-0.6, 0.8)),
            exposure=float(rng.uniform(0.88, 1.04)),
            background=scale_colour(BACKGROUNDS[rng.integers(len(BACKGROUNDS))], float(rng.uniform(0.6, 1.1))),
        )


@dataclass(frozen=True)
class UnlabelledMotion:
    """Facial motion that the twelve action units leave out; every value in [0, 1] unless it says otherwise."""

    blink: float = 0.0
    """AU45: 1 closes the eyes."""
    eye_widening: float = 0.0
    """AU5, seen in surprise and fear."""
    nose_wrinkle: float = 0.0
    """AU9, seen in disgust."""
    lip_stretch: float = 0.0
    """AU20, seen in fear."""
    asymmetry: float = 0.0
    """-1 to 1: AU12 acts on the image's right side only (1), on its left only (-1), or on both alike (0)."""
    gaze: float = 0.0
    """-1 (to the image's left) to 1 (to its right)."""

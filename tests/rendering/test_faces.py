"""Faces: each action unit moves its part of the face and little else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from numpy.typing import NDArray

from affcache.errors import InputError
from data.rendering.identity import SKIN_TONES
from data.rendering.render import ACTION_UNITS, Identity, Lighting, Pose, UnlabelledMotion, render_face
from data.rendering.timeline import AU_THRESHOLD, EXPRESSIONS, PROTOTYPES, Episode, perform, place_episodes

BROWS, EYES, MIDFACE, MOUTH = slice(18, 45), slice(40, 60), slice(52, 80), slice(66, 112)
REGIONS = {
    "AU1": BROWS,
    "AU2": BROWS,
    "AU4": slice(30, 54),
    "AU6": slice(38, 80),
    "AU7": EYES,
    "AU10": slice(52, 96),
    "AU12": slice(60, 96),
    "AU15": MOUTH,
    "AU23": MOUTH,
    "AU24": MOUTH,
    "AU25": MOUTH,
    "AU26": MOUTH,
}
"""The rows of the crop in which most of a unit's change must lie."""


@pytest.fixture
def person() -> Identity:
    drawn = Identity.draw(np.random.default_rng(3), SKIN_TONES[3])
    return dataclasses.replace(drawn, age=0.1, glasses=False, beard=0.0, hair_style="short")


def units(**intensities: float) -> NDArray[np.float64]:
    return np.array([intensities.get(name, 0.0) for name in ACTION_UNITS])


def change(person: Identity, **intensities: float) -> NDArray[np.float64]:
    """Absolute change against the face at rest, (112, 112), mean over the colours."""
    moved, still = render_face(person, units(**intensities)), render_face(person, units())
    return np.asarray(np.abs(moved.astype(float) - still).mean(2))


def test_a_face_is_an_rgb_crop_and_the_same_every_time(person: Identity) -> None:
    face = render_face(person, units(AU12=0.7))
    assert face.shape == (112, 112, 3)
    assert face.dtype == np.uint8
    assert face.std() > 20
    np.testing.assert_array_equal(face, render_face(person, units(AU12=0.7)))


@pytest.mark.parametrize("name", ACTION_UNITS)
def test_an_action_unit_changes_its_region_and_mostly_nothing_else(person: Identity, name: str) -> None:
    moved = change(person, **{name: 1.0})
    assert moved[REGIONS[name]].sum() > 0.85 * moved.sum()
    assert (moved > 12).sum() >= 40, "too few pixels move for an encoder to see it"


@pytest.mark.parametrize("name", ACTION_UNITS)
def test_a_unit_is_visible_at_the_label_threshold(person: Identity, name: str) -> None:
    assert (change(person, **{name: AU_THRESHOLD})[REGIONS[name]] > 8).sum() >= 20


@pytest.mark.parametrize("name", ACTION_UNITS)
def test_change_grows_with_intensity(person: Identity, name: str) -> None:
    weak, strong = change(person, **{name: 0.3}).sum(), change(person, **{name: 0.9}).sum()
    assert strong > 1.3 * weak


def test_no_two_units_look_alike(person: Identity) -> None:
    changes = np.array([change(person, **{name: 1.0}).ravel() for name in ACTION_UNITS])
    likeness = np.corrcoef(changes) - np.eye(len(ACTION_UNITS))
    assert likeness.max() < 0.9


def test_the_jaw_drops_and_the_mouth_opens(person: Identity) -> None:
    rest, dropped = render_face(person, units()), render_face(person, units(AU25=1.0, AU26=1.0))
    inside = (slice(84, 92), slice(50, 62))
    assert dropped[inside].mean() < rest[inside].mean() - 30


def test_a_lopsided_smile_pulls_one_side(person: Identity) -> None:
    rest = render_face(person, units()).astype(float)
    smile = render_face(person, units(AU12=1.0), motion=UnlabelledMotion(asymmetry=1.0))
    moved = np.abs(smile - rest).mean(2)
    assert moved[:, 56:].sum() > 3 * moved[:, :56].sum()


def test_a_blink_closes_the_eyes(person: Identity) -> None:
    rest = render_face(person, units())
    shut = render_face(person, units(), motion=UnlabelledMotion(blink=1.0))
    white = slice(46, 51), slice(30, 80)
    assert (rest[white].min(2) > 200).sum() > 4 * max(1, (shut[white].min(2) > 200).sum())


@pytest.mark.parametrize("pose", [Pose(yaw=12), Pose(pitch=-6), Pose(roll=3)])
def test_pose_moves_the_head_but_keeps_the_eyes_in_place(person: Identity, pose: Pose) -> None:
    dark = [render_face(person, units(), p)[44:54, 30:48].astype(float).mean(2) < 90 for p in (Pose(), pose)]
    centres = [np.argwhere(pixels).mean(0) for pixels in dark]
    assert np.abs(centres[0] - centres[1]).max() < 2.5
    assert not np.array_equal(render_face(person, units(), Pose()), render_face(person, units(), pose))


def test_light_comes_from_where_it_is_said_to(person: Identity) -> None:
    left = render_face(person, units(), lighting=Lighting(azimuth=-60, strength=0.6)).astype(float)
    right = render_face(person, units(), lighting=Lighting(azimuth=60, strength=0.6)).astype(float)
    cheeks = (slice(56, 76), slice(24, 36)), (slice(56, 76), slice(78, 90))
    assert left[cheeks[0]].mean() > left[cheeks[1]].mean() + 10
    assert right[cheeks[1]].mean() > right[cheeks[0]].mean() + 10


def test_random_people_differ_and_every_one_can_be_drawn() -> None:
    rng = np.random.default_rng(0)
    faces = [render_face(Identity.draw(rng), units(), Pose.draw(rng), Lighting.draw(rng)) for _ in range(20)]
    assert len({face.tobytes() for face in faces}) == 20


@pytest.mark.parametrize(
    "bad", [np.zeros(11), np.zeros((1, 12)), np.full(12, 1.1), np.full(12, -0.1), np.full(12, np.nan)]
)
def test_bad_intensities_are_refused(person: Identity, bad: NDArray[np.float64]) -> None:
    with pytest.raises(InputError, match="action_units must"):
        render_face(person, bad)


@pytest.mark.parametrize("prototype", PROTOTYPES, ids=lambda p: f"{p.expression} {'+'.join(p.units)}")
def test_an_episode_rises_to_its_prototype_and_falls_back(prototype: object) -> None:
    assert isinstance(prototype, type(PROTOTYPES[0]))
    played = perform([Episode(prototype, 10, 12, 1.0)], 32, np.random.default_rng(0))
    number = EXPRESSIONS.index(prototype.expression)
    assert np.flatnonzero(played.expression == number).tolist() == list(range(10, 22))
    assert set(played.expression.tolist()) == {0, number}
    active = played.action_unit_labels[12:20].max(0).tolist()
    shown = {name for name, label in zip(ACTION_UNITS, active, strict=True) if label}
    assert shown == set(prototype.units)
    assert not played.action_unit_labels[[0, 5, 26, 31]].any()
    middle = played.valence_arousal[16]
    assert np.allclose(middle, [prototype.valence, prototype.arousal], atol=0.12)


def test_labels_are_the_intensities_at_the_threshold() -> None:
    rng = np.random.default_rng(1)
    episodes = place_episodes([(prototype, 7) for prototype in PROTOTYPES], 120, rng, first=6)
    played = perform(episodes, 120, rng)
    np.testing.assert_array_equal(played.action_unit_labels, played.action_units >= AU_THRESHOLD)
    assert not played.expression[:5].any()
    assert played.action_units.min() >= 0
    assert played.action_units.max() <= 1
    assert set(played.expression.tolist()) == set(range(8))

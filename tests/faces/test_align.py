"""Cutting out: the landmarks of any face come to lie on the template, and the arithmetic is Umeyama's."""

import math
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from affcache.faces.align import SIDE, TEMPLATE, aligned_crop, loose_crop, similarity
from affcache.faces.detector import load_detector
from affcache.faces.media import Media, read_frames
from tests.faces.clips import Pixels

Points = npt.NDArray[np.float64]
degrees = st.floats(-180, 180)
scales = st.floats(math.log(0.2), math.log(5)).map(math.exp)  # of the face in the picture to the template


def placed(angle: float, scale: float, centre: tuple[float, float] = (0, 0)) -> Points:
    """Return the template turned by degrees, scaled, and moved so that its middle lies at ``centre``."""
    turn = np.deg2rad(angle)
    matrix = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return (TEMPLATE - TEMPLATE.mean(axis=0)) @ matrix.T + centre


def dotted(points: Points, size: float, shape: tuple[int, int]) -> Pixels:
    """Return a picture (height, width, 3) with a soft dot of this size at each point."""
    y, x = np.indices(shape)
    light = np.zeros(shape)
    for point in points:
        light = np.maximum(light, np.exp(-((x - point[0]) ** 2 + (y - point[1]) ** 2) / (2 * size**2)))
    return np.repeat((light * 255).astype(np.uint8)[:, :, None], 3, axis=2)


def dots_in(crop: Pixels, near: Points, reach: int = 6) -> Points:
    """Return where the light around each of some points is centred."""
    found = []
    for x, y in near:
        first_x, first_y = max(round(x) - reach, 0), max(round(y) - reach, 0)
        window = crop[first_y : round(y) + reach + 1, first_x : round(x) + reach + 1, 0].astype(float)
        assert window.sum() > 255, "no dot"
        middle = ndimage.center_of_mass(window)
        found.append([first_x + middle[1], first_y + middle[0]])
    return np.array(found)


def umeyama(source: Points, target: Points) -> Points:
    """Return the transformation (2, 3) by Umeyama's own steps: covariance, its singular values, no reflection."""
    centre, to = source.mean(axis=0), target.mean(axis=0)
    covariance = (target - to).T @ (source - centre) / len(source)
    left, values, right = np.linalg.svd(covariance)
    keep = np.array([1, np.sign(np.linalg.det(left) * np.linalg.det(right))])
    rotation = left @ np.diag(keep) @ right
    scale = (values * keep).sum() / ((source - centre) ** 2).sum(axis=1).mean()
    return np.column_stack([scale * rotation, to - scale * rotation @ centre])


@settings(max_examples=60, deadline=None)
@given(angle=degrees, scale=scales, shift=st.tuples(st.floats(-0.5, 0.5), st.floats(-0.5, 0.5)))
def test_the_landmarks_of_a_turned_and_scaled_face_come_to_lie_on_the_template(
    angle: float, scale: float, shift: tuple[float, float]
) -> None:
    side = math.ceil(90 * scale + 24)
    landmarks = placed(angle, scale, (side / 2 + shift[0], side / 2 + shift[1]))
    picture = dotted(landmarks, max(1.5 * scale, 0.6), (side, side))
    crop = aligned_crop(picture, landmarks)
    assert crop.shape == (SIDE, SIDE, 3)
    assert np.abs(dots_in(crop, TEMPLATE) - TEMPLATE).max() < 1


@pytest.mark.parametrize("side", [56, 112, 224])
def test_crops_of_other_sizes_show_the_same_part_of_the_picture(side: int) -> None:
    landmarks = placed(20, 2, (150, 140))
    crop = aligned_crop(dotted(landmarks, 3, (300, 300)), landmarks, side)
    expected = (TEMPLATE + 0.5) * side / SIDE - 0.5
    assert np.abs(dots_in(crop, expected, reach=max(side // 18, 4)) - expected).max() < 0.3


def test_a_face_that_lies_on_the_template_is_cut_out_to_the_pixel() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    np.testing.assert_array_equal(aligned_crop(picture, TEMPLATE + [31, 57]), picture[57:169, 31:143])


@settings(max_examples=100, deadline=None)
@given(
    points=st.lists(st.tuples(st.floats(-500, 500), st.floats(-500, 500)), min_size=5, max_size=5),
    to=st.lists(st.tuples(st.floats(-500, 500), st.floats(-500, 500)), min_size=5, max_size=5),
)
def test_the_similarity_is_umeyamas(points: list[tuple[float, float]], to: list[tuple[float, float]]) -> None:
    source, target = np.array(points), np.array(to)
    found = similarity(source, target)
    np.testing.assert_array_equal(found[0, 0], found[1, 1])
    np.testing.assert_array_equal(found[0, 1], -found[1, 0])
    spread = ((source - source.mean(axis=0)) ** 2).sum()
    if spread < 1:
        return
    # other similarities are no better, and Umeyama's no worse
    least = ((source @ umeyama(source, target)[:, :2].T + umeyama(source, target)[:, 2] - target) ** 2).sum()
    own = ((source @ found[:, :2].T + found[:, 2] - target) ** 2).sum()
    assert own == pytest.approx(least, rel=1e-6, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(angle=degrees, scale=scales, noise=st.integers(0, 2**32 - 1))
def test_the_similarity_of_a_face_is_that_of_two_other_implementations(angle: float, scale: float, noise: int) -> None:
    landmarks = placed(angle, scale, (300, 200)) + np.random.default_rng(noise).normal(scale=scale, size=(5, 2))
    found = similarity(landmarks, TEMPLATE)
    np.testing.assert_allclose(found, umeyama(landmarks, TEMPLATE), rtol=1e-9, atol=1e-6)
    peer, _ = cv2.estimateAffinePartial2D(landmarks, TEMPLATE, ransacReprojThreshold=1e6, refineIters=100)
    np.testing.assert_allclose(found, peer, rtol=1e-3, atol=1e-2)


def test_landmarks_that_are_all_one_point_give_a_crop_too() -> None:
    matrix = similarity(np.full((5, 2), 7.0), TEMPLATE)
    assert np.isfinite(matrix).all()
    assert aligned_crop(np.full((20, 20, 3), 9, np.uint8), np.full((5, 2), 7.0)).shape == (SIDE, SIDE, 3)


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
def test_what_lies_beyond_the_picture_is_black(scale: float) -> None:
    white = np.full((round(200 * scale), round(200 * scale), 3), 255, np.uint8)
    corner = aligned_crop(white, placed(0, scale, (-0.5, -0.5)))  # the face's middle at the upper left corner
    middle = TEMPLATE.mean(axis=0).round().astype(int)
    assert not corner[: middle[1] - 2].any()
    assert not corner[:, : middle[0] - 2].any()
    assert (corner[middle[1] + 2 :, middle[0] + 2 :] == 255).all()
    end = len(white) - 0.5
    corner = aligned_crop(white, placed(0, scale, (end, end)))
    assert not corner[middle[1] + 3 :].any()
    assert (corner[: middle[1] - 3, : middle[0] - 3] == 255).all()


@pytest.mark.parametrize("scale", [0.3, 3.0, 9.0])
def test_a_face_that_lies_wholly_beyond_the_picture_is_black(scale: float) -> None:
    white = np.full((50, 60, 3), 255, np.uint8)
    for centre in ((-9e3, 20), (20, 9e3), (9e3, 9e3), (20, -9e3)):
        assert not aligned_crop(white, placed(10, scale, centre)).any()
    assert not loose_crop(white, np.array([9e4, 9e4, 40, 50]), 0.1).any()


@settings(max_examples=40, deadline=None)
@given(angle=degrees, scale=st.floats(0.5, 9), side=st.sampled_from([40, 112, 224]))
@example(angle=0, scale=9, side=40)
def test_a_crop_lies_where_it_is_said_to_a_part_of_a_pixel(angle: float, scale: float, side: int) -> None:
    # of a picture that gets lighter to the right, a pixel of the crop says where it comes from
    slope = 80 / (42 * scale)  # as steep as the inner half of the face has room for
    greys = ((np.arange(1000) - 500) * slope + 128).clip(0, 254)
    greys = greys + np.random.default_rng(0).random((1000, 1000))  # rounded down: right on average
    picture = np.repeat(greys.astype(np.uint8)[:, :, None], 3, axis=2)
    landmarks = placed(angle, scale, (500, 500))
    crop = aligned_crop(picture, landmarks, side)[:, :, 0].astype(float)
    matrix = cv2.invertAffineTransform(similarity(landmarks, (TEMPLATE + 0.5) * side / SIDE - 0.5))
    y, x = np.indices((side, side))
    expected = (matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2] - 500) * slope + 128
    inner = slice(side // 4, -side // 4)
    away = (crop - expected)[inner, inner] / slope  # pixels of the picture
    assert abs(away.mean()) < 0.6 / slope + 0.02, "greys are rounded to whole numbers twice, halves up"


def test_a_large_face_is_averaged_not_sampled() -> None:
    stripes = np.zeros((1200, 1200, 3), np.uint8)
    stripes[:, ::2] = 200  # finer than a crop can show
    crop = aligned_crop(stripes, placed(0, 8, (600, 600)))
    assert np.abs(crop[10:-10, 10:-10].astype(int) - 100).max() < 20
    crop = loose_crop(stripes, np.array([100, 100, 900, 900]), 0)
    assert np.abs(crop[5:-5, 5:-5].astype(int) - 100).max() < 20


# Loose crops


def test_a_loose_crop_is_the_square_around_the_box_and_its_margin() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    # the longer side is 80, with a quarter of it all around 120
    crop = loose_crop(picture, np.array([100, 90, 60, 80]), 0.25, side=120)
    np.testing.assert_array_equal(crop, picture[70:190, 70:190])


@settings(max_examples=30, deadline=None)
@given(
    margin=st.floats(0, 1),
    size=st.tuples(st.floats(40, 200), st.floats(40, 200)),
    side=st.sampled_from([56, 112, 300]),
)
def test_the_middle_of_the_box_is_the_middle_of_the_loose_crop(
    margin: float, size: tuple[float, float], side: int
) -> None:
    box = np.array([310 - size[0] / 2, 290 - size[1] / 2, *size])
    whole = max(size) * (1 + 2 * margin)
    marks = np.array([[310, 290], [310 - whole / 4, 290], [310, 290 + whole / 4]]) - 0.5
    crop = loose_crop(dotted(marks, whole / 40, (600, 600)), box, margin, side)
    expected = np.array([[0.5, 0.5], [0.25, 0.5], [0.5, 0.75]]) * side - 0.5
    assert np.abs(dots_in(crop, expected, reach=side // 9) - expected).max() < 0.6


def test_a_box_without_a_size_gives_a_crop_too() -> None:
    assert loose_crop(np.zeros((50, 50, 3), np.uint8), np.array([10, 10, 0, 0]), 0.1).shape == (SIDE, SIDE, 3)


# A real face


def turned(pixels: Pixels, angle: float) -> Pixels:
    """Return a picture turned by degrees around its middle."""
    height, width = pixels.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), angle, 1)
    return np.asarray(cv2.warpAffine(pixels, matrix, (width, height), flags=cv2.INTER_AREA), np.uint8)


@pytest.mark.real
@pytest.mark.parametrize("angle", [-30, 0, 30])
@pytest.mark.parametrize("clip", ["single_face.mp4", "face_noface.mov"])
def test_a_real_face_that_is_turned_lies_on_the_template(angle: float, clip: str, weights: Path, media: Path) -> None:
    detector = load_detector(str(weights))(0.6, 1024)
    pixels = turned(next(read_frames(Media(media / clip, "clip"))).pixels, angle)
    (face,) = detector.detect(pixels)
    eyes = face.landmarks[1] - face.landmarks[0]
    assert abs(math.degrees(math.atan2(eyes[1], eyes[0])) + angle) < 12, "it has to be turned"
    matrix = similarity(face.landmarks, TEMPLATE)
    # faces differ from the template, and the detector's idea of a face from how it is turned
    assert np.abs(face.landmarks @ matrix[:, :2].T + matrix[:, 2] - TEMPLATE).mean() < 1.6
    crop = aligned_crop(pixels, face.landmarks, 2 * SIDE)
    (again,) = detector.detect(np.pad(crop, ((60, 60), (60, 60), (0, 0))))
    landmarks = (again.landmarks - 60) / 2
    assert np.abs(landmarks - TEMPLATE).mean() < 3
    assert abs(math.degrees(math.atan2(*(landmarks[1] - landmarks[0])[::-1]))) < 6, "degrees, of the eyes"

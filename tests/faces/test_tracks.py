"""Which face of a frame is which of the frames before, and which tracks are one person."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affcache.faces.tracks import CUT, GAP, LEAST_OVERLAP, THUMBNAIL, Tracker, overlaps, thumbnail_of
from tests.faces.clips import picture

DARK = np.zeros((18, 32, 3), np.float32)
Box = tuple[float, float, float, float]
boxes = st.tuples(st.floats(-50, 50), st.floats(-50, 50), st.floats(0, 60), st.floats(0, 60))


def box(x: float, y: float = 0, size: float = 100) -> npt.NDArray[np.float64]:
    return np.array([x, y, size, size], np.float64)


def unit(angle: float) -> npt.NDArray[np.float32]:
    """Return an embedding in a direction, in degrees; of any length."""
    return np.array([3 * np.cos(np.deg2rad(angle)), 3 * np.sin(np.deg2rad(angle))], np.float32)


def follow(frames: Sequence[Sequence[npt.NDArray[np.float64]]], step: float = 0.04) -> list[list[int]]:
    """Return the tracks of the faces of frames that follow one another."""
    tracker = Tracker()
    return [tracker.update(index * step, DARK, faces) for index, faces in enumerate(frames)]


# Overlap


def naive(one: Box, other: Box) -> float:
    """Intersection over union of two boxes."""
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    shared = max(width, 0) * max(height, 0)
    whole = one[2] * one[3] + other[2] * other[3] - shared
    return shared / whole if whole > 0 else 0.0


@settings(max_examples=200, deadline=None)
@given(ones=st.lists(boxes, max_size=4), others=st.lists(boxes, max_size=4))
def test_overlaps_are_those_of_each_two_boxes(ones: list[Box], others: list[Box]) -> None:
    found = overlaps([np.array(b) for b in ones], [np.array(b) for b in others])
    assert found.shape == (len(ones), len(others))
    for i, one in enumerate(ones):
        for j, other in enumerate(others):
            assert found[i, j] == pytest.approx(naive(one, other), abs=1e-9)


def test_a_box_overlaps_itself_wholly_and_its_neighbour_not() -> None:
    np.testing.assert_allclose(overlaps([box(0)], [box(0), box(50), box(100), box(0, 25, 50)]), [[1, 1 / 3, 0, 0.25]])


# Tracks


def test_a_face_that_moves_keeps_its_track() -> None:
    assert follow([[box(15 * index, 3 * index)] for index in range(40)]) == [[0]] * 40


def test_a_face_that_jumps_has_a_new_track() -> None:
    far = (
        100 * (1 - LEAST_OVERLAP) / (1 + LEAST_OVERLAP)
    )  # beside itself so far, a box overlaps by the least that counts
    assert follow([[box(0)], [box(far - 1)]]) == [[0], [0]]
    assert follow([[box(0)], [box(far + 1)]]) == [[0], [1]]


def test_faces_that_change_their_order_keep_their_tracks() -> None:
    assert follow([[box(0), box(300)], [box(305), box(5)], [box(10)], [box(310), box(15)]]) == [
        [0, 1],
        [1, 0],
        [0],
        [1, 0],
    ]


def test_persons_who_cross_keep_their_tracks() -> None:
    # one in front of the other, on ways that differ in height
    frames = [[box(10 * index, 0), box(400 - 10 * index, 60)] for index in range(41)]
    assert follow(frames) == [[0, 1]] * 41


def test_faces_are_matched_so_that_all_overlap_most() -> None:
    # whoever takes its best first, leaves the other none
    assert follow([[box(0), box(60)], [box(40), box(-45)]]) == [[0, 1], [1, 0]]


def test_a_face_that_comes_back_in_time_keeps_its_track() -> None:
    for pause, number in ((GAP - 0.1, 0), (GAP, 0), (GAP + 0.1, 1)):
        tracker = Tracker()
        tracker.update(10.0, DARK, [box(0)])
        for moment in np.arange(10.5, 10 + pause, 0.5):
            assert tracker.update(float(moment), DARK, []) == []
        assert tracker.update(10.0 + pause, DARK, [box(0)]) == [number], pause


def test_frames_that_lie_far_apart_follow_one_another_all_the_same() -> None:
    assert follow([[box(0)]] * 5, step=10 * GAP) == [[0]] * 5
    tracker = Tracker()
    tracker.update(0, DARK, [box(0)])
    tracker.update(10 * GAP, DARK, [])
    assert tracker.update(20 * GAP, DARK, [box(0)]) == [1], "but for a frame without it"


def test_a_cut_ends_tracks_and_a_lamp_does_not() -> None:
    for change, number in ((CUT - 1, 0), (CUT + 1, 1)):
        tracker = Tracker()
        tracker.update(0, DARK, [box(0)])
        assert tracker.update(0.04, DARK + change, [box(0)]) == [number]
        assert tracker.update(0.08, DARK + change, [box(0)]) == [number], "the new picture is what is compared then"


def test_a_thumbnail_has_few_pixels_and_the_pictures_greys() -> None:
    thumbnail = thumbnail_of(picture((0, 0), side=64, size=(720, 1280)))
    assert thumbnail.shape == (THUMBNAIL[1], THUMBNAIL[0], 3)
    assert thumbnail[0, 0, 0] == pytest.approx(235)
    assert thumbnail[-1, -1, 0] == pytest.approx(40)
    assert np.abs(thumbnail_of(picture()) - thumbnail_of(255 - picture())).mean() > CUT


@settings(max_examples=100, deadline=None)
@given(
    frames=st.lists(st.tuples(st.floats(0, 2), st.booleans(), st.lists(boxes, max_size=4)), max_size=8),
    same_person=st.floats(0, 1.5),
    angles=st.lists(st.floats(0, 360), min_size=40, max_size=40),
)
def test_each_face_of_a_frame_has_a_track_and_a_person_of_its_own(
    frames: list[tuple[float, bool, list[Box]]], same_person: float, angles: list[float]
) -> None:
    tracker, seen, time = Tracker(), [], 0.0
    for pause, dark, faces in frames:
        time += pause + 1e-3
        numbers = tracker.update(time, DARK if dark else DARK + 200, [np.array(face) for face in faces])
        assert len(set(numbers)) == len(faces)
        for number in numbers:
            tracker.tracks[number].embed(unit(angles[number]))
        seen.append(numbers)
    in_order = list(dict.fromkeys(number for numbers in seen for number in numbers))
    assert in_order == list(range(len(tracker.tracks))), "tracks are numbered as they come"
    persons = tracker.persons(same_person)
    assert list(dict.fromkeys(persons)) == list(range(1, len(set(persons)) + 1)), "persons too, from 1"
    for numbers in seen:
        assert len({persons[number] for number in numbers}) == len(numbers)
    for number, track in enumerate(tracker.tracks):
        assert track.frames == sum(number in numbers for numbers in seen)


# Persons


def tracks_at(*moments: tuple[float, float, float | None]) -> Tracker:
    """Return tracks, each seen from when to when, with an embedding in a direction."""
    tracker = Tracker()
    for index, (first, last, angle) in enumerate(moments):
        tracker.update(first, DARK, [box(1000.0 * index)])
        tracker.tracks[index].times = [(first, last)]
        if angle is not None:
            tracker.tracks[index].embed(unit(angle))
    return tracker


def test_without_embeddings_each_track_is_a_person() -> None:
    assert tracks_at((0, 1, None), (5, 6, None), (9, 9, None)).persons(0.0) == [1, 2, 3]


def test_tracks_of_like_embeddings_are_one_person() -> None:
    tracker = tracks_at((0, 1, 0), (5, 6, 80), (10, 11, 10), (20, 21, 75))
    assert tracker.persons(0.93) == [1, 2, 1, 2]
    assert tracker.persons(0.999) == [1, 2, 3, 4]
    assert tracker.persons(1.5) == [1, 2, 3, 4], "above 1 never"


def test_the_most_alike_person_is_taken() -> None:
    assert tracks_at((0, 1, 0), (5, 6, 30), (10, 11, 20)).persons(0.9) == [1, 2, 2]


@pytest.mark.parametrize("second", [(0.5, 2.0), (1.0, 2.0), (0.2, 0.3), (-1.0, 5.0)])
def test_tracks_that_were_seen_at_the_same_time_are_two_persons(second: tuple[float, float]) -> None:
    assert tracks_at((0, 1, 0), (*second, 0)).persons(0.5) == [1, 2]
    assert tracks_at((0, 1, 0), (1.01, 2, 0)).persons(0.5) == [1, 1]


def test_faces_of_a_photo_which_has_no_time_are_persons_of_their_own() -> None:
    tracker = Tracker()
    for number in tracker.update(float("nan"), DARK, [box(0), box(300), box(600)]):
        tracker.tracks[number].embed(unit(0))
    assert tracker.persons(0.5) == [1, 2, 3]


def test_a_person_is_compared_by_all_its_tracks() -> None:
    # the mean of 0 and 20 degrees is 10: 35 is nearer to it than a cosine of 0.9, from 0 it isn't
    assert tracks_at((0, 1, 0), (2, 3, 20), (4, 5, 35)).persons(0.9) == [1, 1, 1]
    assert tracks_at((0, 1, 0), (4, 5, 35)).persons(0.9) == [1, 2]
    # a third track beside the second, not the first, is somebody else
    assert tracks_at((0, 1, 0), (5, 9, 0), (6, 7, 0)).persons(0.9) == [1, 1, 2]


def test_embeddings_count_by_their_direction() -> None:
    tracker = tracks_at((0, 1, 0))
    tracker.tracks[0].embed(unit(90) * 1000)
    (mean,) = [track.embedding_sum for track in tracker.tracks]
    np.testing.assert_allclose(mean, [1, 1], atol=1e-6)


def test_an_embedding_of_zeros_joins_nobody() -> None:
    tracker = tracks_at((0, 1, None), (5, 6, None))
    for track in tracker.tracks:
        track.embed(np.zeros(2, np.float32))
    assert tracker.persons(0.0) == [1, 2]

"""The frames of an epoch: which are drawn, in what order, in what batches."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from affcache.store.reading import EmbeddingStore
from affcache.tasks.annotations import join_labels
from affcache.tasks.tasks import TASKS
from affcache.training.data import Frames, Scaler, batches, epoch_length, epoch_order
from tests.conftest import MakeData

CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


VIDEOS = st.lists(st.integers(1, 30), min_size=1, max_size=8).map(
    lambda lengths: torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
)


@given(VIDEOS, st.integers(1, 12), st.none() | st.integers(2, 50))
def test_an_epoch_takes_one_frame_of_every_stride_and_as_many_as_asked_for(
    videos: torch.Tensor, stride: int, frames: int | None
) -> None:
    order = epoch_order(videos, stride=stride, frames_per_epoch=frames, generator=generator())
    assert len(order) == epoch_length(videos, stride=stride, frames_per_epoch=frames)
    assert len(order.unique()) == len(order)
    assert ((order >= 0) & (order < len(videos))).all()
    groups: dict[tuple[int, int], int] = {}
    for row in order.tolist():
        first = int((videos == videos[row]).nonzero()[0])
        group = (int(videos[row]), (row - first) // stride)
        groups[group] = groups.get(group, 0) + 1
    assert set(groups.values()) == {1}
    if frames is None:
        assert len(groups) == sum(-(-int((videos == video).sum()) // stride) for video in videos.unique())


@pytest.mark.parametrize(("stride", "frames"), [(1, None), (4, None), (1, 10), (4, 5)])
def test_every_frame_comes_up_equally_often_in_the_end(stride: int, frames: int | None) -> None:
    videos = torch.repeat_interleave(torch.arange(2), torch.tensor([20, 12]))  # multiples of the stride
    drawn, times = generator(), torch.zeros(32)
    for _ in range(2000):
        times[epoch_order(videos, stride=stride, frames_per_epoch=frames, generator=drawn)] += 1
    share = epoch_length(videos, stride=stride, frames_per_epoch=frames) / 32
    spread = (2000 * share * (1 - share)) ** 0.5
    assert ((times - 2000 * share).abs() <= 5 * spread).all()


def test_the_order_is_a_shuffle_and_anew_each_time() -> None:
    videos, drawn = torch.zeros(500, dtype=torch.int64), generator()
    first, second = (epoch_order(videos, stride=1, frames_per_epoch=None, generator=drawn) for _ in range(2))
    assert not first.equal(second)
    assert (first[1:] - first[:-1] == 1).sum() < 10, "about one neighbour stays behind its neighbour in a shuffle"


@given(st.integers(1, 300), st.integers(2, 64))
def test_batches_are_the_order_without_a_last_one_of_one(frames: int, size: int) -> None:
    order = torch.stack([torch.randperm(frames), torch.randperm(frames)])
    cut = batches(order, size)
    assert torch.cat(cut, dim=1).equal(order)
    lengths = [batch.shape[1] for batch in cut]
    assert all(length == size for length in lengths[:-1])
    if frames > 1:
        assert 2 <= lengths[-1] <= size + 1
    assert (lengths[-1] == size + 1) == (frames > size and frames % size == 1)


def test_l2_scales_to_length_1_and_none_leaves_as_stored() -> None:
    embeddings = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-600.0, 800.0]], dtype=torch.float16)
    torch.testing.assert_close(Scaler("l2")(embeddings), torch.tensor([[0.6, 0.8], [0.0, 0.0], [-0.6, 0.8]]))
    assert Scaler()(embeddings).equal(embeddings.float())


def test_frames_are_the_joined_rows(learnable: MakeData) -> None:
    store_path, annotations = learnable(videos=3, frames=5)
    store = EmbeddingStore.open(store_path)
    joined = join_labels(store, annotations, TASKS["expr"], "validation")
    frames = Frames.load(store, joined, CPU)
    assert len(frames) == 5
    assert frames.embeddings.dtype == torch.float16
    assert frames.embeddings.numpy().tobytes() == store.features[10:15].tobytes()
    assert frames.labels.tolist() == joined.labels.tolist()

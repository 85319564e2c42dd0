"""Streamed frames: every frame once, shuffled nearly as well as all at once."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from affcache.errors import ConfigError
from affcache.store.reading import EmbeddingStore
from affcache.tasks.annotations import JoinAccount, JoinedLabels
from affcache.training import data as streaming
from affcache.training.data import BLOCK_FRAMES, StreamedFrames, batches, chunk_bounds
from tests.conftest import write_store

CPU = torch.device("cpu")
ROWS, WIDTH = 3000, 8
Positions = npt.NDArray[np.int64]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    """Thirty videos of 100 frames; an embedding's first two values say which row it is."""
    rows = np.arange(ROWS)
    features = np.random.default_rng(0).normal(size=(ROWS, WIDTH))
    features[:, 0], features[:, 1] = rows // 100, rows % 100
    videos = {f"video{index:02d}": range(1, 101) for index in range(30)}
    return write_store(tmp_path_factory.mktemp("store") / "store.h5", videos, features.astype(np.float16))


def joined_rows(frames: int, seed: int = 0) -> JoinedLabels:
    """Some of the store's rows, rising; a frame's label is its position."""
    rows = np.sort(np.random.default_rng(seed).permutation(ROWS)[:frames])
    return JoinedLabels(rows, np.arange(frames), JoinAccount(used=frames))


def orders(heads: int, frames: int, drawn: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(frames, generator=generator)[:drawn] for _ in range(heads)])


def sequence(frames: StreamedFrames, order: torch.Tensor, batch_size: int) -> torch.Tensor:
    """The positions (H, m) in the order in which an epoch takes them; labels must be positions."""
    return torch.cat([chunk.labels[part] for chunk, part in frames.chunks(order, batch_size)], dim=1)


# Every frame once


@settings(deadline=None)
@given(st.data())
def test_an_epoch_takes_each_drawn_frame_once_with_what_belongs_to_it(
    store: EmbeddingStore, data: st.DataObject
) -> None:
    frames = data.draw(st.integers(2, 600), "frames")
    drawn = data.draw(st.sampled_from([frames, max(frames // 3, 2)]) | st.integers(2, frames), "drawn")
    heads, batch_size = data.draw(st.integers(1, 3), "heads"), data.draw(st.integers(2, 64), "batch size")
    chunk_frames = data.draw(st.integers(3, 700), "chunk")
    sharing = 1 if drawn == frames else heads
    assume(drawn <= chunk_frames // sharing or batch_size < chunk_frames // sharing)
    joined = joined_rows(frames, seed=data.draw(st.integers(0, 9), "rows"))
    order = orders(heads, frames, drawn, seed=data.draw(st.integers(0, 9), "order"))
    streamed = StreamedFrames(store, joined, CPU, chunk_frames)
    taken, lengths = [], []
    for chunk, part in streamed.chunks(order, batch_size):
        assert len(chunk.embeddings) == len(chunk.labels) == len(chunk.videos) <= chunk_frames
        rows = joined.rows[chunk.labels.numpy()]
        assert chunk.embeddings.numpy().tobytes() == store.features[rows].tobytes()
        assert chunk.videos.tolist() == (rows // 100).tolist()
        assert part.dtype == torch.int64
        taken.append(chunk.labels[part])
        lengths.append(part.shape[1])
        for head in range(heads):
            of_chunk = set(taken[-1][head].tolist())
            assert taken[-1][head].tolist() == [p for p in order[head].tolist() if p in of_chunk], "in the given order"
    assert torch.cat(taken, dim=1).sort(dim=1).values.equal(order.sort(dim=1).values)
    assert all(length % batch_size == 0 for length in lengths[:-1])
    assert len(lengths) == 1 or lengths[-1] > 1
    assert sum(len(batches(part, batch_size)) for part in taken) == len(batches(order, batch_size)), "as many steps"


@pytest.mark.parametrize(("heads", "drawn"), [(1, 700), (3, 700), (1, 90), (3, 90)])
def test_frames_that_fit_in_one_chunk_come_in_the_given_order(store: EmbeddingStore, heads: int, drawn: int) -> None:
    order = orders(heads, 700, drawn, seed=1)
    streamed = StreamedFrames(store, joined_rows(700), CPU, chunk_frames=700)
    assert sequence(streamed, order, 32).equal(order)


def test_the_order_decides_everything(store: EmbeddingStore) -> None:
    streamed = StreamedFrames(store, joined_rows(2000), CPU, chunk_frames=500)
    first, second, other = (sequence(streamed, orders(2, 2000, 2000, seed), 32) for seed in (1, 1, 2))
    assert first.equal(second)
    assert not first.equal(other)
    chunks = [{frozenset(part.tolist()) for part in one[0].split(480)} for one in (first, other)]
    assert not chunks[0] & chunks[1], "other blocks together in another epoch"


def test_heads_take_the_same_chunks_each_in_an_order_of_its_own(store: EmbeddingStore) -> None:
    streamed = StreamedFrames(store, joined_rows(2000), CPU, chunk_frames=500)
    order = orders(2, 2000, 2000, seed=3)
    together, alone = sequence(streamed, order, 32), sequence(streamed, order[:1], 32)
    assert together[0].equal(alone[0])
    assert not together[0].equal(together[1])
    for one, other in zip(*(head.split(416) for head in together), strict=True):  # ceil(63 / 5) batches
        assert set(one.tolist()) == set(other.tolist())


@pytest.mark.parametrize(("frames", "size"), [(10, 10), (21, 10), (20, 10), (11, 10), (1, 10), (12, 10)])
def test_no_chunk_is_a_single_frame(frames: int, size: int) -> None:
    bounds = chunk_bounds(frames, size)
    assert [position for first, last in bounds for position in range(first, last)] == list(range(frames))
    assert all(last - first in (size, size + 1) for first, last in bounds[:-1])
    assert frames == 1 or all(last - first > 1 for first, last in bounds)


def test_evaluation_reads_all_in_order(store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "EVALUATION_BATCH", 170)
    joined = joined_rows(700)
    found = [batch.clone() for batch in StreamedFrames(store, joined, CPU, 100).evaluation_batches()]
    assert [len(batch) for batch in found] == [170, 170, 170, 170, 20]
    assert torch.cat(found).numpy().tobytes() == store.features[joined.rows].tobytes()


@pytest.mark.parametrize(("heads", "drawn", "chunk"), [(1, 700, 32), (3, 699, 98)])
def test_a_chunk_that_holds_no_batch_is_refused(store: EmbeddingStore, heads: int, drawn: int, chunk: int) -> None:
    streamed = StreamedFrames(store, joined_rows(700), CPU, chunk)
    order = orders(heads, 700, drawn, seed=0)
    expected = rf"--batch-size is 32, but --memory lets a chunk hold 32 frames of each of {heads} heads\. .*Raise"
    with pytest.raises(ConfigError, match=expected):
        sequence(streamed, order, 32)
    assert sequence(streamed, order, 31).shape == order.shape


# How well it shuffles: frames sorted by class and video, the worst there is

FRAMES, VIDEOS, CHUNK, BATCH = 1 << 16, 32, (1 << 14) + 1, 8
VIDEO_OF = np.arange(FRAMES) // (FRAMES // VIDEOS)  # 2,048 frames each
CLASS_OF = VIDEO_OF // 4  # eight classes
# Two frames of a batch share a block with this probability at most; else they are as in a full shuffle.
PAIRS = BATCH * (BATCH - 1) / 2
SAME_BLOCK = (BLOCK_FRAMES - 1) / (CHUNK - 2)
SAME_VIDEO = (FRAMES / VIDEOS - 1) / (FRAMES - 1)  # in a full shuffle
SAME_CLASS = (FRAMES / 8 - 1) / (FRAMES - 1)


def full_shuffle(seed: int) -> Positions:
    return np.random.default_rng(seed).permutation(FRAMES)


def neighbours_together(seed: int) -> Positions:
    """What streaming without blocks would do: chunks of neighbouring frames, each shuffled well."""
    random = np.random.default_rng(seed)
    return np.concatenate([random.permutation(part) for part in np.split(np.arange(FRAMES), 4)])


@pytest.fixture(scope="module")
def sorted_frames(tmp_path_factory: pytest.TempPathFactory) -> StreamedFrames:
    path = tmp_path_factory.mktemp("sorted") / "store.h5"
    plain = write_store(path, {"video": range(1, FRAMES + 1)}, np.zeros((FRAMES, 1), dtype=np.float16))
    return StreamedFrames(plain, JoinedLabels(np.arange(FRAMES), np.arange(FRAMES), JoinAccount()), CPU, CHUNK)


def block_shuffle(frames: StreamedFrames) -> Positions:
    return sequence(frames, torch.from_numpy(full_shuffle(5))[None], BATCH)[0].numpy()


def excess_of_same(taken: Positions, group_of: Positions, expected: float) -> float:
    """How much more often two frames of a batch are of one group than expected, in what blocks allow for.

    Blocks allow for ``SAME_BLOCK``, and chance for five standard errors of the pairs' share.
    """
    groups = group_of[taken].reshape(-1, BATCH)
    same = (groups[:, :, None] == groups[:, None, :]).sum() - groups.size
    pairs = len(groups) * PAIRS
    error = math.sqrt(expected * (1 - expected) / pairs)
    return (same / (2 * pairs) - expected) / (SAME_BLOCK + 5 * error)


def excess_of_neighbours(taken: Positions, group_of: Positions, expected: float) -> float:
    """The same of frames that follow one another."""
    same = float((group_of[taken[1:]] == group_of[taken[:-1]]).mean())
    return (same - expected) / (SAME_BLOCK + 5 * math.sqrt(expected * (1 - expected) / FRAMES))


def excess_of_distance(taken: Positions, group_of: Positions) -> float:
    """The largest distance of the distributions of groups per batch from a full shuffle's, in what is allowed.

    Blocks allow for ``PAIRS * SAME_BLOCK`` in total variation (see the module), so for no more in the distribution
    functions; chance for what each sample exceeds with probability 1e-9 (Dvoretzky, Kiefer, Wolfowitz; Massart).
    """

    def shares(positions: Positions) -> npt.NDArray[np.float64]:
        ordered = np.sort(group_of[positions].reshape(-1, BATCH), axis=1)
        counts = 1 + (np.diff(ordered, axis=1) != 0).sum(1)
        return np.cumsum(np.bincount(counts, minlength=BATCH + 1)) / len(counts)

    chance = math.sqrt(math.log(2e9) / (2 * FRAMES / BATCH))
    return float(np.abs(shares(taken) - shares(full_shuffle(17))).max()) / (PAIRS * SAME_BLOCK + 2 * chance)


def excesses(taken: Positions) -> dict[str, float]:
    """Each measure as a share of its bound: at most 1 is as good as promised."""
    return {
        "videos in a batch": excess_of_distance(taken, VIDEO_OF),
        "classes in a batch": excess_of_distance(taken, CLASS_OF),
        "pairs of a video": excess_of_same(taken, VIDEO_OF, SAME_VIDEO),
        "pairs of a class": excess_of_same(taken, CLASS_OF, SAME_CLASS),
        "neighbours of a video": excess_of_neighbours(taken, VIDEO_OF, SAME_VIDEO),
        "neighbours of a class": excess_of_neighbours(taken, CLASS_OF, SAME_CLASS),
    }


def test_a_block_shuffle_is_nearly_a_full_one(sorted_frames: StreamedFrames) -> None:
    assert {name: value for name, value in excesses(block_shuffle(sorted_frames)).items() if value > 1} == {}
    assert {name: value for name, value in excesses(full_shuffle(29)).items() if value > 1} == {}


def test_chunks_of_neighbours_would_not_pass() -> None:
    found = excesses(neighbours_together(0))
    assert all(value > 2 for value in found.values()), found


def test_blocks_eight_times_as_large_would_not_pass(
    sorted_frames: StreamedFrames, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "BLOCK_FRAMES", 8 * BLOCK_FRAMES)
    found = excesses(block_shuffle(sorted_frames))
    assert sum(value > 1 for value in found.values()) >= 4, found


def test_every_chunk_has_about_its_share_of_every_class(sorted_frames: StreamedFrames) -> None:
    def furthest(chunk: Positions) -> float:
        """The largest distance of a class's share from 1/8, in standard deviations for blocks drawn at random."""
        blocks = FRAMES // BLOCK_FRAMES // 4  # of a chunk; drawn without putting back
        spread = math.sqrt(1 / 8 * 7 / 8 / blocks * (1 - 1 / 4))
        return float(np.abs(np.bincount(CLASS_OF[chunk], minlength=8) / len(chunk) - 1 / 8).max() / spread)

    assert all(furthest(chunk) < 5 for chunk in np.split(block_shuffle(sorted_frames), 4))
    assert all(furthest(chunk) > 20 for chunk in np.split(neighbours_together(0), 4))

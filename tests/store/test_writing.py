"""Writing a store: what is committed survives a kill at any moment, and the same input gives the same bytes."""

import errno
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affcache.errors import InputError, StoreError
from affcache.files import whole_file
from affcache.progress import Listener
from affcache.store.frames import ENCODED, UNREADABLE
from affcache.store.reading import BLOCK_ROWS, EmbeddingStore, block_crc
from affcache.store.writing import SparseFile, StoreWriter, create_store, writing_lock
from tests.conftest import NAMED_ONLY, crop_list

ROWS, WIDTH = 5000, 5  # two blocks
REPOSITORY = Path(__file__).parents[2]

# A process that makes or continues a store of known contents, in pieces whose sizes a seed decides. It prints how many
# rows it has committed. With a positive third argument it kills itself instead of its n-th flush to the disk.
WRITER = """
import os, signal, sys
from pathlib import Path
import numpy as np
from affcache.progress import Listener
from affcache.store.reading import EmbeddingStore
from affcache.store.writing import StoreWriter, create_store, writing_lock
from tests.conftest import NAMED_ONLY
from affcache.crops.crop_list import CropList

path, seed, fatal_flush = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rows, width = 5000, 5
flush, flushes = os.fsync, 0

def counted_flush(file):
    global flushes
    flushes += 1
    if flushes == fatal_flush:
        os.kill(os.getpid(), signal.SIGKILL)
    flush(file)

os.fsync = counted_flush
crops = CropList((Path("v"), Path("w")), ("v", "w"), np.array([0, 3000, rows]), np.arange(rows, dtype=np.int32))
features = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float16)
status = np.where(np.arange(rows) % 7 == 3, 2, 1).astype(np.uint8)
features[status == 2] = 0
sizes = np.random.default_rng(seed)
with writing_lock(path, Listener()):
    if not path.exists():
        create_store(path, crops, width, {"model": "m"}, NAMED_ONLY)
    with StoreWriter(path) as writer:
        writer.finish_checksums()
        pending = writer.pending_rows()
        while len(pending):
            first = int(pending[0])
            last = min(first + int(sizes.integers(1, 400)), rows)
            writer.commit(first, features[first:last], status[first:last])
            print(last, flush=True)
            pending = pending[last - first :]
"""


def run_writer(path: Path, seed: int, fatal_flush: int = 0, fatal_rows: int = 0) -> int:
    """Run a writer, kill it from here once it has committed ``fatal_rows``, and return how it ended."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(seed), str(fatal_flush)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if fatal_rows and int(line) >= fatal_rows:
                process.kill()
    return process.returncode


def expected_contents() -> tuple[npt.NDArray[np.float16], npt.NDArray[np.uint8]]:
    features = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float16)
    status = np.where(np.arange(ROWS) % 7 == 3, 2, 1).astype(np.uint8)
    features[status == 2] = 0
    return features, status


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("uninterrupted") / "s.h5"
    assert run_writer(path, seed=99) == 0
    store = EmbeddingStore.open(path)
    features, status = expected_contents()
    np.testing.assert_array_equal(store.features, features)
    np.testing.assert_array_equal(store.status, status)
    store.verify()
    return path.read_bytes()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A new store of ten rows, (10, 3)."""
    path = tmp_path / "small.h5"
    create_store(path, crop_list({"a": range(6), "b": range(4)}), 3, {"model": "m"}, NAMED_ONLY)
    return path


def check_committed(path: Path) -> int:
    """Check what a killed writer left, and return how many rows are committed."""
    if not path.exists():  # killed before the store was whole
        return 0
    store = EmbeddingStore.open(path)
    features, status = expected_contents()
    committed = store.status != 0
    np.testing.assert_array_equal(store.features[committed], features[committed])
    np.testing.assert_array_equal(store.status[committed], status[committed])
    for block, checksum in enumerate(store.block_checksum):
        rows = slice(block * BLOCK_ROWS, (block + 1) * BLOCK_ROWS)
        assert checksum in (0, block_crc(features[rows]))
        assert checksum == 0 or committed[rows].all()
    return int(committed.sum())


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path: Path, uninterrupted: bytes) -> None:
    path = tmp_path / "s.h5"
    schedule = random.Random(0)
    committed = 0
    assert run_writer(path, seed=0, fatal_flush=1) == -signal.SIGKILL  # while the store is made
    assert not path.exists()
    for seed in range(1, 10):
        if seed <= 6:  # before a flush of features, of status or of a checksum: at most two commits of 400 rows
            assert run_writer(path, seed, fatal_flush=schedule.randint(1, 5)) == -signal.SIGKILL
        else:  # somewhere in or after a commit
            run_writer(path, seed, fatal_rows=committed + schedule.randint(1, 600))
        now = check_committed(path)
        assert now >= committed
        committed = now
    assert run_writer(path, seed=20) == 0
    assert path.read_bytes() == uninterrupted
    assert sorted(file.name for file in tmp_path.iterdir() if file.suffix != ".lock") == ["s.h5"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_killed_between_the_last_status_and_its_checksum(tmp_path: Path, uninterrupted: bytes) -> None:
    path = tmp_path / "s.h5"
    create_store(path, crop_list({"v": range(3000), "w": range(3000, ROWS)}), WIDTH, {"model": "m"}, NAMED_ONLY)
    features, status = expected_contents()
    with StoreWriter(path) as writer:
        writer.commit(0, features[: ROWS - 1], status[: ROWS - 1])
    assert run_writer(path, seed=0, fatal_flush=3) == -signal.SIGKILL  # features, status, and then the checksum
    with path.open("r+b") as file:  # what that flush would have kept is lost with the power
        file.seek(EmbeddingStore.open(path).block_checksum.offset + 4)  # type: ignore[attr-defined]
        file.write(bytes(4))
    store = EmbeddingStore.open(path)
    assert store.counts["pending"] == 0
    assert not store.summary()["complete"]
    for check in (store.verify, store.require_complete):
        with pytest.raises(
            StoreError, match=r"incomplete: the checksums of 1 of 2 blocks .* the same 'affcache extract'"
        ):
            check()
    assert run_writer(path, seed=1) == 0
    EmbeddingStore.open(path).verify()
    assert path.read_bytes() == uninterrupted


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(1, 9), unique=True), order=st.randoms(use_true_random=False))
def test_pieces_and_their_order_leave_no_trace(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], order: random.Random
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    features = np.arange(30, dtype=np.float16).reshape(10, 3)
    borders = [0, *sorted(cuts), 10]
    pieces = list(pairwise(borders))
    order.shuffle(pieces)
    for name, commits in (("whole.h5", [(0, 10)]), ("pieces.h5", pieces)):
        create_store(folder / name, crop_list({"a": range(6), "b": range(4)}), 3, {"model": "m"}, NAMED_ONLY)
        with StoreWriter(folder / name) as writer:
            for first, last in commits:
                assert EmbeddingStore.open(folder / name).block_checksum[0] == 0
                writer.commit(first, features[first:last], np.full(last - first, ENCODED, np.uint8))
    assert (folder / "whole.h5").read_bytes() == (folder / "pieces.h5").read_bytes()
    shutil.rmtree(folder)


def test_a_commit_is_flushed_in_order(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features are on the disk before a status says so, and statuses before a checksum does."""
    seen: list[tuple[bool, bool, bool]] = []
    flush = os.fsync

    def watched_flush(file: int) -> None:
        store = EmbeddingStore.open(small)
        seen.append((bool(store.features.any()), bool(store.status.any()), bool(store.block_checksum.any())))
        flush(file)

    monkeypatch.setattr(os, "fsync", watched_flush)
    with StoreWriter(small) as writer:
        writer.commit(0, np.ones((10, 3), np.float16), np.ones(10, np.uint8))
    assert seen == [(True, False, False), (True, True, False), (True, True, True)]


def test_pending_rows_are_what_is_left(small: Path) -> None:
    with StoreWriter(small) as writer:
        writer.commit(2, np.ones((3, 3), np.float16), np.ones(3, np.uint8))
        writer.commit(8, np.zeros((1, 3), np.float16), np.full(1, UNREADABLE, np.uint8))
        assert writer.pending_rows().tolist() == [0, 1, 5, 6, 7, 9]


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_embeddings_that_are_not_finite_are_refused(small: Path, value: float) -> None:
    before = small.read_bytes()
    features = np.ones((4, 3), np.float16)
    features[2:, 1] = value
    with StoreWriter(small) as writer, pytest.raises(StoreError) as caught:
        writer.commit(3, features, np.ones(4, np.uint8))
    assert str(caught.value) == (
        "The embedding of row 5 is not finite in float16. The encoder's weights or its precision are at fault: try "
        "--precision fp32, or another --model."
    )
    assert small.read_bytes() == before


def test_unreadable_rows_can_be_opened_again(small: Path) -> None:
    status = np.array([1, 2, 1, 1, 1, 1, 1, 2, 1, 1], dtype=np.uint8)
    features = np.where(status[:, None] == 1, 2.0, 0.0).astype(np.float16).repeat(3, axis=1)
    with StoreWriter(small) as writer:
        writer.commit(0, features, status)
        finished = small.read_bytes()
        assert writer.reopen_unreadable() == 2
        assert writer.pending_rows().tolist() == [1, 7]
        assert writer.store.block_checksum.tolist() == [0]
        writer.commit(1, np.ones((1, 3), np.float16), np.ones(1, np.uint8))
        writer.commit(7, np.zeros((1, 3), np.float16), np.full(1, UNREADABLE, np.uint8))
        assert writer.reopen_unreadable() == 1
        writer.commit(7, np.ones((1, 3), np.float16), np.ones(1, np.uint8))
        assert writer.reopen_unreadable() == 0
    assert small.read_bytes() != finished
    store = EmbeddingStore.open(small)
    assert store.counts == {"pending": 0, "encoded": 10, "unreadable": 0}
    store.verify()


def test_many_unreadable_rows_are_opened_again_with_two_flushes(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flush, flushes = os.fsync, []

    def counted(file: int) -> None:
        flushes.append(EmbeddingStore.open(small).status.tolist())
        flush(file)

    with StoreWriter(small) as writer:
        writer.commit(0, np.zeros((10, 3), np.float16), np.full(10, UNREADABLE, np.uint8))
        monkeypatch.setattr(os, "fsync", counted)
        assert writer.reopen_unreadable() == 10
    assert flushes == [[UNREADABLE] * 10, [0] * 10], "checksums go first"


@given(
    st.lists(st.tuples(st.integers(0, 5000), st.binary(min_size=1, max_size=3000)), max_size=8),
    st.integers(1, 700),
)
def test_a_sparse_file_is_a_file(writes: list[tuple[int, bytes]], piece: int) -> None:
    sparse, plain = SparseFile(), io.BytesIO()
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr("affcache.store.writing.PIECE", piece)
        for at, data in writes:
            for file in (sparse, plain):
                assert file.seek(at) == at
                assert file.write(data) == len(data)
        size = max([0, *(at + len(data) for at, data in writes)])
        assert sparse.seek(0, os.SEEK_END) == size
        for at in (0, size // 2):
            read = bytearray(size)
            sparse.seek(at)
            sparse.readinto(read)
            assert read[: size - at] == plain.getvalue()[at:size]
        sparse.truncate(size + 10)
        with whole_file(Path(folder) / "x") as target:
            sparse.copy_to(target)
        assert (Path(folder) / "x").read_bytes() == plain.getvalue()[:size].ljust(size + 10, b"\0")


def test_a_reader_sees_what_a_writer_commits(small: Path) -> None:
    reader = EmbeddingStore.open(small)
    with StoreWriter(small) as writer:
        writer.commit(0, np.ones((2, 3), np.float16), np.ones(2, np.uint8))
        assert reader.counts == {"pending": 8, "encoded": 2, "unreadable": 0}
        assert reader.features[1].tolist() == [1, 1, 1]


HOLDER = """
import sys
from pathlib import Path
from affcache.progress import Listener
from affcache.store.writing import writing_lock
with writing_lock(Path(sys.argv[1]), Listener()):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_is_refused_until_the_first_has_gone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "s.h5"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StoreError) as caught, writing_lock(path, Listener()):
            pass
        assert str(caught.value) == (
            f"{path} is being written by another process. Wait until that is done, or stop it and run the same command "
            "again: it continues at the last committed row. To extract something else at the same time, choose another "
            "--store FILE."
        )
        with writing_lock(tmp_path / "new" / "other.h5", Listener()):
            pass
        holder.kill()
    with writing_lock(path, Listener()):  # the system lets go of a killed process's lock
        pass


def test_a_store_below_a_file_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = r"file can't be written: .* Put that right or choose another place, then run the same command again"
    with pytest.raises(InputError, match=message), writing_lock(tmp_path / "file" / "s.h5", Listener()):
        pytest.fail("nobody can write there")
    with pytest.raises(StoreError, match=r"can't be written: .* Expected a folder that can be written."):
        create_store(tmp_path / "file" / "s.h5", crop_list({"a": [1]}), 3, {}, NAMED_ONLY)


Usage = namedtuple("Usage", "total used free")


def test_no_space_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 2_000_000, 2_000_000))
    path = tmp_path / "new" / "s.h5"
    with pytest.raises(StoreError) as caught:
        create_store(path, crop_list({"a": range(2000)}), 768, {"model": "m"}, NAMED_ONLY)
    assert str(caught.value) == (
        f"No space for the store {path}: 2,000 rows of 768 values need 0.003 GB, 0.002 GB are free. Free some space, "
        "or choose another disk with --store FILE."
    )
    assert list(path.parent.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no posix_fallocate on this system")
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"^No space for the store .*s.h5: 20 rows of 8 values need .* Free some space"),
        (errno.EDQUOT, r"^No space for the store"),
        (errno.EIO, r"^The store .*s.h5 can't be written: Input/output error. Expected a folder that can be written."),
    ],
)
def test_a_disk_that_refuses_leaves_no_half_made_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    def refuse(file: int, offset: int, length: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(StoreError, match=message):
        create_store(tmp_path / "s.h5", crop_list({"a": range(20)}), 8, {"model": "m"}, NAMED_ONLY)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_a_commit(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StoreWriter(small) as writer:
        writer.commit(0, np.ones((4, 3), np.float16), np.ones(4, np.uint8))

        def refuse(file: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse)
            with pytest.raises(StoreError) as caught:
                writer.commit(4, np.full((4, 3), 2, np.float16), np.ones(4, np.uint8))
    assert str(caught.value) == (
        f"Writing to {small} failed: Input/output error. Rows committed before are safe: make room or reconnect the "
        "disk, then run the same command again."
    )
    store = EmbeddingStore.open(small)
    assert store.status.tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert (store.features[:4] == 1).all()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("a file system of its own can be mounted by root on Linux only")
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "affcache-test", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this system doesn't let root mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("says_so", [True, False], ids=["known before", "found out while writing"])
def test_a_real_disk_without_room(tiny_disk: Path, monkeypatch: pytest.MonkeyPatch, says_so: bool) -> None:
    if not says_so:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 10**12))
    with pytest.raises(StoreError, match=r"^No space for the store .*: 1,000 rows of 2000 values need 0.004 GB"):
        create_store(tiny_disk / "s.h5", crop_list({"a": range(1000)}), 2000, {"model": "m"}, NAMED_ONLY)
    assert list(tiny_disk.iterdir()) == []


def test_a_store_that_was_made_can_be_filled_on_a_full_disk(tiny_disk: Path) -> None:
    path = tiny_disk / "s.h5"
    create_store(path, crop_list({"a": range(100)}), 2000, {"model": "m"}, NAMED_ONLY)  # 0.4 MB
    with pytest.raises(OSError, match="No space left"):
        (tiny_disk / "junk").write_bytes(bytes(2_000_000))
    assert os.statvfs(tiny_disk).f_bavail == 0
    features = np.random.default_rng(0).normal(size=(100, 2000)).astype(np.float16)
    with StoreWriter(path) as writer:
        writer.commit(0, features, np.ones(100, np.uint8))
    store = EmbeddingStore.open(path)
    store.verify()
    np.testing.assert_array_equal(store.features, features)
    del store, writer  # their memory maps would keep the disk busy


def test_places_where_no_store_can_be_say_why(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for path, reason in (
        (tmp_path / "folder", "is a folder. Expected a store, or a new file's name."),
        (tmp_path / "file" / "s.h5", "can't be written: "),
    ):
        with pytest.raises((StoreError, InputError)) as caught, writing_lock(path, Listener()):
            pass
        assert reason in str(caught.value)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="this system has no /proc")
def test_a_folder_that_takes_no_files_is_not_taken_for_a_store_in_use() -> None:
    with pytest.raises(InputError, match=r"^/proc can't be written: "), writing_lock(Path("/proc/s.h5"), Listener()):
        pass


def test_room_is_reserved_where_the_file_system_can_not_do_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(file: int, offset: int, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    crops = crop_list({"a": range(20_000)})
    create_store(tmp_path / "usual.h5", crops, 100, {"model": "m"}, NAMED_ONLY)
    monkeypatch.setattr(os, "posix_fallocate", refusing, raising=False)
    create_store(tmp_path / "s.h5", crops, 100, {"model": "m"}, NAMED_ONLY)
    assert (tmp_path / "s.h5").read_bytes() == (tmp_path / "usual.h5").read_bytes()
    found = (tmp_path / "s.h5").stat()
    if hasattr(found, "st_blocks"):
        assert found.st_blocks * 512 >= found.st_size  # no holes

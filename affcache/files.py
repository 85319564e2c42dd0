"""Files: read within bounds, written whole or not at all, locked; tensors with a header; what ships with affcache.

torch and matplotlib are imported where they are needed: the command line and the settings don't wait for them.
"""

import errno
import json
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from importlib.resources import as_file
from importlib.resources import files as resources
from io import BufferedReader, FileIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from affcache.errors import AffcacheError, InputError, StoreError
from affcache.progress import Listener

if TYPE_CHECKING:
    import torch

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PARTIAL = ".partial"  # ends the names of files that aren't whole yet
LOCK = ".lock"  # of a folder in which one process may work at a time

LARGEST_LINE = 2**16  # bytes
LARGEST_JSON = 2**24  # bytes
_READING = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # doesn't wait for a pipe

Tensors = dict[str, "torch.Tensor"]


def cannot_write(path: Path, error: OSError) -> InputError:
    """Return the error for a path that the system refuses to write, make or remove."""
    remedy = "Free some space" if error.errno in DISK_IS_FULL else "Put that right"
    return InputError(
        f"{path} can't be written: {error.strerror or error}. Expected a folder that can be written, with room. "
        f"{remedy} or choose another place, then run the same command again ('affcache fit' with --run DIR --resume)."
    )


def open_descriptor(path: Path | str, most: int | None = None) -> int:
    """Open a user's file for reading, if it is one: not a pipe or a device, nor larger than its kind can be.

    Args:
        path: the file, or a link to it.
        most: bytes.

    Raises:
        OSError: it is missing, no file, or too large; nothing was read.
    """
    try:
        descriptor = os.open(path, _READING)
    except ValueError:
        raise OSError(errno.EINVAL, "no file has such a name") from None
    try:
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if most is not None and found.st_size > most:
            raise OSError(errno.EFBIG, f"it has {found.st_size:,} bytes, of which at most {most:,} are read")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_regular(path: Path | str, most: int | None = None) -> FileIO:
    """Open a user's file as ``open_descriptor`` does."""
    return FileIO(open_descriptor(path, most))


def read_bytes(path: Path | str, most: int) -> bytes:
    """Read a whole file of at most so many bytes; raises as ``open_descriptor``."""
    with open_regular(path, most) as file:
        return file.readall()


def read_lines(path: Path, most: int, errors: str = "strict") -> Iterator[str]:
    """Yield the lines of a text file in UTF-8, with or without a byte order mark.

    Lines end at \\n or \\r\\n and nowhere else: other characters that Unicode counts as line ends would shift the rest.

    Raises:
        OSError: as ``open_descriptor``, or a line is longer than any that is meant.
        UnicodeDecodeError: it isn't UTF-8.
    """
    with open_regular(path, most) as raw, BufferedReader(raw) as file:
        first = True
        while line := file.readline(LARGEST_LINE + 1):
            if len(line) > LARGEST_LINE:
                raise OSError(errno.EFBIG, f"a line of it has more than {LARGEST_LINE:,} bytes")
            text = line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8-sig" if first else "utf-8", errors)
            first = False
            yield text


def written_by_others(path: Path) -> bool:
    """Say whether another user than the caller and root may have written a file, or a link to it."""
    with suppress(OSError, AttributeError):  # a link that leads nowhere, which reading says; a system without users
        found = path.stat()
        return found.st_mode & stat.S_IWOTH != 0 or not {found.st_uid, path.lstat().st_uid} <= {os.getuid(), 0}
    return False


def read_json(path: Path, most: int = LARGEST_JSON) -> dict[str, Any]:
    """Read one JSON object.

    Raises:
        OSError: as ``open_descriptor``.
        ValueError: it is none.
    """
    return parse_json(read_bytes(path, most))


def parse_json(text: str | bytes) -> dict[str, Any]:
    """Return one JSON object; raises ValueError where it is none, however deep it goes."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Give a new name beside ``path`` for a file or folder, which takes the name ``path`` at the end, or is removed.

    Raises:
        OSError: its folder, which is made if need be, can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # a folder
        with suppress(OSError):
            partial.unlink()
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Give a new file to write and read, which takes the name ``path`` once it is on the disk, or is removed.

    Raises:
        OSError: the system refuses.
    """
    with beside(path) as partial, partial.open("x+b") as file:  # x: what is there, be it a link, isn't opened
        yield file
        file.flush()
        os.fsync(file.fileno())
        if os.fstat(file.fileno()).st_size < file.tell():
            raise OSError(errno.EIO, "the file is shorter than what was written to it")


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a whole file.

    Raises:
        InputError: the system refuses.
    """
    try:
        with whole_file(path) as file:
            file.write(content)
    except OSError as error:
        raise cannot_write(path, error) from None


def remove(path: Path) -> None:
    """Remove a file, if it is there.

    Raises:
        InputError: the system refuses.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from None


def discard_partials(path: Path) -> None:
    """Remove what killed processes left of a file that nobody else writes now."""
    for partial in path.parent.glob(f"{escape(path.name)}.*{PARTIAL}"):
        with suppress(OSError):
            partial.unlink()


@contextmanager
def locked(path: Path, refusal: AffcacheError, listener: Listener) -> Iterator[None]:
    """Hold a lock file, in a folder that is made if need be; the system lets go of it when the process ends.

    On a disk without locks the work goes on, and the listener is told. At the end the file is removed, and the folder
    if it was made here and is empty.

    Raises:
        refusal: another process holds it.
        InputError: the folder can't be written.
    """
    new = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, works = _lock(path)
    except BlockingIOError:
        raise refusal from None
    except OSError as error:
        raise cannot_write(path.parent, error) from None
    try:
        if not works:
            listener.warning(f"The disk of {path.parent} has no locks. See to it that nobody else writes there now.")
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)
        if new:
            with suppress(OSError):
                path.parent.rmdir()


def _lock(path: Path) -> tuple[int, bool]:
    """Open and lock a file; return its descriptor, and whether the disk knows locks. BlockingIOError: it is held."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            works = _try_lock(descriptor)
            with suppress(FileNotFoundError):  # the process before has just removed it
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor, works
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError from None
        return False
    return True


def existing_parent(path: Path) -> Path:
    """Return the nearest folder above a path that is there."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, in UTF-8; file names in it may be any bytes."""
    write_bytes(path, text.encode("utf-8", errors="surrogateescape"))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one JSON object, readable by people."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_tensors(path: Path, tensors: Tensors, metadata: Mapping[str, Any]) -> None:
    """Write tensors as safetensors with JSON metadata in the header."""
    from safetensors.torch import save

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(contiguous, metadata={"affcache": json.dumps(metadata)}))


def read_tensors(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Read what ``write_tensors`` wrote, onto the CPU.

    Raises:
        StoreError: missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        open_regular(path).close()
        with safe_open(path, framework="pt") as file:
            metadata = parse_json((file.metadata() or {})["affcache"])
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise StoreError(
            f"{path} can't be read ({type(error).__name__}: {error}). Expected a file that 'affcache fit' wrote. "
            "Train again with 'affcache fit'."
        ) from None


@contextmanager
def shipped(name: str) -> Iterator[Path]:
    """Give what ships with affcache: "sample", in Aff-Wild2's layout, "practice_encoder", or "published.toml"."""
    with as_file(resources("affcache.data") / name) as path:
        yield path

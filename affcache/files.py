"""Files: written whole or not at all, locks, tensors with a header, figures, and what ships with affcache.

torch and matplotlib are imported where they are needed: the command line and the settings don't wait for them.
"""

import errno
import io
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from importlib.resources import as_file
from importlib.resources import files as resources
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from affcache.errors import AffcacheError, InputError, StoreError
from affcache.progress import Listener

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")  # of figures
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PARTIAL = ".partial"  # ends the names of files that aren't whole yet
LOCK = ".lock"  # of a folder in which one process may work at a time

Tensors = dict[str, "torch.Tensor"]


def cannot_write(path: Path, error: OSError) -> InputError:
    """Return the error for a path that the system refuses to write, make or remove."""
    remedy = "Free some space" if error.errno in DISK_IS_FULL else "Put that right"
    return InputError(
        f"{path} can't be written: {error.strerror or error}. Expected a folder that can be written, with room. "
        f"{remedy} or choose another place, then run the same command again."
    )


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
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})["affcache"])
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise StoreError(
            f"{path} can't be read ({type(error).__name__}: {error}). Expected a file that 'affcache fit' wrote. "
            "Train again with 'affcache fit'."
        ) from None


@contextmanager
def drawing(options: dict[Any, Any] | None = None) -> Iterator[None]:
    """Draw with matplotlib's own defaults: neither MPLBACKEND nor a matplotlibrc has a say. Decorates functions, too.

    Args:
        options: of matplotlib's rcParams, beside the defaults.
    """
    # nor does it load at an MPLBACKEND that isn't installed, such as a notebook's
    backend = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    from matplotlib import rc_context, rcdefaults, rcParams

    if backend is not None:
        os.environ["MPLBACKEND"] = backend
        with suppress(ValueError):
            rcParams["backend"] = backend
    with rc_context():
        rcdefaults()
        # the same content gives the same file, and a $ in a name is a $
        rcParams.update({"svg.hashsalt": "affcache", "text.parse_math": False, **(options or {})})
        yield


def single_axes(width: float = 4.8, height: float = 3.2) -> "tuple[Figure, Axes]":
    """Return a figure of so many inches with one pair of axes, without the upper and the right line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figures(folder: Path, figures: "Mapping[str, Figure]") -> list[Path]:
    """Write figures by their names, in every format, and return the files.

    To be called within ``drawing``, in which the figures were drawn.
    """
    paths = [folder / f"{name}.{form}" for name in figures for form in FORMATS]
    for path in paths:
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        drawn = io.BytesIO()
        figures[path.stem].savefig(drawn, format=path.suffix[1:], dpi=200, metadata=metadata)
        write_bytes(path, drawn.getvalue())
    return paths


@contextmanager
def shipped(name: str) -> Iterator[Path]:
    """Give what ships with affcache: "sample", in Aff-Wild2's layout, "practice_encoder", or "published.toml"."""
    with as_file(resources("affcache.data") / name) as path:
        yield path

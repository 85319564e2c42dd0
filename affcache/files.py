"""Files: read within bounds, written whole or not at all, tensors with a header, figures, what ships with affcache.

torch and matplotlib are imported where they are needed: the command line and the settings don't wait for them.
"""

import errno
import json
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.resources import as_file
from importlib.resources import files as resources
from io import BufferedReader, FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affcache.errors import StoreError

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")  # of figures

LARGEST_LINE = 2**16  # bytes
LARGEST_JSON = 2**24  # bytes
_READING = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # doesn't wait for a pipe

Tensors = dict[str, "torch.Tensor"]


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
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary name beside ``path`` to write to; it takes the name ``path`` at the end, or is removed."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        with suppress(OSError):  # where its folder can't be had, it isn't there either
            partial.unlink()
        raise


def existing_parent(path: Path) -> Path:
    """Return the nearest folder above a path that is there."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, in UTF-8; file names in it may be any bytes."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one JSON object, readable by people."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_tensors(path: Path, tensors: Tensors, metadata: Mapping[str, Any]) -> None:
    """Write tensors as safetensors with JSON metadata in the header."""
    from safetensors.torch import save

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with written_whole(path) as partial:
        # as bytes: the library's own file writing leaves a file that nobody else may read
        partial.write_bytes(save(contiguous, metadata={"affcache": json.dumps(metadata)}))


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
    """Write figures by their names, in every format; make the folder if need be, and return the files.

    To be called within ``drawing``, in which the figures were drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{form}" for name in figures for form in FORMATS]
    for path in paths:
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figures[path.stem].savefig(path, dpi=200, metadata=metadata)
    return paths


@contextmanager
def shipped(name: str) -> Iterator[Path]:
    """Give what ships with affcache: "sample", in Aff-Wild2's layout, "practice_encoder", or "published.toml"."""
    with as_file(resources("affcache.data") / name) as path:
        yield path

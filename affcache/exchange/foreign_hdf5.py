"""HDF5 files of others, read in a process of its own: over a damaged one libhdf5 may loop for ever, deaf to Ctrl-C.

This file is that process's script, too; it then imports nothing of affcache.
"""

import errno
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

SECONDS = 15.0  # without anything new
MOST_MEMORY = 2**31  # bytes of address space
LARGEST_CHUNK = 2**28  # bytes
BLOCK = 16_384  # rows read at once


def described(path: Path) -> dict[str, Any]:
    """Return what an HDF5 file holds at its top: its attribute format, names, and its datasets' places.

    Raises:
        OSError: HDF5 can't read it, or comes to no end.
        ValueError: what was read is no description.
    """
    with tempfile.TemporaryFile() as out:
        _read(path, "", out)
        out.seek(0)
        return dict(json.load(out))


def unpack(path: Path, name: str, out: IO[bytes]) -> None:
    """Write the values of a dataset (n, D) row after row to a file; raises as ``described``."""
    _read(path, name, out)


def _read(path: Path, name: str, out: IO[bytes]) -> None:
    words = [sys.executable, __file__, str(path), name]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=said)
        try:
            written = 0
            while process.poll() is None:
                try:
                    process.wait(SECONDS)
                except subprocess.TimeoutExpired:
                    before, written = written, os.fstat(out.fileno()).st_size
                    if before == written:
                        raise OSError(errno.ETIMEDOUT, "HDF5 comes to no end with it") from None
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().split("\n")
            raise OSError(errno.EIO, lines[-1] or "HDF5 gave up")


def _describe(file: Any) -> dict[str, Any]:
    import h5py

    datasets = {}
    for name in file:
        if isinstance(file.get(name, getlink=True), h5py.HardLink) and isinstance(file[name], h5py.Dataset):
            one = file[name]
            elsewhere = one.is_virtual or bool(one.external)
            large = one.chunks is not None and math.prod(one.chunks) * one.dtype.itemsize > LARGEST_CHUNK
            offset = None if elsewhere or one.chunks is not None else one.id.get_offset()
            datasets[name] = {
                "dtype": one.dtype.name, "bytes": one.dtype.str, "shape": one.shape, "offset": offset,
                "readable": not (elsewhere or large),
            }  # fmt: skip
    return {"format": str(file.attrs.get("format")), "names": sorted(file)[:20], "datasets": datasets}


def _main(path: str, name: str) -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    except (ImportError, OSError, ValueError):  # a system without such limits
        pass
    import h5py

    with h5py.File(path, "r", locking=False) as file:
        if name:
            for first in range(0, len(file[name]), BLOCK):
                sys.stdout.buffer.write(file[name][first : first + BLOCK].tobytes())
        else:
            json.dump(_describe(file), sys.stdout)


if __name__ == "__main__":
    try:
        _main(*sys.argv[1:])
    except Exception as error:
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split()))

"""Whether a machine sees the same crops as the driver: a few of them are read on both sides, and compared."""

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from affcache.crops.archives import UnreadableCropError
from affcache.crops.crop_list import CropList
from affcache.errors import InputError

SAMPLED = 8


@dataclass(frozen=True)
class CropSample:
    """Rows of a list of crops, with the CRC-32 of each one's file; None where it can't be read."""

    rows: Sequence[int]
    checksums: Sequence[int | None]
    paths: Sequence[Path]  # folders of those crops, and every archive

    @classmethod
    def of(cls, crops: CropList) -> "CropSample":
        """Read a few crops, spread over all."""
        rows = np.unique(np.linspace(0, len(crops) - 1, SAMPLED).astype(np.int64)).tolist()
        archives = {archive.path.absolute() for archive, _ in crops.archived.values()}
        paths = sorted({crops.container(row).absolute() for row in rows} | archives)
        return cls(rows, [_checksum(crops, row) for row in rows], paths)

    def require_paths(self, node: str) -> None:
        """Look for the folders and archives.

        Raises:
            InputError: one can't be seen here.
        """
        for path in self.paths:
            if not os.access(path, os.R_OK):
                raise _refusal(node, f"{path} is not there, or can't be read")

    def require(self, crops: CropList, node: str) -> None:
        """Compare with what this machine reads.

        Raises:
            InputError: another file, or none, is found here where the driver has one.
        """
        for row, expected in zip(self.rows, self.checksums, strict=True):
            found = _checksum(crops, row)
            if found == expected:
                continue
            raise _refusal(node, f"{crops.path(row)} is not the file that the driver has, or can't be read")


def _refusal(node: str, what: str) -> InputError:
    return InputError(
        f"Node {node} doesn't see the crops: {what}. Expected every machine of the cluster to find the same crops "
        "under the same path. Put them on a file system that all of them mount, or copy them to the same place "
        "everywhere, then run the same command again."
    )


def _checksum(crops: CropList, row: int) -> int | None:
    try:
        return zlib.crc32(crops.read(row))
    except (OSError, UnreadableCropError):
        return None

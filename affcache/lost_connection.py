"""Telling a bad crop from crops that are gone: a lost disk must stop a run, and not mark every row unreadable."""

import errno
import os
from pathlib import Path

from affcache.archives import ARCHIVE_SUFFIXES
from affcache.errors import InputError

# the machine's fault, or the network's, whatever file they are met at
NEVER_THE_CROP = frozenset(
    {
        errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.ECONNRESET,
        errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EHOSTDOWN,
    }
)  # fmt: skip


def require_source(container: Path, error: OSError) -> None:
    """Raise unless an error may be one crop's own: its folder is still there, and so is the connection to it.

    Args:
        container: the folder, or the archive, that holds the crop.
        error: what reading the crop raised.

    Raises:
        InputError: the crop can't be blamed. Nothing is lost, and the run can be continued.
    """
    try:
        if error.errno in NEVER_THE_CROP:
            raise error
        if container.suffix.lower() in ARCHIVE_SUFFIXES and not container.is_dir():
            with container.open("rb", buffering=0) as file:
                file.read(1)
        else:
            with os.scandir(container):
                pass
    except OSError as reason:
        kind = "archive" if container.suffix.lower() in ARCHIVE_SUFFIXES else "folder"
        raise InputError(
            f"The crops {kind} {container} can't be read "
            f"any more ({reason.strerror or reason}). Expected it to stay while crops are encoded. Reconnect it and "
            "run the same command again: it continues at the last committed row."
        ) from None

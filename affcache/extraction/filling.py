"""Filling a store: what comes out of an engine is committed every few seconds, by one thread, beside the encoding."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from affcache.errors import InputError
from affcache.extraction.commit import Committer
from affcache.extraction.decoding import Rows
from affcache.extraction.engine import Encoding
from affcache.progress import Listener
from affcache.store.writing import StoreWriter


def fill(writer: StoreWriter, encoding: Encoding, pending: Rows, listener: Listener) -> None:
    """Encode the pending rows of a store. What is committed stays, whatever happens to the process.

    Args:
        writer: of the store.
        encoding: yields the rows, in any order.
        pending: int64 (n,), rising.
        listener: receives progress.
    """
    total = len(writer.store)
    done = total - len(pending)
    with warnings.catch_warnings(), ThreadPoolExecutor(1, thread_name_prefix="commit") as thread:
        # here: decoding threads that each did this would undo one another's filters
        warnings.filterwarnings("ignore", module=r"PIL\.")  # Pillow warns of odd metadata in files it reads well
        committer = Committer(writer, thread, encoding.account.clock)
        try:
            with closing(encoding.encode(pending)) as batches:
                for rows, encoded in batches:
                    committer.add(rows, encoded)
                    done += len(rows)
                    listener.progress(done, total, "crop", encoding.note())
        except (KeyboardInterrupt, InputError):  # what is encoded is worth keeping
            committer.finish()
            raise
        committer.finish()

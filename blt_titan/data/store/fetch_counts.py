"""What a process and its workers have fetched from object stores: counts in memory that they share.

The table is mapped before workers are forked. Each of them writes a row of its own, so that no lock is shared: a worker
that is killed while it counts holds up nobody.
"""

import mmap
import os
import threading
from typing import NamedTuple

import numpy as np

MOST_WORKERS = 1024


class FetchCounts(NamedTuple):
    """Counts since the process began, its workers included."""

    requests: int
    """Answered requests for a file, or for a part of one."""
    fetched_bytes: int
    retries: int
    """Requests that failed and were made again."""
    cache_hits: int
    """Reads that the cache on disk answered."""
    evictions: int
    """Files that were removed from the cache to make room."""


_table = np.frombuffer(
    mmap.mmap(-1, (1 + MOST_WORKERS) * len(FetchCounts._fields) * 8), np.int64
).reshape(1 + MOST_WORKERS, -1)  # fmt: skip
_row = 0
_lock = threading.Lock()


def count(**more: int) -> None:
    """Add to this process's counts."""
    with _lock:
        for name, value in more.items():
            _table[_row, FetchCounts._fields.index(name)] += value


def counted() -> FetchCounts:
    """Return the counts of this process and its workers."""
    return FetchCounts(*_table.sum(axis=0).tolist())


def count_as_worker(number: int) -> None:
    """Count in the row of a worker, 0 and up; called in its process."""
    global _row
    _row = 1 + number % MOST_WORKERS


def _begin_anew() -> None:
    global _lock
    _lock = threading.Lock()  # which a thread may have held when its process was forked


os.register_at_fork(after_in_child=_begin_anew)

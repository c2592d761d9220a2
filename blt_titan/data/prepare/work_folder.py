"""The working directory of `prepare`: where it is, and that one process has it."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blt_titan.data.prepare.destination import Destination
from blt_titan.data.store.errors import DataError

WORK_DIRECTORY = ".prepare"
LOCK_NAME = "lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a working directory for this process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK_NAME, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another process is preparing this data set; wait for it, or stop it") from None
        yield


def work_directory(work: str | os.PathLike[str] | None, target: Destination) -> Path:
    """Return the folder of this work's intermediate files; no other files are in it."""
    if work is None:
        return Path(str(target)) / WORK_DIRECTORY
    of_target = hashlib.sha256(os.path.abspath(str(target)).encode()).hexdigest()[:12]
    return Path(work) / f"{WORK_DIRECTORY}-{of_target}"

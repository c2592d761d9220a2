"""A folder of bounded size for what was fetched, shared by all processes of a machine.

In: a key, which names content that never changes, and its bytes. Out: the bytes, until they had to make room.

    cache_dir/blt_titan_cache/
      used             how many bytes the files take; its lock is held while a file comes or files go
      locks/1f3        one for each first three digits of keys: held by whoever fetches; others wait, then read
      1f30c2...        the files; the time of change is that of the last use, and the least recently used go first

The decision that is not obvious: readers take no lock. A file is read whole in one go, and a name that is removed
meanwhile leaves its bytes to whoever has opened it; a name that is gone before is fetched again. Locks are the kernel's
(`flock`), which a process that is killed gives back, and nobody waits for one for ever: a process that was stopped may
hold it. The folder must therefore be on a disk of the machine, not on a network file system.

What the disk gives back is checked by whoever asked (checksums), as after a crash it may be anything.
"""

import contextlib
import fcntl
import logging
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from blt_titan.data.store.errors import DataError
from blt_titan.data.store.fetch_counts import count
from blt_titan.data.store.waits import BEAT_S, Wait

logger = logging.getLogger(__name__)

FOLDER = "blt_titan_cache"
LOCK_WAIT_S = 20.0
"""How long a process waits for another's lock, then does without."""
_KEPT_SHARE = 7 / 8  # of the bound, after files were removed: looking through the folder is then seldom
_TEMPORARY = ".tmp-"


class DiskCache:
    """Files by key in a folder of at most `limit_bytes`.

    A disk that is full or fails is said once in the log: what was fetched is then used, and not kept.
    """

    def __init__(self, directory: Path, limit_bytes: int):
        self.directory = directory / FOLDER
        self.limit_bytes = limit_bytes
        self._has_warned = False

    def check(self) -> None:
        """Make the folder, and see that it is ours, can be written, and that its disk has room for it.

        Raises:
            DataError: says what to do.
        """
        keys = "data.cache_dir"
        try:
            self._make()
            if os.stat(self.directory).st_uid != os.getuid():
                raise DataError(f"{self.directory}: belongs to another user; set {keys} to a folder of your own")
            (probe := self.directory / f"{uuid.uuid4().hex}{_TEMPORARY}").write_bytes(b"")
            probe.unlink()
            used = sum(size for _, size, _ in self._files())
            disk = os.statvfs(self.directory)
        except OSError as error:
            raise DataError(
                f"{self.directory}: cannot be written ({error.strerror}); set {keys} to a folder on a disk of this "
                "machine"
            ) from error
        if (free := disk.f_bavail * disk.f_frsize + used) < self.limit_bytes:
            raise DataError(
                f"data.cache_bytes = {self.limit_bytes}: {self.directory} has room for {free}; lower it, or set {keys} "
                "to a folder on a larger disk"
            )

    def get(self, key: str) -> bytes | None:
        """Return what is kept under a key, None if there is nothing; it is then the most recently used."""
        path = self.directory / key
        try:
            content = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(error)
            return None
        return content

    def put(self, key: str, content: bytes) -> None:
        """Keep content under a key, if it fits into the bound; the least recently used makes room."""
        if len(content) > self.limit_bytes:
            return
        path = self.directory / key
        temporary = self.directory / f"{key}{_TEMPORARY}{os.getpid()}-{uuid.uuid4().hex}"
        try:
            with self._used() as (read, write):
                if path.exists():
                    return
                used = read()
                if used is None or used + len(content) > self.limit_bytes:
                    used = self._make_room(len(content))
                try:
                    # Counted before it is there: a process that is killed in between leaves too much, not too little.
                    write(used + len(content))
                    temporary.write_bytes(content)
                    os.replace(temporary, path)
                except BaseException:
                    temporary.unlink(missing_ok=True)
                    raise
        except OSError as error:
            self._warn(error)

    def drop(self, key: str) -> None:
        """Remove what is kept under a key: it is damaged."""
        with contextlib.suppress(OSError):
            (self.directory / key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def alone(self, key: str, wait: Wait) -> Iterator[None]:
        """Let one process or thread at a time fetch a key; the others wait, `LOCK_WAIT_S` at most, and say so."""
        try:
            lock: int | None = self._open(f"locks/{key[:3]}")
        except OSError as error:
            self._warn(error)
            lock = None
        if lock is None:
            yield
            return
        try:
            with wait:
                _take(lock, wait)
            yield
        finally:
            _give_back(lock)

    @contextlib.contextmanager
    def _used(self) -> Iterator[tuple]:
        """Hold the lock on the count of bytes; gives functions that read it, None if it is no number, and write it."""
        lock = self._open("used")
        try:
            if not _take(lock):
                raise TimeoutError(None, f"another process holds its lock for {LOCK_WAIT_S:.0f} s")
            digits = os.pread(lock, 32, 0)
            yield (
                lambda: int(digits) if digits.isdigit() else None,
                # Of one length, so that no number is ever the half of another.
                lambda used: os.pwrite(lock, b"%020d" % used, 0),
            )
        finally:
            _give_back(lock)

    def _make_room(self, needed: int) -> int:
        """Remove the least recently used until so many bytes fit; return what the rest takes.

        So go temporary files: whoever writes one holds the lock, so that it is a killed process's.
        """
        files = sorted(self._files())
        used = sum(size for _, size, _ in files)
        removed = 0
        for _, size, path in files:
            if used + needed <= self.limit_bytes * _KEPT_SHARE:
                break
            path.unlink(missing_ok=True)
            used -= size
            removed += 1
        count(evictions=removed)
        return used

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """Yield time of change in nanoseconds, size and path of every file that counts."""
        for entry in os.scandir(self.directory):
            if entry.name in ("used", "locks"):
                continue
            with contextlib.suppress(FileNotFoundError):
                found = entry.stat()
                yield found.st_mtime_ns, found.st_size, Path(entry.path)

    def _open(self, name: str) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            return os.open(self.directory / name, flags, 0o600)
        except FileNotFoundError:
            self._make()
            return os.open(self.directory / name, flags, 0o600)

    def _make(self) -> None:
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        self.directory.mkdir(mode=0o700, exist_ok=True)
        (self.directory / "locks").mkdir(mode=0o700, exist_ok=True)

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            logger.warning(f"{self.directory}: {error.strerror or error}: what is fetched is not kept there")
        self._has_warned = True


def _take(lock: int, wait: Wait | None = None) -> bool:
    """Take a lock; False if another has it for too long."""
    deadline, pause = time.monotonic() + LOCK_WAIT_S, 0.001
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
        if wait is not None and wait.seconds > BEAT_S:
            wait.beat()
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def _give_back(lock: int) -> None:
    # Unlocked, not just closed: a process that was forked meanwhile has it open as well.
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_UN)
    os.close(lock)

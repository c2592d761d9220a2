"""A data set in an object store: what is fetched of it, how often that is tried, and what is kept.

In: names of files, and which part of them is wanted. Out: bytes, over a cache on the disk of this machine:

    manifest.json, sidecar.json    whole, each time
    train-00000.index.npy          whole, once: where the record batches of its shard lie (160 KB for a shard of 1 GiB)
    train-00000.arrow              one record batch at a time, by a request for its range

The decision that is not obvious: shards are never fetched whole. The order of the data is a permutation of all record
batches, so a stream's next one may lie in any shard; of what whole shards hold, a node would throw away nearly
everything before it came to it. By ranges a node fetches what it trains on, once.
"""

import asyncio
import errno
import hashlib
import logging
import os
import random
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from blt_titan.data.store.address import Address, file_system
from blt_titan.data.store.disk_cache import DiskCache
from blt_titan.data.store.errors import DataError, UnreachableError
from blt_titan.data.store.fetch_counts import count
from blt_titan.data.store.waits import BEAT_S, Wait

logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 20.0
"""Pauses before a request is made again: each twice the one before, give or take a half."""
LONGEST_REQUEST_S = 30.0
SHORTEST_REQUEST_S, FEWEST_REQUESTS = 1.0, 4
"""How long an answer may take: a server that is silent is asked at least so often within the limit of time."""
_WARN_EVERY_S = 10.0
_FINAL_ERRORS = (errno.EINVAL, errno.EPERM, errno.ENAMETOOLONG)
_PASSING_STATUSES = (408, 425, 429)  # of HTTP: a timeout, too early, too many requests
_MISUSES = (ValueError, TypeError, ImportError, NotImplementedError, AttributeError)


@dataclass(frozen=True)
class Fetching:
    """How object stores are read; nothing of it matters for files of this machine."""

    cache_dir: Path = field(default_factory=lambda: Path(tempfile.gettempdir()) / f"blt_titan-{os.getuid()}")
    """Where what was fetched is kept, for all processes of the machine."""
    cache_bytes: int = 8 * 1024**3
    """The most that it takes."""
    timeout_s: float = 300.0
    """How long a request is made again and again, its last try included."""


class RemoteFolder:
    """A folder of an object store; a process that it is pickled or forked to connects anew.

    Threads may share it.
    """

    def __init__(self, place: Address, fetching: Fetching):
        self.place = place
        self.fetching = fetching
        self.cache = DiskCache(fetching.cache_dir, fetching.cache_bytes)
        self._connection: tuple[int, Any, str] | None = None
        self._warned_at = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_connection": None}

    def __truediv__(self, name: str) -> "RemoteFolder":
        return RemoteFolder(self.place / name, self.fetching)

    def read(self, name: str) -> bytes:
        """Return a file as it is now."""
        return self._fetch(name, None, None)

    def size(self, name: str) -> int:
        """Return the bytes of a file, as they were when the folder was first asked for one."""
        if name not in self._sizes:
            raise FileNotFoundError(errno.ENOENT, "no such object", str(self.place / name))
        found = self._sizes[name]
        if found is None:  # as listings of the web have it
            found = self._try(name, lambda fs, root: _asked(fs, "info", f"{root}/{name}"))["size"]
        return int(found)

    def folders(self) -> list[str]:
        """Name the folders in this one; none if it is not there."""
        try:
            listed = self._try("", lambda fs, root: _asked(fs, "ls", root, detail=True))
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rstrip("/").rpartition("/")[2] for entry in listed if entry["type"] == "directory")

    def read_index(self, name: str, sha256: str) -> bytes:
        """Return a file that is known by its digest."""
        key = self._key(name, sha256)
        return self._cached(
            key, partial(self._fetch, name, None, None), lambda c: hashlib.sha256(c).hexdigest() == sha256
        )

    def open(self, name: str) -> "RemoteFile":
        """Return a file; nothing is fetched."""
        return RemoteFile(self, name, self.size(name))

    def message(self, name: str, offset: int, length: int, crc32: int) -> bytes:
        """Return a part of a file."""
        key = self._key(name, f"{offset} {length} {crc32:08x}")
        fetch = partial(self._fetch, name, offset, offset + length)
        return self._cached(key, fetch, lambda content: zlib.crc32(content) == crc32)

    def _key(self, name: str, what: str) -> str:
        return hashlib.sha256(f"{self.place / name}\n{what}".encode()).hexdigest()

    def _cached(self, key: str, fetch: Callable[[], bytes], is_sound: Callable[[bytes], bool]) -> bytes:
        """Return what the cache has, or else fetch it; what comes damaged is fetched once more, then returned so."""
        kept = self.cache.get(key)
        if kept is not None and is_sound(kept):
            count(cache_hits=1)
            return kept
        with self.cache.alone(key, Wait("another process, which fetches the same,")):
            # Another process may have had the lock, and fetched it.
            kept = self.cache.get(key)
            if kept is not None and is_sound(kept):
                count(cache_hits=1)
                return kept
            self.cache.drop(key)
            content = fetch()
            if not is_sound(content):
                content = fetch()
            if is_sound(content):
                self.cache.put(key, content)
            return content

    def _fetch(self, name: str, begin: int | None, end: int | None) -> bytes:
        content = self._try(name, lambda fs, root: _asked(fs, "cat_file", f"{root}/{name}", start=begin, end=end))
        count(requests=1, fetched_bytes=len(content))
        return content

    @cached_property
    def _sizes(self) -> dict[str, int | None]:
        """Bytes of the files in this folder, from one listing."""
        listed = self._try("", lambda fs, root: _asked(fs, "ls", root, detail=True))
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in listed if entry["type"] == "file"}

    @property
    def _request_s(self) -> float:
        return min(LONGEST_REQUEST_S, self.fetching.timeout_s / FEWEST_REQUESTS)

    def _connected(self) -> tuple[Any, str]:
        # fsspec's loop is a thread, which a fork leaves behind.
        if self._connection is None or self._connection[0] != os.getpid():
            fs, root = file_system(self.place.url, **_options(self.place.url))
            if _is_s3(self.place.url):
                fs.retries = 1  # ours are counted, and end
            self._connection = (os.getpid(), fs, root.rstrip("/"))
        return self._connection[1:]

    def _try(self, name: str, ask: Callable[[Any, str], "Future[T]"]) -> T:
        """Ask with the file system and the folder's path in it, again and again while what fails may pass.

        Raises:
            FileNotFoundError: there is no such object, or no such bucket.
            UnreachableError: it may not be read, or could not be for `timeout_s`.
        """
        where = self.place / name if name else self.place
        with Wait(str(where)) as waiting:
            pause = FIRST_PAUSE_S
            while True:
                try:
                    left_s = self.fetching.timeout_s - waiting.seconds
                    seconds = max(SHORTEST_REQUEST_S, min(self._request_s, left_s))
                    return _answer(ask(*self._connected()), waiting, seconds)
                except DataError:
                    raise
                except FileNotFoundError as error:
                    raise FileNotFoundError(errno.ENOENT, f"no such object ({_said(error)})", str(where)) from error
                except Exception as error:
                    self._pause(where, waiting, pause * random.uniform(0.5, 1.5), error)
                    pause = min(2 * pause, LONGEST_PAUSE_S)

    def _pause(self, where: Address, waiting: Wait, pause_s: float, error: Exception) -> None:
        """Wait before what failed is tried again.

        Raises:
            UnreachableError: it will not pass, or there is no time left.
        """
        if (reason := _why_final(error)) is not None:
            raise UnreachableError(f"{where}: {reason} ({_said(error)})") from error
        limit_s, waited_s = self.fetching.timeout_s, waiting.seconds
        if waited_s + pause_s > limit_s:
            raise UnreachableError(
                f"{where}: cannot be read: tried {waiting.tries} times in {waited_s:.0f} s (data.fetch_timeout_s = "
                f"{limit_s:g}), the last time: {_said(error)}"
            ) from error
        self._warn(f"{where}: {_said(error)}; trying again, for {limit_s - waited_s:.0f} s at most")
        count(retries=1)
        waiting.tries, waiting.error = waiting.tries + 1, _said(error)
        waiting.sleep(pause_s)

    def _warn(self, sentence: str) -> None:
        """Log, but not of every thread and request while a store is away."""
        if time.monotonic() - self._warned_at > _WARN_EVERY_S:
            self._warned_at = time.monotonic()
            logger.warning(sentence)


@dataclass(frozen=True)
class RemoteFile:
    """A file of an object store, fetched part by part."""

    folder: RemoteFolder
    name: str
    size: int

    def message(self, offset: int, length: int, crc32: int) -> bytes:
        """Return a part.

        Raises:
            DataError: the object is gone, or the store cannot be reached.
        """
        try:
            return self.folder.message(self.name, offset, length, crc32)
        except FileNotFoundError as error:
            raise DataError(f"{error.filename}: {error.strerror}; restore it, or prepare the data again") from error


def _asked(fs: Any, verb: str, *args: Any, **options: Any) -> "Future[Any]":
    """Ask a driver for something; give what will hold its answer."""
    if fs.async_impl:
        return asyncio.run_coroutine_threadsafe(getattr(fs, f"_{verb}")(*args, **options), fs.loop)
    answer: Future[Any] = Future()
    answer.set_running_or_notify_cancel()  # nothing can stop it

    def ask() -> None:
        try:
            answer.set_result(getattr(fs, verb)(*args, **options))
        except BaseException as error:
            answer.set_exception(error)

    # One that never comes back is left to itself, and ends with the process.
    threading.Thread(target=ask, name="request", daemon=True).start()
    return answer


def _answer(asked: "Future[T]", waiting: Wait, seconds: float) -> T:
    """Wait for an answer.

    Raises:
        TimeoutError: there was none for so long.
        Exception: what the driver raised.
    """
    end = time.monotonic() + seconds
    while not wait_for([asked], min(BEAT_S, max(0.0, end - time.monotonic()))).done:
        if time.monotonic() >= end:
            asked.cancel()
            raise TimeoutError(f"no answer within {seconds:.1f} s")
        waiting.beat()
    return asked.result()


def _is_s3(url: str) -> bool:
    return url.startswith(("s3://", "s3a://"))


def _options(url: str) -> dict[str, Any]:
    """Return options of a driver: no retries of its own, which are neither counted nor bounded by our limit."""
    if _is_s3(url):
        return {"use_listings_cache": False, "config_kwargs": {"retries": {"total_max_attempts": 1}}}
    return {}


def _why_final(error: Exception) -> str | None:
    """Say why an error will not pass; None if it may."""
    if isinstance(error, TimeoutError | asyncio.TimeoutError | FutureTimeoutError):
        return None
    status = _http_status(error)
    if isinstance(error, PermissionError) or status in (401, 403):
        return "access is denied; check credentials and permissions"
    name = type(error).__name__  # of drivers, whose own classes cannot be imported here
    if "Credential" in name or "Token" in name or name == "ProfileNotFound":
        return "there are no credentials that can be used; set them as the driver expects them, such as AWS_PROFILE"
    is_refused = 400 <= status < 500 and status not in _PASSING_STATUSES
    if is_refused or (isinstance(error, OSError) and error.errno in _FINAL_ERRORS):
        return "the request is refused; the address is wrong, or a shorter object has taken this one's place"
    if "Validation" in name or "Region" in name or isinstance(error, _MISUSES):
        return "the driver cannot read it; check the address and the driver's settings"
    return None


def _http_status(error: Exception) -> int:
    """Return the status that a server answered with, wherever a driver's error has it; 0 if nowhere."""
    for holder in (error, getattr(error, "response", None)):
        for name in ("status", "status_code", "code"):  # `code` last: aiohttp warns of it
            if isinstance(status := getattr(holder, name, None), int):
                return status
    return 0


def _said(error: Exception) -> str:
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}"[:300] if said else type(error).__name__

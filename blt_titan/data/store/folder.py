"""The folder that a data set's files are read from: of this machine, or of an object store by its address.

Both answer the same questions, so that shards and sidecars are read, and checked, in one way.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blt_titan.data.store.address import Address, place_of
from blt_titan.data.store.arrow_file import map_file
from blt_titan.data.store.object_store import Fetching, RemoteFile, RemoteFolder


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine, or of a network file system that it sees."""

    place: Path

    def read(self, name: str) -> bytes:
        """Return a file."""
        return (self.place / name).read_bytes()

    def size(self, name: str) -> int:
        """Return the bytes of a file."""
        return (self.place / name).stat().st_size

    def read_index(self, name: str, sha256: str) -> bytes:
        """Return a file; whoever asks compares its digest."""
        return self.read(name)

    def open(self, name: str) -> "MappedFile":
        """Map a file."""
        return MappedFile(map_file(self.place / name))

    def __truediv__(self, name: str) -> "LocalFolder":
        return LocalFolder(self.place / name)


class MappedFile:
    """A file that is mapped into memory."""

    def __init__(self, content: Any):
        self.size: int = content.size
        self.content = content

    def message(self, offset: int, length: int, crc32: int) -> Any:
        """Return a part, a view."""
        return self.content.slice(offset, length)

    def is_between(self, magic: bytes) -> bool:
        """Tell whether the file begins and ends with some bytes."""
        n = len(magic)
        return self.size >= 2 * n + 4 and {
            bytes(self.content.slice(at, n)) for at in (0, self.size - n)
        } == {magic}  # fmt: skip


Content = MappedFile | RemoteFile
"""An open file. `message` returns a record batch's raw bytes. The checksum that it is given is for what may be tried
again, as a copy that was damaged on its way; whoever asks compares it."""

Folder = LocalFolder | RemoteFolder
"""Where files are read. OSError says that one is missing, or may not be read."""


def folder_of(name: str | os.PathLike[str] | Address, fetching: Fetching | None = None) -> Folder:
    """Return the folder that a path or a URL names."""
    place = place_of(name)
    if isinstance(place, Address):
        return RemoteFolder(place, fetching or Fetching())
    return LocalFolder(place)

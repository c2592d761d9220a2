"""Where a data set is written: a directory here, or a folder of an object store.

Finished shards, under temporary names in a working directory, are moved to their places, and the manifest is written
last, so that a folder that has one is complete. `manifest.json.installing` names the files while they are moved, and
`manifest.json.replaced` those of an old data set until they are removed: the next run then knows what an interrupted
one left.
"""

import errno
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from typing_extensions import override

from blt_titan.data.prepare.file_systems import file_system, is_remote
from blt_titan.data.store.atomic_file import write_atomically
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.manifest import MANIFEST_NAME, Manifest, ShardEntry, parse_manifest
from blt_titan.data.store.shards import ShardSet

_INSTALLING_NAME = f"{MANIFEST_NAME}.installing"
_REPLACED_NAME = f"{MANIFEST_NAME}.replaced"


class Destination(ABC):
    """A folder that shards go to. What differs is how files are reached."""

    name: str
    """As the user gave it."""

    def __str__(self) -> str:
        return self.name

    @abstractmethod
    def make(self) -> None:
        """Make the folder, if it is not there."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Return the bytes of a file; None if it is not there."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return the content of a file."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Write a small file, whole or not at all."""

    @abstractmethod
    def take(self, path: Path, name: str) -> None:
        """Move a file of this machine here."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    @abstractmethod
    def check_intact(self, manifest: Manifest) -> None:
        """Raise DataError if files of the manifest are missing or damaged; reads no text."""

    def read_manifest(self, name: str = MANIFEST_NAME) -> Manifest | None:
        """Return the manifest that is there, or None."""
        return parse_manifest(self.read(name), f"{self}/{name}") if self.size(name) is not None else None

    def finish_removal(self) -> None:
        """Remove what a manifest named that has been replaced; an interrupted run may have left it."""
        if old := self.read_manifest(_REPLACED_NAME):
            new = self.read_manifest()
            for name in old.file_names() - (new.file_names() if new else set()):
                self.remove(name)
            self.remove(_REPLACED_NAME)

    def installing(self) -> set[str]:
        """Name the files that an interrupted run was moving into place."""
        manifest = self.read_manifest(_INSTALLING_NAME)
        return manifest.file_names() if manifest else set()

    def discard_installing(self, existing: Manifest | None) -> None:
        """Remove what an interrupted run had moved into place; it will not be continued."""
        for name in self.installing() - (existing.file_names() if existing else set()):
            self.remove(name)
        self.remove(_INSTALLING_NAME)

    def install(self, moves: Mapping[str, Path], manifest: Manifest, existing: Manifest | None) -> None:
        """Move files into place, then the manifest, then remove what only the old manifest named.

        Args:
            moves: where each file of the manifest is now; one that is gone from there was moved before.
            manifest: the new one.
            existing: the one that it replaces.

        Raises:
            DataError: a file that was moved before is not there.
        """
        for entry in (entry for shards in manifest.splits.values() for entry in shards):
            if not moves[entry.file].exists() and self.size(entry.file) != entry.file_bytes:
                raise DataError(
                    f"{self}/{entry.file}: was moved there by a run that was interrupted, and is gone or changed; "
                    f"remove {moves[entry.file].parent.parent.parent} and start again"
                )
        self.write(_INSTALLING_NAME, manifest.to_json().encode())
        for name, path in moves.items():
            if path.exists():
                self.take(path, name)
        if existing is not None:
            self.write(_REPLACED_NAME, existing.to_json().encode())
        self.write(MANIFEST_NAME, manifest.to_json().encode())
        self.remove(_INSTALLING_NAME)
        self.finish_removal()


class LocalDestination(Destination):
    """A directory of this machine, or of a network file system that it sees."""

    def __init__(self, out: str):
        self.name = out
        self.directory = Path(out)

    @override
    def make(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)

    @override
    def size(self, name: str) -> int | None:
        path = self.directory / name
        return path.stat().st_size if path.exists() else None

    @override
    def read(self, name: str) -> bytes:
        return (self.directory / name).read_bytes()

    @override
    def write(self, name: str, content: bytes) -> None:
        write_atomically(self.directory / name, content, temporary=self.directory / f"{name}.partial")

    @override
    def take(self, path: Path, name: str) -> None:
        target = self.directory / name
        try:
            os.replace(path, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            # The working directory is on another disk. `write_atomically` would hold it all in memory.
            between = target.with_name(f"{name}.partial")
            with open(path, "rb") as source, open(between, "wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 24)
                copy.flush()
                os.fsync(copy.fileno())
            os.replace(between, target)
            path.unlink()

    @override
    def remove(self, name: str) -> None:
        for each in (name, f"{name}.partial"):
            (self.directory / each).unlink(missing_ok=True)

    @override
    def check_intact(self, manifest: Manifest) -> None:
        for split, shards in manifest.splits.items():
            if shards:
                ShardSet(self.directory, split).verify_structure()


class RemoteDestination(Destination):
    """A folder that an fsspec file system reaches."""

    def __init__(self, url: str):
        self.name = url.rstrip("/")
        self._fs, self._root = file_system(self.name)

    @override
    def make(self) -> None:
        self._fs.makedirs(self._root, exist_ok=True)

    @override
    def size(self, name: str) -> int | None:
        try:
            return int(self._fs.info(f"{self._root}/{name}")["size"])
        except FileNotFoundError:
            return None

    @override
    def read(self, name: str) -> bytes:
        return self._fs.cat_file(f"{self._root}/{name}")

    @override
    def write(self, name: str, content: bytes) -> None:
        self._fs.pipe_file(f"{self._root}/{name}", content)

    @override
    def take(self, path: Path, name: str) -> None:
        self._fs.put_file(str(path), f"{self._root}/{name}")
        path.unlink()

    @override
    def remove(self, name: str) -> None:
        if self.size(name) is not None:
            self._fs.rm_file(f"{self._root}/{name}")

    @override
    def check_intact(self, manifest: Manifest) -> None:
        stored = {path.rpartition("/")[2]: info for path, info in self._fs.find(self._root, detail=True).items()}
        for entry in (entry for shards in manifest.splits.values() for entry in shards):
            found = stored.get(entry.file, {}).get("size")
            if found != entry.file_bytes or entry.index_file not in stored:
                there_is = "no such file" if found is None else f"{found} bytes"
                raise DataError(
                    f"{self}/{entry.file}: {there_is}, {MANIFEST_NAME} says {entry.file_bytes} and an index; "
                    "restore it, or prepare the data again"
                )


def destination(out: str | os.PathLike[str]) -> Destination:
    """Return the destination that a directory or a URL names.

    Raises:
        DataError: the URL's driver is unknown or not installed.
    """
    name = os.fspath(out)
    return RemoteDestination(name) if is_remote(name) else LocalDestination(name)


def fetch_shard(url: str, entry: ShardEntry, folder: Path) -> None:
    """Copy a shard and its index from a remote data set into a folder."""
    fs, root = file_system(url.rstrip("/"))
    for name in (entry.file, entry.index_file):
        fs.get_file(f"{root}/{name}", str(folder / name))

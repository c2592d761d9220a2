"""Where a data set is written: a directory here, or a folder of an object store.

Finished shards, under temporary names in a working directory, are moved to their places, and the manifest is written
last, so that a folder that has one is complete. `manifest.json.installing` names the files while they are moved: the
next run then knows which ones an interrupted one left.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blt_titan.data.errors import DataError
from blt_titan.data.manifest import MANIFEST_NAME, Manifest, parse_manifest, read_manifest, write_manifest
from blt_titan.data.shards import ShardSet
from blt_titan.data.sources import file_system, is_remote

_INSTALLING_NAME = f"{MANIFEST_NAME}.installing"


class LocalDestination:
    """A directory of this machine, or of a network file system that it sees."""

    def __init__(self, out: str):
        self.directory = Path(out)

    def __str__(self) -> str:
        return str(self.directory)

    def read_manifest(self) -> Manifest | None:
        """Return the manifest that is there, or None."""
        return read_manifest(self.directory) if (self.directory / MANIFEST_NAME).exists() else None

    def check_intact(self, manifest: Manifest) -> None:
        """Raise DataError if files of the manifest are missing or damaged; reads no text."""
        for split, shards in manifest.splits.items():
            if shards:
                ShardSet(self.directory, split).verify_structure()

    def make(self) -> None:
        """Make the directory, if it is not there."""
        self.directory.mkdir(parents=True, exist_ok=True)

    def installing(self) -> set[str]:
        """Name the files that an interrupted run was moving into place."""
        if not (self.directory / _INSTALLING_NAME).exists():
            return set()
        return read_manifest(self.directory, _INSTALLING_NAME).file_names()

    def discard_installing(self, existing: Manifest | None) -> None:
        """Remove what an interrupted run had moved into place; it will not be gone on with."""
        for name in self.installing() - (existing.file_names() if existing else set()):
            (self.directory / name).unlink(missing_ok=True)
        for name in (_INSTALLING_NAME, f"{_INSTALLING_NAME}.partial"):
            (self.directory / name).unlink(missing_ok=True)

    def exists(self, name: str) -> bool:
        """Tell whether there is such a file."""
        return (self.directory / name).exists()

    def install(self, moves: dict[str, Path], manifest: Manifest, existing: Manifest | None) -> None:
        """Move files into place, then the manifest, then remove what only the old manifest named.

        Args:
            moves: where each file of the manifest is now; one that is gone from there was moved before.
            manifest: the new one.
            existing: the one that it replaces.
        """
        write_manifest(self.directory, manifest, _INSTALLING_NAME)
        for name, path in moves.items():
            if path.exists():
                _move(path, self.directory / name)
        os.replace(self.directory / _INSTALLING_NAME, self.directory / MANIFEST_NAME)
        for name in (existing.file_names() if existing else set()) - manifest.file_names():
            (self.directory / name).unlink(missing_ok=True)


@dataclass
class RemoteDestination:
    """A folder that an fsspec file system reaches."""

    url: str

    def __post_init__(self):
        self.url = self.url.rstrip("/")
        self._fs, self._root = file_system(self.url)

    def __str__(self) -> str:
        return self.url

    def read_manifest(self) -> Manifest | None:
        """Return the manifest that is there, or None."""
        path = f"{self._root}/{MANIFEST_NAME}"
        if not self._fs.exists(path):
            return None
        return parse_manifest(self._fs.cat_file(path), f"{self.url}/{MANIFEST_NAME}")

    def check_intact(self, manifest: Manifest) -> None:
        """Raise DataError if shards of the manifest are missing or not of their size."""
        there = {path.rpartition("/")[2]: info for path, info in self._fs.find(self._root, detail=True).items()}
        for entry in (entry for shards in manifest.splits.values() for entry in shards):
            found = there.get(entry.file, {}).get("size")
            if found != entry.file_bytes or entry.index_file not in there:
                there_is = "no such file" if found is None else f"{found} bytes"
                raise DataError(
                    f"{self.url}/{entry.file}: {there_is}, {MANIFEST_NAME} says {entry.file_bytes} and an index; "
                    "restore it, or prepare the data again"
                )

    def make(self) -> None:
        """Make the folder, where the store has such a thing."""
        self._fs.makedirs(self._root, exist_ok=True)

    def installing(self) -> set[str]:
        """Name the files that an interrupted run was sending."""
        path = f"{self._root}/{_INSTALLING_NAME}"
        if not self._fs.exists(path):
            return set()
        return parse_manifest(self._fs.cat_file(path), f"{self.url}/{_INSTALLING_NAME}").file_names()

    def discard_installing(self, existing: Manifest | None) -> None:
        """Remove what an interrupted run had sent; it will not be gone on with."""
        for name in self.installing() - (existing.file_names() if existing else set()):
            if self.exists(name):
                self._fs.rm_file(f"{self._root}/{name}")
        if self.exists(_INSTALLING_NAME):
            self._fs.rm_file(f"{self._root}/{_INSTALLING_NAME}")

    def exists(self, name: str) -> bool:
        """Tell whether there is such a file."""
        return self._fs.exists(f"{self._root}/{name}")

    def install(self, moves: dict[str, Path], manifest: Manifest, existing: Manifest | None) -> None:
        """Send files, then the manifest, then remove what only the old manifest named; see LocalDestination."""
        self._fs.pipe_file(f"{self._root}/{_INSTALLING_NAME}", manifest.to_json().encode())
        for name, path in moves.items():
            if path.exists():
                self._fs.put_file(str(path), f"{self._root}/{name}")
                # Marks it as sent, too.
                path.unlink()
        self._fs.pipe_file(f"{self._root}/{MANIFEST_NAME}", manifest.to_json().encode())
        self._fs.rm_file(f"{self._root}/{_INSTALLING_NAME}")
        for name in (existing.file_names() if existing else set()) - manifest.file_names():
            self._fs.rm_file(f"{self._root}/{name}")


Destination = LocalDestination | RemoteDestination


def destination(out: str | os.PathLike[str]) -> Destination:
    """Return the destination that a directory or a URL names.

    Raises:
        DataError: the URL's driver is unknown or not installed.
    """
    name = os.fspath(out)
    return RemoteDestination(name) if is_remote(name) else LocalDestination(name)


def fetch_shard(url: str, entry: Any, folder: Path) -> None:
    """Copy a shard and its index from a remote data set into a folder."""
    fs, root = file_system(url.rstrip("/"))
    for name in (entry.file, entry.index_file):
        fs.get_file(f"{root}/{name}", str(folder / name))


def _move(path: Path, target: Path) -> None:
    try:
        os.replace(path, target)
    except OSError:
        if path.stat().st_dev == target.parent.stat().st_dev:
            raise
        # The working directory is on another disk.
        between = target.with_name(f"{target.name}.partial")
        with open(path, "rb") as source, open(between, "wb") as copy:
            while piece := source.read(1 << 24):
                copy.write(piece)
            copy.flush()
            os.fsync(copy.fileno())
        os.replace(between, target)
        path.unlink()

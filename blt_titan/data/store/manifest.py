"""`manifest.json`: what a directory of byte shards holds, and which files those are.

In goes a directory, out comes a `Manifest`. The manifest is written last and in one step, so a directory that
has one is complete. It carries the digest of every shard's index, and each index carries a checksum of every
record batch: three small steps from one file to every byte, none of which needs to read whole shards at
start-up.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from blt_titan.data.store.address import Address
from blt_titan.data.store.atomic_file import write_atomically
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.folder import Folder, LocalFolder, RemoteFolder, folder_of
from blt_titan.data.store.names import is_plain

FORMAT = "blt_titan.byte_shards"
VERSION = 1
MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "validation")


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard as the manifest names it; file names are relative to the manifest's directory."""

    file: str
    index_file: str
    index_sha256: str
    file_bytes: int
    record_batches: int
    documents: int
    text_bytes: int


@dataclass(frozen=True, slots=True)
class Counts:
    """What was written over all splits, and what was not."""

    documents: int
    text_bytes: int
    empty_documents_left_out: int
    binary_files_left_out: int
    documents_over_max_bytes: int
    skipped_records: int = 0
    dangling_links: int = 0
    link_cycles: int = 0
    directory_links: int = 0
    """Links to directories, which are not followed."""
    repeated_files: int = 0
    """Further names of files that were taken."""
    archives: int = 0
    """Files packed in a way that is not read."""


@dataclass(frozen=True, slots=True)
class SourceCounts:
    """What one source held, before `max_bytes` chose."""

    source: str
    documents: int
    text_bytes: int
    empty_documents: int
    binary_files: int
    skipped_records: int
    revision: str = ""
    """Commit of a data set of the hub."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A complete directory of shards.

    `settings` is what the data was made with: sources, seed, validation_fraction, max_bytes, record_batch_bytes,
    shard_bytes, text_column, on_error. `skipped` says of the first records that could not be used, and of the
    first links and archives that were passed over, what and where.
    """

    settings: Mapping[str, Any]
    counts: Counts
    splits: Mapping[str, tuple[ShardEntry, ...]]
    sources: tuple[SourceCounts, ...] = ()
    skipped: tuple[str, ...] = ()

    def file_names(self) -> set[str]:
        """Name every shard and index file of every split."""
        return {name for shards in self.splits.values() for s in shards for name in (s.file, s.index_file)}

    def to_json(self) -> str:
        """Give the text of `manifest.json`."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "settings": dict(self.settings),
            "counts": asdict(self.counts),
            "sources": [asdict(source) for source in self.sources],
            "skipped": list(self.skipped),
            "splits": {split: [asdict(shard) for shard in shards] for split, shards in self.splits.items()},
        }
        return json.dumps(content, indent=2) + "\n"


def read_manifest(directory: str | os.PathLike[str] | Address | Folder, name: str = MANIFEST_NAME) -> Manifest:
    """Read and check the manifest of a directory, here or at an address.

    Raises:
        DataError: it is missing, is not JSON, is of another format or version, or has a field missing or malformed.
    """
    folder = directory if isinstance(directory, LocalFolder | RemoteFolder) else folder_of(directory)
    path = folder.place / name
    try:
        written = folder.read(name)
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such {'file' if isinstance(folder, LocalFolder) else 'object'}, so {folder.place} is not a "
            "finished data set; make one with `blt-titan prepare`"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    return parse_manifest(written, str(path))


def parse_manifest(written: bytes, path: str) -> Manifest:
    """Check the content of a `manifest.json`; `path` is for messages. Raises as `read_manifest`."""
    try:
        content = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON ({error}); prepare the data again") from error
    found = (content.get("format"), content.get("version")) if isinstance(content, dict) else (None, None)
    if found != (FORMAT, VERSION):
        raise DataError(
            f"{path}: format {found[0]!r} version {found[1]!r} is unknown; this code reads {FORMAT!r} "
            f"version {VERSION}: use the code that wrote it, or prepare the data again"
        )
    try:
        splits = {split: tuple(_shard_entry(shard) for shard in content["splits"][split]) for split in SPLITS}
        manifest = Manifest(
            _mapping(content["settings"]),
            _counts(content["counts"]),
            splits,
            tuple(_source_counts(source) for source in content.get("sources", ())),
            tuple(map(str, content.get("skipped", ()))),
        )
        _check_consistent(manifest)
        return manifest
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: malformed ({error!r}); prepare the data again") from error


def write_manifest(directory: str | os.PathLike[str], manifest: Manifest, name: str = MANIFEST_NAME) -> None:
    """Write a manifest in one step: the file is there whole, or not at all."""
    write_atomically(Path(directory) / name, manifest.to_json().encode())


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, got {value!r}")
    return value


def _counts(value: Any) -> Counts:
    counts = Counts(**_mapping(value))
    for field in fields(counts):
        check_whole_number(field.name, getattr(counts, field.name), minimum=0)
    return counts


def _source_counts(value: Any) -> SourceCounts:
    counts = SourceCounts(**_mapping(value))
    for field in fields(counts):
        found = getattr(counts, field.name)
        if field.name not in ("source", "revision"):
            check_whole_number(field.name, found, minimum=0)
        elif not isinstance(found, str):
            raise TypeError(f"{field.name} must be a string, got {found!r}")
    return counts


def _shard_entry(value: Any) -> ShardEntry:
    shard = ShardEntry(**_mapping(value))
    for key in ("file", "index_file"):
        check_file_name(key, getattr(shard, key))
    if not isinstance(shard.index_sha256, str):
        raise TypeError(f"index_sha256 must be a string, got {shard.index_sha256!r}")
    for key in ("file_bytes", "record_batches", "documents"):
        check_whole_number(key, getattr(shard, key), minimum=1)
    check_whole_number("text_bytes", shard.text_bytes, minimum=0)
    for key in ("record_batches", "documents", "text_bytes"):
        if (found := getattr(shard, key)) > shard.file_bytes:
            raise ValueError(f"{key} must be at most file_bytes, {shard.file_bytes}, got {found}")
    return shard


def _check_consistent(manifest: Manifest) -> None:
    if not isinstance(manifest.settings.get("sources", []), list):
        raise TypeError(f"sources must be a list, got {manifest.settings['sources']!r}")
    shards = [shard for of_split in manifest.splits.values() for shard in of_split]
    if len(manifest.file_names()) != 2 * len(shards):
        raise ValueError("a file is named twice")
    for key in ("documents", "text_bytes"):
        of_shards, counted = sum(getattr(shard, key) for shard in shards), getattr(manifest.counts, key)
        if of_shards != counted:
            raise ValueError(f"counts say {counted} {key}, the shards' own come to {of_shards}")


def check_file_name(key: str, value: Any) -> None:
    """Raise ValueError unless `value` is a plain file name, which leads no reader and no overwrite elsewhere."""
    if not is_plain(value):
        raise ValueError(f"{key} must be a plain file name, got {value!r}")


def check_whole_number(key: str, value: Any, *, minimum: int) -> None:
    """Raise ValueError unless `value` is an int of at least `minimum`."""
    if type(value) is not int or value < minimum:
        raise ValueError(f"{key} must be a whole number of at least {minimum}, got {value!r}")

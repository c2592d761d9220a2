r"""Where documents come from: files, trees and patterns, here or on an object store, and data sets of the hub.

In go source names as a user types them, out come *extents*: stretches of files that one worker reads in one go
(`formats.py`). No text is held, and nothing for each document but where it is a file of its own, so a source may be of
any size.

    a directory      notes/a.txt               -> one extent, document "notes/a.txt"
                     crawl.jsonl.gz            -> one extent, documents "crawl.jsonl.gz#L1", "...#L2", ...
    a large file     crawl.jsonl, 600 MiB      -> three extents of whole lines, read side by side
    "hf:c4:en"                                 -> an extent for each file of the data set
    two sources      wiki/ and code/           -> documents "wiki/notes/a.txt", "code/..."
"""

import glob
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import fsspec.core
import pyarrow as pa
import pyarrow.parquet as pq

from blt_titan.data.errors import DataError

PYTHON_STDLIB = "python-stdlib"
HUB_PREFIX = "hf:"
HUB_PRESETS = {
    "fineweb_edu": "hf:HuggingFaceFW/fineweb-edu:default:train",
    "fineweb_edu_10bt": "hf:HuggingFaceFW/fineweb-edu:sample-10BT:train",
    "dclm_baseline_1.0": "hf:mlfoundations/dclm-baseline-1.0:default:train",
}
SPLIT_BYTES = 128 * 1024**2
"""Files here that are larger are read as several extents, if they are lines or Parquet."""
UNIT_BYTES = 128 * 1024**2
"""Smaller extents are read together."""
_LEAST_COST_BYTES = 4096
"""What opening a file costs, in bytes that could be read meanwhile."""
_STDLIB_LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__"})
_UNREADABLE = (".gz", ".zst", ".bz2", ".xz", ".zip", ".tar", ".7z")
_LINES = re.compile(r"\.(jsonl|ndjson)$|\.(jsonl|ndjson|json)\.(gz|zst)$", re.IGNORECASE)

NOT_COUNTED = -1

Format = Literal["text", "lines", "parquet", "arrow", "hub"]


@dataclass(frozen=True, slots=True)
class Source:
    """One source: `label` names it in document ids, `setting` in the manifest."""

    label: str
    setting: str
    kind: Literal["stdlib", "tree", "file", "pattern", "hub"]
    root: str
    """What paths are relative to: a directory, the file itself, or the data set's name; a URL where it is not here."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A stretch of one file, or of one data set of the hub, that one worker reads."""

    source: int
    """Number of the source."""
    format: Format
    path: str
    doc_id: str
    """Of a text; the beginning of the ids of records."""
    size_bytes: int = 0
    """As it is stored, for progress; 0 if unknown."""
    file_bytes: int = -1
    """Of the whole file when it was listed; -1 if unknown."""
    modified: str = ""
    """When the file was last changed, as its file system says it. Hub: the commit."""
    begin: int = 0
    """Lines: the byte where it begins. Parquet: the first row group. Hub: which shard."""
    end: int = -1
    """Of the same, where it ends; -1 for the end of the file. Hub: how many shards."""
    first: int = 0
    """Lines: newlines before `begin`, NOT_COUNTED at first. Parquet: rows before it."""
    keep_binary: bool = True
    """Take a text that does not look like one."""


def resolve_sources(names: Sequence[str | os.PathLike[str]]) -> list[Source]:
    """Turn what the user typed into sources.

    Raises:
        DataError: none is given, one is given twice, does not exist, or is of a kind that is not read.
    """
    if not names:
        raise DataError(f"no source given; name a directory, a file, a pattern, hf:NAME, or {PYTHON_STDLIB}")
    sources = [_resolve(os.fspath(name)) for name in names]
    settings = [source.setting for source in sources]
    for source in sources:
        if settings.count(source.setting) > 1:
            raise DataError(f"{source.setting}: the source is given twice; name it once")
    # Two sources of one name are told apart by their whole names.
    labels = [source.label for source in sources]
    return [
        source if labels.count(source.label) == 1 else Source(source.setting, source.setting, source.kind, source.root)
        for source in sources
    ]


def list_extents(sources: Sequence[Source], revisions: dict[str, str] | None = None) -> list[Extent]:
    """List the extents of all sources, in an order that depends on the names alone.

    A directory is walked in sorted order: every regular file, except hidden files and directories. Links to files are
    followed, links to directories are not.

    Args:
        sources: from `resolve_sources`.
        revisions: commits of data sets of the hub, by root; those that are not there are asked for, and put there.

    Raises:
        DataError: a file or directory cannot be read, or a pattern fits nothing.
    """
    revisions = {} if revisions is None else revisions
    extents: list[Extent] = []
    for number, source in enumerate(sources):
        prefix = f"{source.label}/" if len(sources) > 1 else ""
        if source.kind == "hub" and source.root not in revisions:
            revisions[source.root] = _newest_revision(source.root)
        found = list(_extents(number, source, prefix, revisions.get(source.root, "")))
        if not found:
            raise DataError(f"{source.setting}: no documents: it holds no file that could be read")
        extents += found
    return extents


def group(extents: Sequence[Extent]) -> list[list[Extent]]:
    """Put small neighbours together: the units of work, each of about UNIT_BYTES or one extent."""
    units: list[list[Extent]] = []
    held = UNIT_BYTES
    for extent in extents:
        # What is unknown may be large.
        size = max(extent.size_bytes, _LEAST_COST_BYTES) if extent.file_bytes >= 0 else UNIT_BYTES
        if held + size > UNIT_BYTES:
            units.append([])
            held = 0
        units[-1].append(extent)
        held += size
    return units


def open_binary(path: str) -> Any:
    """Open a file for reading, here or wherever its URL says."""
    if not is_remote(path):
        return open(path, "rb")
    fs, inner = file_system(path)
    return fs.open(inner, "rb")


def is_remote(name: str) -> bool:
    """Tell whether a name is a URL of an fsspec file system, as in s3://bucket/folder."""
    return "://" in name


def file_system(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it.

    Raises:
        DataError: its driver is unknown or not installed.
    """
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: {error}") from error


def cannot_read(path: str, error: OSError) -> DataError:
    """Say in a sentence that a file cannot be read."""
    return DataError(f"{path}: cannot be read ({error.strerror or error}); check the path and its permissions")


@cache
def hub_dataset(source_root: str, revision: str) -> Any:
    """Open a data set of the hub, NAME[:CONFIG][:SPLIT], for streaming; once in a process.

    Raises:
        DataError: it cannot be had; says why.
    """
    # A second to import, and not needed for files.
    from datasets import load_dataset

    name, _, rest = source_root.partition(":")
    config, _, split = rest.partition(":")
    try:
        return load_dataset(name, config or None, split=split or "train", streaming=True, revision=revision or None)
    except Exception as error:  # the library lets through what its many parts raise
        raise _cannot_open(f"hf:{source_root}", error) from error


def _newest_revision(source_root: str) -> str:
    """Return the commit that a data set of the hub is at; of a directory here there is none."""
    name = source_root.partition(":")[0]
    if os.path.isdir(name):
        return ""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name).sha or ""
    except Exception as error:  # of the network, of permissions, of the name
        raise _cannot_open(f"hf:{source_root}", error) from error


def _cannot_open(name: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split())
    return DataError(f"{name}: cannot be opened ({type(error).__name__}: {reason}); check the name and the network")


def _resolve(name: str) -> Source:
    if name == PYTHON_STDLIB:
        return Source(name, name, "stdlib", sysconfig.get_path("stdlib"))
    if name in HUB_PRESETS or name.startswith(HUB_PREFIX):
        return _resolve_hub(name)
    if is_remote(name):
        return _resolve_remote(name)
    root = Path(os.path.abspath(name))
    if root.is_dir():
        return Source(printable(root.name), printable(str(root)), "tree", str(root))
    if root.is_file():
        if _format(root.name) == "text" and root.suffix.lower() in _UNREADABLE:
            raise DataError(
                f"{name}: {root.suffix} files of this kind are not read; unpack it, or convert it to .jsonl"
            )
        return Source(printable(root.name), printable(str(root)), "file", str(root))
    if glob.has_magic(name):
        return Source(printable(str(root)), printable(str(root)), "pattern", str(root))
    raise DataError(
        f"{name}: no such file or directory; name one that exists, a pattern, hf:NAME, {', '.join(HUB_PRESETS)} "
        f"or {PYTHON_STDLIB}"
    )


def _resolve_hub(name: str) -> Source:
    setting = HUB_PRESETS.get(name, name)
    root = setting.removeprefix(HUB_PREFIX)
    if not re.fullmatch(r"[^:]+(:[^:]*){0,2}", root):
        raise DataError(f"{name}: a data set of the hub is hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
    return Source(root.partition(":")[0], setting, "hub", root)


def _resolve_remote(name: str) -> Source:
    fs, path = file_system(name)
    name = name.rstrip("/")
    try:
        if glob.has_magic(path):
            return Source(name, name, "pattern", name)
        if not fs.exists(path):
            raise DataError(f"{name}: no such file or directory there; check the address and its permissions")
        return Source(name.rpartition("/")[2], name, "tree" if fs.isdir(path) else "file", name)
    except Exception as error:  # drivers have exceptions of their own
        raise _cannot_open(name, error) from error


def _extents(number: int, source: Source, prefix: str, revision: str) -> Iterator[Extent]:
    if source.kind == "hub":
        n_shards = hub_dataset(source.root, revision).num_shards
        for shard in range(n_shards):
            doc_id = f"{source.label}#{shard}"
            yield Extent(number, "hub", source.root, doc_id, modified=revision, begin=shard, end=n_shards)
        return
    if source.kind == "file":
        # A file's label is its name already.
        found = [_listed(source.root, source.label)]
    elif is_remote(source.root):
        found = _remote_files(source, prefix)
    else:
        found = _local_files(source, prefix)
    for path, doc_id, size_bytes, modified in found:
        explicit = source.kind == "file" or path.lower().endswith(".txt")
        whole = Extent(number, _format(path), path, doc_id, size_bytes, size_bytes, modified, keep_binary=explicit)
        yield from _split(whole)


def _listed(path: str, doc_id: str) -> tuple[str, str, int, str]:
    if is_remote(path):
        fs, inner = file_system(path)
        try:
            info = fs.info(inner)
        except Exception as error:  # drivers have exceptions of their own
            raise _cannot_open(path, error) from error
        return path, doc_id, int(info.get("size") or 0), _modified(info)
    try:
        status = os.stat(path)
    except OSError as error:
        raise cannot_read(path, error) from error
    return path, doc_id, status.st_size, str(status.st_mtime_ns)


def _local_files(source: Source, prefix: str) -> Iterator[tuple[str, str, int, str]]:
    if source.kind == "pattern":
        root = _fixed_part(source.root)
        paths = sorted(path for path in glob.iglob(source.root, recursive=True) if os.path.isfile(path))
    else:
        root = source.root
        stdlib = source.kind == "stdlib"
        walked = _walk(root, _STDLIB_LEFT_OUT if stdlib else frozenset())
        paths = (path for path in walked if not stdlib or path.endswith(".py"))
    for path in paths:
        yield _listed(path, prefix + printable(Path(path).relative_to(root).as_posix()))


def _remote_files(source: Source, prefix: str) -> Iterator[tuple[str, str, int, str]]:
    fs, inner = file_system(source.root)
    try:
        if source.kind == "pattern":
            root, found = _fixed_part(inner), fs.glob(inner, detail=True)
        else:
            root, found = inner, fs.find(inner, detail=True)
    except Exception as error:  # drivers have exceptions of their own
        raise _cannot_open(source.root, error) from error
    for path, info in sorted(found.items()):
        below = path.removeprefix(root).lstrip("/")
        if info["type"] == "file" and not any(part.startswith(".") for part in below.split("/")):
            yield fs.unstrip_protocol(path), prefix + below, int(info.get("size") or 0), _modified(info)


def _modified(info: dict[str, Any]) -> str:
    """Return what an object store says that changes with the content."""
    return str(
        next((info[key] for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created") if key in info), "")
    )


def _fixed_part(pattern: str) -> str:
    """Return the directory of a pattern before its first special character.

    >>> _fixed_part("/data/crawl-*/a.jsonl")
    '/data'
    """
    parts = pattern.split("/")
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:first]) or "/"


def _format(path: str) -> Format:
    if _LINES.search(path):
        return "lines"
    suffix = os.path.splitext(path)[1].lower()
    return "parquet" if suffix == ".parquet" else "arrow" if suffix in (".arrow", ".ipc", ".feather") else "text"


def _split(whole: Extent) -> Iterator[Extent]:
    """Cut a large file into extents; one that is elsewhere, or is compressed, is read as a whole."""
    if whole.size_bytes <= SPLIT_BYTES or is_remote(whole.path):
        yield whole
    elif whole.format == "lines" and not whole.path.lower().endswith((".gz", ".zst")):
        yield from _split_lines(whole)
    elif whole.format == "parquet":
        yield from _split_parquet(whole)
    else:
        yield whole


def _split_lines(whole: Extent) -> Iterator[Extent]:
    for begin in range(0, whole.size_bytes, SPLIT_BYTES):
        end = min(begin + SPLIT_BYTES, whole.size_bytes)
        first = NOT_COUNTED if begin else 0
        yield replace(whole, begin=begin, end=end, first=first, size_bytes=end - begin)


def _split_parquet(whole: Extent) -> Iterator[Extent]:
    try:
        metadata = pq.read_metadata(whole.path)
    except (pa.ArrowException, OSError):
        yield whole  # its reader will say what is wrong
        return
    begin = rows_before = size_bytes = rows = 0
    for number in range(metadata.num_row_groups):
        size_bytes += whole.size_bytes // metadata.num_row_groups
        rows += metadata.row_group(number).num_rows
        if size_bytes >= SPLIT_BYTES or number == metadata.num_row_groups - 1:
            yield replace(whole, begin=begin, end=number + 1, first=rows_before, size_bytes=size_bytes)
            begin, rows_before, size_bytes, rows = number + 1, rows_before + rows, 0, 0


def _walk(directory: str, left_out: frozenset[str]) -> Iterator[str]:
    """Yield the paths of regular files, sorted by name in each directory."""
    try:
        with os.scandir(directory) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise cannot_read(directory, error) from error
    for entry in entries:
        if entry.name.startswith(".") or entry.name in left_out:
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, left_out)
        elif entry.is_file():
            yield entry.path


def printable(name: str) -> str:
    """Give a file name as valid Unicode: a byte that is not UTF-8 becomes a backslash escape."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")

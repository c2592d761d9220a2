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
import stat
import sysconfig
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from blt_titan.data.prepare.compression import archive_suffix, compression_of
from blt_titan.data.prepare.extents import NOT_COUNTED, Extent, format_of, is_compressed
from blt_titan.data.prepare.file_systems import (
    cannot_open,
    cannot_read,
    file_system,
    is_remote,
    local_name,
    printable,
    without_query,
)
from blt_titan.data.prepare.listing import (
    Listed,
    fixed_part,
    is_pattern,
    local_files,
    look_at,
    remote_file,
    remote_files,
)
from blt_titan.data.store.errors import DataError

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


@dataclass(frozen=True, slots=True)
class Source:
    """One source: `label` names it in document ids, `setting` in the manifest."""

    label: str
    setting: str
    kind: Literal["stdlib", "tree", "file", "pattern", "hub"]
    root: str
    """What paths are relative to: a directory, the file itself, or the data set's name; a URL where it is not here."""


def resolve_sources(names: Sequence[str | os.PathLike[str]]) -> list[Source]:
    """Turn what the user typed into sources.

    Raises:
        DataError: none is given, one is given twice, does not exist, or is of a kind that is not read.
    """
    if not names:
        raise DataError(f"no source given; name a directory, a file, a pattern, hf:NAME, or {PYTHON_STDLIB}")
    sources = [_resolve(os.fspath(name)) for name in names]
    meant = [_meant(source) for source in sources]
    for source, name in zip(sources, meant, strict=True):
        if meant.count(name) > 1:
            raise DataError(f"{source.setting}: the source is given twice; name it once")
    # Two sources of one name are told apart by their whole names.
    labels = [source.label for source in sources]
    return [
        source if labels.count(source.label) == 1 else Source(source.setting, source.setting, source.kind, source.root)
        for source in sources
    ]


def list_extents(sources: Sequence[Source], revisions: dict[str, str] | None = None) -> list[Extent]:
    """List the extents of all sources, in an order that depends on the names alone.

    Trees and patterns follow one rule, which `listing.py` tells: each real file once. What is passed over, as a link
    that leads nowhere, is listed too, with the reason.

    Args:
        sources: from `resolve_sources`.
        revisions: commits of data sets of the hub, by root; those that are not there are asked for, and put there.

    Raises:
        DataError: a file or directory cannot be read, a source holds nothing, or two sources hold the same file.
    """
    revisions = {} if revisions is None else revisions
    extents: list[Extent] = []
    taken: dict[Hashable, tuple[Source, str]] = {}
    for number, source in enumerate(sources):
        prefix = f"{source.label}/" if len(sources) > 1 else ""
        if source.kind == "hub":
            if source.root not in revisions:
                revisions[source.root] = _newest_revision(source.root)
            found = list(_hub_extents(number, source, revisions[source.root]))
        else:
            listed = _once(source, list(_files(source)), taken)
            found = [extent for file in listed for extent in _file_extents(number, source, prefix, file)]
        if all(extent.passed_over for extent in found):
            reasons = "".join(f"; {printable(extent.path)} {extent.why}" for extent in found[:3])
            raise DataError(f"{source.setting}: no documents: it holds no file that could be read{reasons}")
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
        raise cannot_open(f"hf:{source_root}", error) from error


def _newest_revision(source_root: str) -> str:
    """Return the commit that a data set of the hub is at; of a directory here there is none."""
    name = source_root.partition(":")[0]
    if os.path.isdir(name):
        return ""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name).sha or ""
    except Exception as error:  # of the network, of permissions, of the name
        raise cannot_open(f"hf:{source_root}", error) from error


def _resolve(name: str) -> Source:
    if not name:
        raise DataError("a source is empty; name a directory, a file, a pattern, hf:NAME, or python-stdlib")
    if name == PYTHON_STDLIB:
        return Source(name, name, "stdlib", sysconfig.get_path("stdlib"))
    if name in HUB_PRESETS or name.startswith(HUB_PREFIX):
        return _resolve_hub(name)
    path = local_name(name)
    if is_remote(path):
        return _resolve_remote(name)
    root = os.path.abspath(path)
    try:
        mode = os.stat(root).st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = 0
    except OSError as error:
        raise cannot_read(name, error) from error
    except ValueError as error:
        raise DataError(f"{name!r}: is no path ({error})") from error
    label, setting = printable(os.path.basename(root)), printable(root)
    if stat.S_ISDIR(mode):
        return Source(label, setting, "tree", root)
    if stat.S_ISREG(mode):
        _check_is_unpacked(name)
        return Source(label, setting, "file", root)
    if mode:
        raise DataError(f"{name}: is neither a file nor a directory, but a pipe or a device; write it to a file first")
    if glob.has_magic(path):
        # The folder that a pattern is relative to is no pattern, whatever its name.
        pattern = os.path.abspath(os.path.join(glob.escape(os.getcwd()), path))
        if not os.path.isdir(folder := fixed_part(pattern)[0]):
            raise DataError(f"{name}: {printable(folder)} is no directory, so the pattern fits nothing")
        return Source(printable(pattern), printable(pattern), "pattern", pattern)
    raise DataError(
        f"{name}: no such file or directory; name one that exists, a pattern, hf:NAME, {', '.join(HUB_PRESETS)} "
        f"or {PYTHON_STDLIB}"
    )


def _check_is_unpacked(name: str) -> None:
    if suffix := archive_suffix(name):
        raise DataError(f"{name}: {suffix} files of this kind are not read; unpack it, or convert it to .jsonl")


def _meant(source: Source) -> str:
    """Return a name that two ways to write one source share."""
    if source.kind != "hub":
        return source.root
    name, _, rest = source.root.partition(":")
    config, _, split = rest.partition(":")
    return f"{HUB_PREFIX}{name}:{config}:{split or 'train'}"


def _resolve_hub(name: str) -> Source:
    setting = HUB_PRESETS.get(name, name)
    root = setting.removeprefix(HUB_PREFIX)
    if not re.fullmatch(r"[^:]+(:[^:]*){0,2}", root):
        raise DataError(f"{name}: a data set of the hub is hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
    return Source(root.partition(":")[0], setting, "hub", root)


def _resolve_remote(name: str) -> Source:
    fs, path = file_system(name)
    # To the driver of the web every page with links is a directory.
    is_page = name.startswith(("http://", "https://")) and "." in urlsplit(name).path.rpartition("/")[2]
    name = name.rstrip("/")
    try:
        if is_pattern(without_query(path)):
            return Source(name, name, "pattern", name)
        if not fs.exists(path):
            raise DataError(f"{name}: no such file or directory there; check the address and its permissions")
        kind = "tree" if not is_page and fs.isdir(path) else "file"
    except DataError:
        raise
    except Exception as error:  # drivers have exceptions of their own
        raise cannot_open(name, error) from error
    if kind == "file":
        _check_is_unpacked(name)
    return Source(name.rpartition("/")[2], name, kind, name)


def _hub_extents(number: int, source: Source, revision: str) -> Iterator[Extent]:
    n_shards = hub_dataset(source.root, revision).num_shards
    for shard in range(n_shards):
        doc_id = f"{source.label}#{shard}"
        yield Extent(number, "hub", source.root, doc_id, modified=revision, begin=shard, end=n_shards)


def _files(source: Source) -> Iterable[Listed]:
    if source.kind == "file":
        return [remote_file(source.root) if is_remote(source.root) else _local_file(source.root)]
    if is_remote(source.root):
        return remote_files(source.root, pattern=source.kind == "pattern")
    if source.kind == "pattern":
        return local_files(*fixed_part(source.root))
    if source.kind == "tree":
        return local_files(source.root, ["**"])
    of_stdlib = local_files(source.root, ["**"], _STDLIB_LEFT_OUT)
    return (file for file in of_stdlib if file.path.endswith(".py"))


def _local_file(path: str) -> Listed:
    try:
        listed = look_at(path, "")
    except OSError as error:
        raise cannot_read(path, error) from error
    if listed is None or listed.passed_over:
        raise DataError(f"{path}: is no file any more; leave sources alone while they are prepared")
    return listed


def _once(source: Source, found: list[Listed], taken: dict[Hashable, tuple[Source, str]]) -> list[Listed]:
    """Mark what is the same file as another; it goes by its own name rather than by that of a link to it.

    Raises:
        DataError: another source holds it.
    """
    repeated: dict[str, Listed] = {}
    for file in sorted(found, key=lambda file: file.is_link):
        if file.passed_over:
            continue
        first, path = taken.setdefault(file.identity, (source, file.path))
        if first is not source:
            raise DataError(
                f"{printable(file.path)}: is in the source {source.setting} and, as {printable(path)}, in the source "
                f"{first.setting}, so that it would be taken twice; name it in one of them only"
            )
        if path != file.path:
            why = f"is the same file as {printable(path)}, which is taken"
            repeated[file.path] = replace(file, passed_over="repeated_files", why=why)
    return [repeated.get(file.path, file) for file in found]


def _file_extents(number: int, source: Source, prefix: str, file: Listed) -> Iterator[Extent]:
    # A file's label is its name already.
    doc_id = source.label if source.kind == "file" else prefix + printable(file.below)
    if not file.passed_over and (suffix := archive_suffix(file.path)):
        why = f"is packed, and {suffix} files of this kind are not read; unpack it, or convert it to .jsonl"
        file = replace(file, passed_over="archives", why=why)
    if file.passed_over:
        yield Extent(number, "none", file.path, doc_id, file_bytes=0, passed_over=file.passed_over, why=file.why)
        return
    name = without_query(file.path).lower()
    explicit = source.kind == "file" or name.removesuffix(f".{compression_of(name)}").endswith(".txt")
    size = file.size_bytes
    whole = Extent(number, format_of(name), file.path, doc_id, max(0, size), size, file.modified, explicit=explicit)
    yield from _split(whole)


def _split(whole: Extent) -> Iterator[Extent]:
    """Cut a large file into extents; one that is elsewhere, or is compressed, is read as a whole."""
    if whole.size_bytes <= SPLIT_BYTES or is_remote(whole.path):
        yield whole
    elif whole.format == "lines" and not is_compressed(whole):
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

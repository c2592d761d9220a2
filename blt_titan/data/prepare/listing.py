r"""List the files of trees and patterns, here and on object stores: one rule for all.

    t/a.txt              a real file                    -> taken
    t/b.txt -> a.txt     the same file by another name  -> passed over: each real file is taken once, by its own name
    t/c.txt -> /x/c.txt  a link to another file         -> taken
    t/gone -> /nowhere   a dangling link                -> passed over
    t/loop -> .          a cycle                        -> passed over
    t/more -> /y         a link to a directory          -> passed over: never followed, by a tree, `*` or `**`
    t/*/c, t/more/*      a part without special characters is the user's own word: it may be a link

Hidden files and directories are left out unless a pattern's part begins with a dot. A folder that `datasets` saved
(`save_to_disk`) has no files but its data files (`saved_datasets.py`).
"""

import errno
import fnmatch
import glob
import os
import re
import stat
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from blt_titan.data.prepare.extents import PassedOverKind
from blt_titan.data.prepare.file_systems import cannot_open, cannot_read, file_system, printable
from blt_titan.data.prepare.saved_datasets import MARKS, data_files
from blt_titan.data.store.errors import DataError


@dataclass(frozen=True, slots=True)
class Listed:
    """A file that was found."""

    path: str
    """Or its URL."""
    below: str
    """The path relative to the root."""
    size_bytes: int = -1
    """-1 if unknown."""
    modified: str = ""
    identity: Hashable = None
    """What tells the real file from others, whatever its name."""
    is_link: bool = False
    passed_over: PassedOverKind | None = None
    why: str = ""


def is_pattern(path: str) -> bool:
    """Tell whether a path has special characters that are not escaped.

    >>> is_pattern("w[1]/a.txt"), is_pattern("w[[]1]/a.txt")
    (True, False)
    """
    return glob.has_magic(path) and glob.escape(_unescaped(path)) != path


def fixed_part(pattern: str) -> tuple[str, list[str]]:
    """Return the directory of a pattern before its first special character, and the parts after it.

    >>> fixed_part("/data/w[[]1]/crawl-*/a.jsonl")
    ('/data/w[1]', ['crawl-*', 'a.jsonl'])
    """
    parts = pattern.split("/")
    first = next((i for i, part in enumerate(parts) if is_pattern(part)), len(parts) - 1)
    return "/".join(map(_unescaped, parts[:first])) or "/", parts[first:]


def local_files(root: str, parts: Sequence[str], left_out: frozenset[str] = frozenset()) -> Iterator[Listed]:
    """Yield the files below a directory that fit a pattern, sorted by name in each directory; ["**"] fits all.

    Raises:
        DataError: a directory or a file cannot be read.
    """
    # A name can fit ** in several ways.
    for path in dict.fromkeys(_fitting(root, parts, left_out)):
        try:
            listed = look_at(path, path.removeprefix(root).lstrip("/"))
        except OSError as error:
            raise cannot_read(path, error) from error
        if listed is not None:
            yield listed


def look_at(path: str, below: str) -> Listed | None:
    """Return what a name of a file stands for; nothing if it is no file, as a pipe.

    Raises:
        OSError: it cannot be looked at.
    """
    status = os.lstat(path)
    if is_link := stat.S_ISLNK(status.st_mode):
        to = printable(os.readlink(path))
        try:
            status = os.stat(path)
        except OSError as error:
            if error.errno == errno.ELOOP:
                return Listed(path, below, passed_over="link_cycles", why=f"is a link to {to}, which leads back to it")
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return Listed(path, below, passed_over="dangling_links", why=f"is a link to {to}, which is not there")
            raise
        if stat.S_ISDIR(status.st_mode):
            if f"{os.path.realpath(os.path.dirname(path))}/".startswith(f"{os.path.realpath(path).rstrip('/')}/"):
                return Listed(path, below, passed_over="link_cycles", why=f"is a link to {to}, which holds it")
            why = f"is a link to the directory {to}, and such are not followed; name it as a source of its own"
            return Listed(path, below, passed_over="directory_links", why=why)
    if not stat.S_ISREG(status.st_mode):
        return None
    # Some network file systems number nothing.
    identity = (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)
    return Listed(path, below, status.st_size, str(status.st_mtime_ns), identity, is_link)


def remote_file(url: str) -> Listed:
    """Return what an object store says of one file."""
    fs, inner = file_system(url)
    try:
        return _remote(fs, inner, inner, fs.info(inner))
    except Exception as error:  # drivers have exceptions of their own
        raise cannot_open(url, error) from error


def remote_files(url: str, *, pattern: bool) -> Iterator[Listed]:
    """Yield the files of a folder of an object store, or those that fit a pattern, sorted by name."""
    fs, inner = file_system(url)
    try:
        if pattern:
            root, found = fixed_part(inner)[0], fs.glob(inner, detail=True)
        else:
            root, found = inner, fs.find(inner, detail=True)
        found = _without_what_is_no_data(fs, found)
    except DataError:
        raise
    except Exception as error:  # drivers have exceptions of their own
        raise cannot_open(url, error) from error
    for path, info in sorted(found.items()):
        below = path.removeprefix(root).lstrip("/")
        if info["type"] == "file" and not any(part.startswith(".") for part in below.split("/")):
            yield _remote(fs, path, below, info)


def _without_what_is_no_data(fs: Any, found: dict[str, Any]) -> dict[str, Any]:
    """Leave out what saved data sets hold besides their data files."""
    for folder in sorted({path.rpartition("/")[0] for path in found if path.rpartition("/")[2] in MARKS}):
        names = {name.rstrip("/").rpartition("/")[2] for name in fs.ls(folder, detail=False)}
        of_saved = data_files(fs.unstrip_protocol(folder), names, partial(_read_in, fs, folder))
        if of_saved is not None:
            below = len(folder) + 1
            found = {
                path: info
                for path, info in found.items()
                if not path.startswith(f"{folder}/") or path[below:].partition("/")[0] in of_saved
            }
    return found


def _read_in(fs: Any, folder: str, name: str) -> bytes:
    return fs.cat_file(f"{folder}/{name}")


def _remote(fs: Any, path: str, below: str, info: dict[str, Any]) -> Listed:
    size = info.get("size")
    # What changes with the content.
    keys = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created")
    modified = str(next((info[key] for key in keys if key in info), ""))
    url = fs.unstrip_protocol(path)
    return Listed(url, below, -1 if size is None else int(size), modified, url)


def _fitting(directory: str, parts: Sequence[str], left_out: frozenset[str]) -> Iterator[str]:
    """Yield the paths that fit a pattern, and links to directories that it would have to follow."""
    part, rest = parts[0], parts[1:]
    if not is_pattern(part):
        path = os.path.join(directory, _unescaped(part))
        if rest and os.path.isdir(path):
            yield from _fitting(path, rest, left_out)
        elif not rest and os.path.lexists(path) and not os.path.isdir(path):
            yield path
        return
    if part == "**" and rest:
        yield from _fitting(directory, rest, left_out)
    fits = re.compile(fnmatch.translate("*" if part == "**" else part)).match
    for entry in _entries(directory):
        hidden = entry.name.startswith(".") and not part.startswith(".")
        if hidden or entry.name in left_out or not fits(entry.name):
            continue
        goes_on = part == "**" or bool(rest)
        if entry.is_dir(follow_symlinks=False):
            if goes_on:
                yield from _fitting(entry.path, parts if part == "**" else rest, left_out)
            continue
        leads_to_directory = entry.is_symlink() and os.path.isdir(entry.path)
        if goes_on if leads_to_directory else not rest:
            yield entry.path


def _entries(directory: str) -> list[os.DirEntry[str]]:
    """Return what a directory holds, sorted by name; of a saved data set its data files, in their order."""

    def read(name: str) -> bytes:
        with open(os.path.join(directory, name), "rb") as file:
            return file.read()

    try:
        with os.scandir(directory) as found:
            entries = {entry.name: entry for entry in sorted(found, key=lambda entry: entry.name)}
        of_saved = data_files(directory, entries, read)
    except OSError as error:
        raise cannot_read(getattr(error, "filename", None) or directory, error) from error
    return list(entries.values()) if of_saved is None else [entries[name] for name in of_saved]


def _unescaped(pattern: str) -> str:
    return re.sub(r"\[([*?[])\]", r"\1", pattern)

r"""Where documents come from: the standard library, a directory, a file, the lines of a `.jsonl` file.

In go source names as a user types them, out come *references* to documents: a name, a size, and a `read()`.
The text itself is never held, only about 300 bytes a document, so one call is good for some ten million
documents; split more by source. Bytes are bytes: a file's come back exactly as they are, valid UTF-8 or not.

    a directory   notes/a.txt               -> "notes/a.txt"
                  crawl.jsonl, line 12      -> "crawl.jsonl#L12"
    two sources   wiki/ and code/           -> "wiki/notes/a.txt", "code/..."
"""

import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from blt_titan.data.errors import DataError

PYTHON_STDLIB = "python-stdlib"
BINARY_PROBE_BYTES = 8 * 1024
_UTF8_BOM = b"\xef\xbb\xbf"
_STDLIB_LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__"})
_UNREADABLE = (".gz", ".zst", ".bz2", ".xz", ".zip", ".parquet", ".arrow")


@dataclass(frozen=True, slots=True)
class FileDocument:
    """A whole file."""

    doc_id: str
    size_bytes: int
    path: str

    def read(self) -> bytes:
        """Read the text.

        Raises:
            DataError: the file cannot be read, or changed since it was listed.
        """
        try:
            with open(self.path, "rb") as file:
                text = file.read()
        except OSError as error:
            raise _cannot_read(self.path, error) from error
        return _unchanged(text, self.size_bytes, self.path)


@dataclass(frozen=True, slots=True)
class JsonlDocument:
    """The text of one line of a `.jsonl` file; `offset` and `length` are the line's place in the file, in bytes."""

    doc_id: str
    size_bytes: int
    path: str
    text_column: str
    line_number: int
    offset: int
    length: int

    def read(self) -> bytes:
        """Read the text, as UTF-8.

        Raises:
            DataError: the file cannot be read, or changed since it was listed.
        """
        where = f"{self.path}, line {self.line_number}"
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                line = file.read(self.length)
        except OSError as error:
            raise _cannot_read(self.path, error) from error
        return _unchanged(_text_of_line(line, self.text_column, where), self.size_bytes, where)


Document = FileDocument | JsonlDocument


@dataclass(frozen=True, slots=True)
class Source:
    """One source: `label` names it in document ids, `setting` in the manifest; `root` is a directory or a file."""

    label: str
    setting: str
    root: Path


@dataclass(slots=True)
class Listing:
    """The documents of all sources, and how much was left out."""

    documents: list[Document]
    empty_documents: int = 0
    binary_files: int = 0


def resolve_sources(names: Sequence[str | os.PathLike[str]]) -> list[Source]:
    """Turn what the user typed into sources.

    Raises:
        DataError: none is given, one is given twice, does not exist, or is of a kind that is not read.
    """
    if not names:
        raise DataError(f"no source given; name a directory, a file, or {PYTHON_STDLIB}")
    sources: list[Source] = []
    for name in (os.fspath(name) for name in names):
        if name == PYTHON_STDLIB:
            sources.append(Source(name, name, Path(sysconfig.get_path("stdlib"))))
            continue
        root = Path(os.path.abspath(name))
        if not (root.is_dir() or root.is_file()):
            raise DataError(f"{name}: no such file or directory; name one that exists, or {PYTHON_STDLIB}")
        if root.is_file() and root.suffix.lower() in _UNREADABLE:
            raise DataError(f"{name}: {root.suffix} files are not read; unpack it, or convert it to .jsonl")
        sources.append(Source(_printable(root.name), _printable(str(root)), root))
    settings = [source.setting for source in sources]
    for source in sources:
        if settings.count(source.setting) > 1:
            raise DataError(f"{source.setting}: the source is given twice; name it once")
    # Two sources of one name are told apart by their whole paths.
    labels = [source.label for source in sources]
    return [s if labels.count(s.label) == 1 else Source(s.setting, s.setting, s.root) for s in sources]


def list_documents(sources: Sequence[Source], *, text_column: str = "text", progress: bool = False) -> Listing:
    """List the documents of all sources; every line of a `.jsonl` file is parsed once here, and once when read.

    A directory is walked in sorted order: every regular file, except hidden files and directories, and binary
    files (a NUL in the first 8 KiB), which are counted. Links to files are followed, links to directories are
    not. A file that is a source itself is taken whatever it holds.

    Args:
        sources: from `resolve_sources`.
        text_column: the key of the text in each line of a `.jsonl` file.
        progress: show a progress bar.

    Raises:
        DataError: a file or directory cannot be read, or a `.jsonl` line is not a document; names file and line.
    """
    listing = Listing([])
    with tqdm(desc="listing", unit=" documents", disable=not progress) as bar:
        for source in sources:
            prefix = f"{source.label}/" if len(sources) > 1 else ""
            for document in _documents(source, prefix, text_column):
                bar.update()
                if document is None:
                    listing.binary_files += 1
                elif document.size_bytes == 0:
                    listing.empty_documents += 1
                else:
                    listing.documents.append(document)
    return listing


def _documents(source: Source, prefix: str, text_column: str) -> Iterator[Document | None]:
    """Yield a source's documents, and None for each binary file left out."""
    if source.root.is_file():
        # A file's label is its name already.
        yield from _documents_of_file(str(source.root), source.label, text_column, keep_binary=True)
        return
    stdlib = source.setting == PYTHON_STDLIB
    for path in _walk(str(source.root), _STDLIB_LEFT_OUT if stdlib else frozenset()):
        if not stdlib or path.endswith(".py"):
            doc_id = prefix + _printable(Path(path).relative_to(source.root).as_posix())
            yield from _documents_of_file(path, doc_id, text_column, keep_binary=False)


def _documents_of_file(path: str, doc_id: str, text_column: str, *, keep_binary: bool) -> Iterator[Document | None]:
    try:
        if path.endswith(".jsonl"):
            yield from _documents_of_jsonl(path, doc_id, text_column)
            return
        with open(path, "rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            is_binary = not keep_binary and b"\0" in file.read(BINARY_PROBE_BYTES)
    except OSError as error:
        raise _cannot_read(path, error) from error
    yield None if is_binary else FileDocument(doc_id, size_bytes, path)


def _documents_of_jsonl(path: str, doc_id: str, text_column: str) -> Iterator[JsonlDocument]:
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            start, offset = offset, offset + len(line)
            if number == 1 and line.startswith(_UTF8_BOM):
                start, line = len(_UTF8_BOM), line.removeprefix(_UTF8_BOM)
            if line.isspace() or not line:
                continue
            size_bytes = len(_text_of_line(line, text_column, f"{path}, line {number}"))
            yield JsonlDocument(f"{doc_id}#L{number}", size_bytes, path, text_column, number, start, len(line))


def _text_of_line(line: bytes, text_column: str, where: str) -> bytes:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); correct or remove the line") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object with a key {text_column!r}, got {type(record).__name__}")
    if text_column not in record:
        raise DataError(
            f"{where}: no key {text_column!r} among {sorted(record)}; name the text's key with --text-column"
        )
    text = record[text_column]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: {text_column!r} is {type(text).__name__}, expected a string; correct the line, "
            "or name another key with --text-column"
        )
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {text_column!r} has no UTF-8 form ({error}); correct the line") from error


def _walk(directory: str, left_out: frozenset[str]) -> Iterator[str]:
    """Yield the paths of regular files, sorted by name in each directory."""
    try:
        with os.scandir(directory) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise _cannot_read(directory, error) from error
    for entry in entries:
        if entry.name.startswith(".") or entry.name in left_out:
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, left_out)
        elif entry.is_file():
            yield entry.path


def _printable(name: str) -> str:
    """Give a file name as valid Unicode: a byte that is not UTF-8 becomes a backslash escape."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _unchanged(text: bytes, size_bytes: int, where: str) -> bytes:
    if len(text) != size_bytes:
        raise DataError(
            f"{where}: {len(text)} bytes, {size_bytes} when it was listed; leave sources alone while they are prepared"
        )
    return text


def _cannot_read(path: str, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror or error}); check the path and its permissions")

"""What `prepare` reads, stretch by stretch, and what comes out of each: the types that listing and reading share.

A source is listed as extents (`sources.py`); an extent is read as documents, problems, and files that were left out
(`formats.py`).
"""

import gzip
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from blt_titan.data.prepare.compression import DamagedDataError, compression_of
from blt_titan.data.prepare.file_systems import is_remote, without_query

NOT_COUNTED = -1
TOO_LONG = "raise --max-record-bytes, or split it"

Format = Literal["text", "lines", "parquet", "arrow", "hub", "none"]
PassedOverKind = Literal["dangling_links", "link_cycles", "directory_links", "repeated_files", "archives"]

_LINES = re.compile(r"\.(jsonl|ndjson)$|\.(jsonl|ndjson|json)\.(gz|zst|bz2|xz)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Extent:
    """A stretch of one file, or of one data set of the hub, that one worker reads."""

    source: int
    """Number of the source."""
    format: Format
    """How it is read; "none" where it is passed over."""
    path: str
    doc_id: str
    """Id of a text; the beginning of the ids of records."""
    size_bytes: int = 0
    """As it is stored, for progress; 0 if unknown."""
    file_bytes: int = -1
    """Size of the whole file when it was listed; -1 if unknown."""
    modified: str = ""
    """When the file was last changed, as its file system says it. Hub: the commit."""
    begin: int = 0
    """Lines: the byte where it begins. Parquet: the first row group. Hub: which shard."""
    end: int = -1
    """Where the same ends; -1 for the end of the file. Hub: how many shards."""
    first: int = 0
    """Lines: newlines before `begin`, NOT_COUNTED at first. Parquet: rows before it."""
    explicit: bool = True
    """Named by the user, or a .txt file: taken as a text even where it does not look like one."""
    passed_over: PassedOverKind | None = None
    why: str = ""
    """It is passed over, as what follows its path in a sentence."""


class Document(NamedTuple):
    """One document; `text` may be empty."""

    doc_id: str
    text: bytes


class Problem(NamedTuple):
    """A record that cannot be a document, or the rest of a file that cannot be read; names file and place."""

    message: str


class Binary(NamedTuple):
    """A file that does not look like text."""

    path: str

    @property
    def message(self) -> str:
        """Name it and say why it is left out."""
        return f"{self.path}: does not look like text"


class PassedOver(NamedTuple):
    """What was found and is not read, as a link that leads nowhere; names it and says why."""

    kind: PassedOverKind
    message: str


Item = Document | Problem | Binary | PassedOver
Report = Callable[[int], None]
"""Called with the stored bytes that were read since the last call."""


class BadRecordError(ValueError):
    """Why a record is not a document."""


def format_of(path: str) -> Format:
    """Return how a file is read, by its name; what is not known is text."""
    path = without_query(path)
    if _LINES.search(path):
        return "lines"
    suffix = path[path.rfind(".") :].lower()
    return "parquet" if suffix == ".parquet" else "arrow" if suffix in (".arrow", ".ipc", ".feather") else "text"


def is_of_the_way(error: Exception, extent: Extent) -> bool:
    """Tell whether a disk or a network failed rather than the file being damaged: nothing to pass over."""
    damage = (DamagedDataError, EOFError, zlib.error, gzip.BadGzipFile)
    damaged = isinstance(error, damage) or "runcated" in str(error) or "decompress failed" in str(error)
    return getattr(error, "errno", None) is not None or (is_remote(extent.path) and not damaged)


def is_compressed(extent: Extent) -> bool:
    """Tell whether a file is decompressed while it is read."""
    return extent.format in ("text", "lines") and compression_of(extent.path) is not None

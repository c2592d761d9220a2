"""Compressed files, read as a stream: gzip, Zstandard, bzip2 and xz, by the end of the name.

Several archives one after the other are read as one, and nothing that follows the last is dropped: it is an error.
"""

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable
from typing import Any

import pyarrow as pa
from typing_extensions import override

from blt_titan.data.prepare.file_systems import without_query

_COMPRESSED = re.compile(r"\.(gz|zst|bz2|xz)$", re.IGNORECASE)
_NOT_READ = re.compile(r"\.(tar(\.\w+)?|tgz|tbz2?|txz|tzst|zip|7z|rar|lz4|lzma|br|snappy)$", re.IGNORECASE)
_PIECE_BYTES = 64 * 1024
"""At a time: so much of what goes before a damage may be lost with it."""
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "Zstandard", b"\xfd7zXZ\0": "xz"}
_BZIP2 = re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")
"""Its three letters alone may begin a text."""


class DamagedDataError(Exception):
    """Compressed data that is cut short, or is something else."""


READ_ERRORS = (OSError, EOFError, zlib.error, DamagedDataError)
"""What reading of compressed data raises."""


def compression_of(path: str) -> str | None:
    """Return the suffix of a compressed file that is read, as in "gz"."""
    path = without_query(path)
    match = _COMPRESSED.search(path)
    return match[1].lower() if match and not _NOT_READ.search(path) else None


def archive_suffix(path: str) -> str:
    """Return the end of the name of a file that is packed in a way that is not read, or nothing.

    >>> archive_suffix("a.txt.gz"), archive_suffix("a.tar.gz"), archive_suffix("a.zip")
    ('', '.gz', '.zip')
    """
    path = without_query(path)
    return path[path.rfind(".") :].lower() if _NOT_READ.search(path) else ""


def compressed_content(head: bytes) -> str:
    """Name how a file is compressed that begins so; nothing if it is not."""
    if _BZIP2.match(head):
        return "bzip2"
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "")


def decompressed(file: Any, compression: str, report: Callable[[int], None]) -> Any:
    """Return what a compressed file is read from; `report` is told the stored bytes."""
    reporting = Reporting(file, report)
    if compression == "gz":
        return gzip.GzipFile(fileobj=reporting)
    if compression == "zst":
        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(reporting), "zstd"), _PIECE_BYTES)
    new_decompressor = bz2.BZ2Decompressor if compression == "bz2" else lzma.LZMADecompressor
    return io.BufferedReader(_Decompressing(reporting, new_decompressor), _PIECE_BYTES)


class Reporting(io.RawIOBase):
    """A file that reports what is read of it."""

    def __init__(self, file: Any, report: Callable[[int], None]):
        self._file, self._report = file, report

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: Any) -> int:
        piece = self.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    @override
    def read(self, size: int = -1) -> bytes:
        piece = self._file.read(size)
        self._report(len(piece))
        return piece


class _Decompressing(io.RawIOBase):
    """Archives of bzip2 or xz in a row; the files of the standard library drop what follows them without a word."""

    def __init__(self, file: Any, new_decompressor: Callable[[], Any]):
        self._file, self._new = file, new_decompressor
        self._decompressor = new_decompressor()
        self._begun = False
        """The archive that is read; zeros may stand between two."""

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: Any) -> int:
        while True:
            piece = b""
            if self._decompressor.eof:
                piece = self._decompressor.unused_data
                self._decompressor, self._begun = self._new(), False
            if not piece and (not self._begun or self._decompressor.needs_input):
                piece = self._file.read(_PIECE_BYTES)
                if not piece:
                    if self._begun:
                        raise DamagedDataError("it ends before its end mark")
                    return 0
            if not self._begun:
                piece = piece.lstrip(b"\0")
                self._begun = bool(piece)
                if not piece:
                    continue
            try:
                content = self._decompressor.decompress(piece, len(buffer))
            except (OSError, lzma.LZMAError) as error:
                raise DamagedDataError(str(error)) from error
            if content:
                buffer[: len(content)] = content
                return len(content)

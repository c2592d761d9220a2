r"""Read the documents of an extent: text files, JSON lines, Parquet, Arrow, a data set of the hub.

An `Extent` enters; documents leave one at a time, and a `Problem` for each record that cannot be one, so that the
caller decides whether that ends the work. Bytes are bytes: a text file's come back exactly as they are. In JSON, bytes
that are not UTF-8 are taken as they stand between the quotation marks:

    {"text": "caf\xe9"}          -> b"caf\xe9"         though a strict parser would refuse the line
    {"text": "a"}{"text": "b"}   -> b"a" and b"b"      two files were joined, the first without a final newline

Memory is bounded by the largest record, about ten times, and a record larger than it may be is a Problem.
"""

import os
from collections.abc import Iterator
from typing import Any

from blt_titan.data.prepare.compression import READ_ERRORS, compression_of, decompressed
from blt_titan.data.prepare.extents import (
    TOO_LONG,
    Binary,
    Document,
    Extent,
    Item,
    PassedOver,
    Problem,
    Report,
    is_compressed,
    is_of_the_way,
)
from blt_titan.data.prepare.file_systems import cannot_read, is_remote, open_binary, printable
from blt_titan.data.prepare.json_lines import read_lines
from blt_titan.data.prepare.raw_records import packed_records_in, records_in
from blt_titan.data.prepare.tables import read_hub, read_table
from blt_titan.data.store.errors import DataError

BINARY_PROBE_BYTES = 8 * 1024


def read_extent(
    extent: Extent,
    *,
    text_column: str,
    max_record_bytes: int,
    as_text: bool = False,
    report: Report = lambda _: None,
) -> Iterator[Item]:
    """Yield what an extent holds.

    Args:
        extent: from `list_extents`.
        text_column: where a record keeps its text.
        max_record_bytes: a longer text file, JSON line or text of a table is a Problem.
        as_text: take a text file that looks like records (`raw_records.py`); else it is a Problem.
        report: progress.

    Raises:
        DataError: the file cannot be opened, or changed since it was listed.
    """
    if extent.passed_over:
        yield PassedOver(extent.passed_over, f"{printable(extent.path)}: {extent.why}")
        return
    try:
        if extent.format == "hub":
            yield from read_hub(extent, text_column, max_record_bytes, report)
            return
        _check_unchanged(extent)
        if is_compressed(extent) and extent.file_bytes == 0:
            yield Problem(f"{printable(extent.path)}: is empty, which no compressed file is; fetch the file again")
            return
        with open_binary(extent.path) as file:
            if extent.format == "text":
                yield _read_text(file, extent, None if as_text else text_column, max_record_bytes)
                report(extent.size_bytes)
            elif extent.format == "lines":
                yield from read_lines(file, extent, text_column, max_record_bytes, report)
            else:
                yield from read_table(file, extent, text_column, max_record_bytes, report)
    except OSError as error:
        raise cannot_read(extent.path, error) from error


def _check_unchanged(extent: Extent) -> None:
    if is_remote(extent.path) or extent.file_bytes < 0:
        return
    found = os.stat(extent.path).st_size
    if found != extent.file_bytes:
        raise DataError(
            f"{extent.path}: {found} bytes, {extent.file_bytes} when it was listed; leave sources alone while they are "
            "prepared"
        )


def _read_text(file: Any, extent: Extent, text_column: str | None, most_bytes: int) -> Document | Problem | Binary:
    """Read a text file; without a column whatever it looks like."""
    path, compression = printable(extent.path), compression_of(extent.path)
    content = decompressed(file, compression, lambda _: None) if compression else file
    try:
        head = content.read(BINARY_PROBE_BYTES)
        what = packed_records_in(head, extent) if text_column is not None else ""
        if not what and not extent.explicit and b"\0" in head:
            return Binary(path)
        text = head if what else head + content.read(max(0, most_bytes + 1 - len(head)))
    except READ_ERRORS as error:
        if not compression or is_of_the_way(error, extent):
            raise
        return Problem(f"{path}: the compressed data is truncated or damaged ({error}); fetch the file again")
    if not what and len(text) > most_bytes:
        return Problem(f"{path}: more than {most_bytes} bytes; {TOO_LONG}")
    if not what and text_column is not None:
        what = records_in(text, extent, text_column)
    if what:
        return Problem(f"{path}: {what}, or have it read as one text with --as-text")
    return Document(extent.doc_id, text)

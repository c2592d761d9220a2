"""Read JSON lines: a document from each line's text, and a `Problem` for each line that cannot be one."""

import io
import json
import re
from collections.abc import Iterator
from typing import Any

from blt_titan.data.prepare.compression import READ_ERRORS, Reporting, compression_of, decompressed
from blt_titan.data.prepare.extents import (
    TOO_LONG,
    BadRecordError,
    Document,
    Extent,
    Problem,
    Report,
    is_compressed,
    is_of_the_way,
)
from blt_titan.data.prepare.file_systems import is_remote, printable

_UTF8_BOM = b"\xef\xbb\xbf"
_DECODER = json.JSONDecoder()
_SURROGATE = re.compile("[\ud800-\udfff]")
_REPORT_BYTES = 1 << 16


def read_lines(
    file: Any, extent: Extent, text_column: str, most_bytes: int, report: Report
) -> Iterator[Document | Problem]:
    """Yield the documents of an extent of lines.

    Args:
        file: the opened file.
        extent: what of it to read.
        text_column: the key of a record's text.
        most_bytes: a longer line is a Problem.
        report: progress.
    """
    number, path = extent.first, printable(extent.path)
    compressed = is_compressed(extent)
    place, unreported = extent.begin, 0
    lines = _open_lines(file, extent, report)
    if place:
        # The line that begins before this extent belongs to the one before; a newline at its end may be all.
        file.seek(place - 1)
        place, ended = place - 1, False
        while not ended and place < extent.end and (piece := file.readline(1 << 20)):
            ended, place = piece.endswith(b"\n"), place + len(piece)
        number += place > extent.begin
    while extent.end < 0 or place < extent.end:
        try:
            line = lines.readline(most_bytes + 1)
            n_bytes = len(line)
            while n_bytes > most_bytes and not line.endswith(b"\n") and (line := lines.readline(1 << 20)):
                n_bytes += len(line)
        except READ_ERRORS as error:
            if not compressed or is_of_the_way(error, extent):
                raise
            yield Problem(
                f"{path}, after line {number}: the compressed data is truncated or damaged ({error}); fetch the "
                "file again"
            )
            return
        if not n_bytes:
            break
        place += n_bytes
        number += 1
        if not compressed:
            unreported += n_bytes
            if unreported > _REPORT_BYTES:
                report(unreported)
                unreported = 0
        if n_bytes > most_bytes:
            yield Problem(f"{path}, line {number}: longer than {most_bytes} bytes; {TOO_LONG}")
            continue
        if number == 1:
            line = line.removeprefix(_UTF8_BOM)
        text = _text_of_plain_line(line, text_column)
        if text is not None:
            yield Document(f"{extent.doc_id}#L{number}", text)
        elif line and not line.isspace():
            try:
                texts = _texts_of_line(line, text_column)
            except BadRecordError as error:
                yield Problem(f"{path}, line {number}: {error}")
                continue
            for i, text in enumerate(texts):
                yield Document(f"{extent.doc_id}#L{number}" + (f".{i + 1}" if i else ""), text)
    report(unreported)


def _text_of_plain_line(line: bytes, text_column: str) -> bytes | None:
    """Return the text of what a line nearly always is: one record, valid UTF-8; everything else takes the long way."""
    try:
        decoded = line.decode()
        record, end = _DECODER.raw_decode(decoded)
        text = record[text_column]
        if type(text) is str and decoded[end:] in ("\n", "", "\r\n"):
            return text.encode()
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    return None


def _texts_of_line(line: bytes, text_column: str) -> list[bytes]:
    try:
        decoded, errors = line.decode(), "strict"
    except UnicodeDecodeError as error:
        # Half a surrogate pair that the line spells out would pass for a raw byte.
        if any(_has_surrogates(record) for record in _joined_records(line.decode(errors="replace"))):
            raise BadRecordError(f"neither valid UTF-8 nor without half a surrogate pair ({error})") from error
        decoded, errors = line.decode(errors="surrogateescape"), "surrogateescape"
    try:
        records = [json.loads(decoded)]
    except (ValueError, RecursionError) as error:
        records = _joined_records(decoded)
        if not records:
            raise BadRecordError(f"not JSON ({error}); correct or remove the line") from error
    return [_text_of(record, text_column, errors) for record in records]


def _has_surrogates(record: dict[str, Any]) -> bool:
    return any(isinstance(value, str) and _SURROGATE.search(value) for value in record.values())


def _joined_records(line: str) -> list[Any]:
    """Return the objects of a line that holds several and nothing else; else nothing."""
    records, place, line = [], 0, line.strip()
    try:
        while place < len(line):
            record, place = _DECODER.raw_decode(line, place)
            if not isinstance(record, dict):
                return []
            records.append(record)
            while place < len(line) and line[place].isspace():
                place += 1
    except (ValueError, RecursionError):
        return []
    return records


def kind_of(value: Any) -> str:
    """Say what a value of JSON is.

    >>> kind_of(None), kind_of([1]), kind_of(True)
    ('null', 'an array', 'true')
    """
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return {dict: "an object", list: "an array", str: "a string"}.get(type(value), "a number")


def _text_of(record: Any, text_column: str, errors: str) -> bytes:
    if not isinstance(record, dict):
        raise BadRecordError(f"expected an object with a key {text_column!r}, got {kind_of(record)}")
    if text_column not in record:
        raise BadRecordError(f"no key {text_column!r} among {sorted(record)}; name the text's key with --text-column")
    text = record[text_column]
    if not isinstance(text, str):
        raise BadRecordError(
            f"{text_column!r} is {kind_of(text)}, expected a string; correct the line, or name another key with "
            "--text-column"
        )
    try:
        return text.encode(errors=errors)
    except UnicodeEncodeError as error:
        raise BadRecordError(f"{text_column!r} has no UTF-8 form ({error}); correct the line") from error


def _open_lines(file: Any, extent: Extent, report: Report) -> Any:
    """Return what lines are read from."""
    if compression := compression_of(extent.path):
        return decompressed(file, compression, report)
    # Files of object stores cannot read a line of bounded length.
    return io.BufferedReader(Reporting(file, lambda _: None), 1 << 20) if is_remote(extent.path) else file

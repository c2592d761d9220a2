r"""Read the documents of an extent: text files, JSON lines, Parquet, Arrow, a data set of the hub.

An `Extent` enters; documents leave one at a time, and a `Problem` for each record that cannot be one, so that the
caller decides whether that ends the work. Bytes are bytes: a text file's come back exactly as they are. In JSON, bytes
that are not UTF-8 are taken as they stand between the quotation marks:

    {"text": "caf\xe9"}          -> b"caf\xe9"         though a strict parser would refuse the line
    {"text": "a"}{"text": "b"}   -> b"a" and b"b"      two files were joined, the first without a final newline

Memory is bounded by the largest record, about ten times, and a record larger than it may be is a Problem.
"""

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blt_titan.data.errors import DataError
from blt_titan.data.sources import Extent, cannot_read, hub_dataset, is_remote, open_binary, printable

BINARY_PROBE_BYTES = 8 * 1024
_ROWS_AT_A_TIME = 64
_BATCH_BYTES = 8 * 1024**2
"""Of a table's rows, about."""
_DECOMPRESSED_BYTES = 64 * 1024
"""At a time: so much of what goes before a damage may be lost with it."""
_UTF8_BOM = b"\xef\xbb\xbf"
_DECODER = json.JSONDecoder()
_SURROGATE = re.compile("[\ud800-\udfff]")
_TOO_LONG = "raise --max-record-bytes, or split it"
_REPORT_BYTES = 1 << 16
_NETWORK_MODULES = ("requests", "urllib3", "httpx", "httpcore", "aiohttp", "huggingface_hub", "fsspec", "asyncio")


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


Report = Callable[[int], None]
"""Called with the stored bytes that were read since the last call."""


class _BadRecord(ValueError):
    """Why a record is not a document."""


def read_extent(
    extent: Extent, *, text_column: str, max_record_bytes: int, report: Report = lambda _: None
) -> Iterator[Document | Problem | Binary]:
    """Yield what an extent holds.

    Args:
        extent: from `list_extents`.
        text_column: where a record keeps its text.
        max_record_bytes: a longer text file, JSON line or text of a table is a Problem.
        report: progress.

    Raises:
        DataError: the file cannot be opened, or changed since it was listed.
    """
    try:
        if extent.format == "hub":
            yield from _read_hub(extent, text_column, max_record_bytes, report)
            return
        _check_unchanged(extent)
        with open_binary(extent.path) as file:
            if extent.format == "text":
                yield _read_text(file, extent, max_record_bytes, report)
            elif extent.format == "lines":
                yield from _read_lines(file, extent, text_column, max_record_bytes, report)
            else:
                yield from _read_table(file, extent, text_column, max_record_bytes, report)
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


def _read_text(file: Any, extent: Extent, most_bytes: int, report: Report) -> Document | Problem | Binary:
    text = file.read(most_bytes + 1)
    report(extent.size_bytes)
    if len(text) > most_bytes:
        return Problem(f"{printable(extent.path)}: more than {most_bytes} bytes; {_TOO_LONG}")
    if not extent.keep_binary and b"\0" in text[:BINARY_PROBE_BYTES]:
        return Binary(printable(extent.path))
    return Document(extent.doc_id, text)


def _read_lines(
    file: Any, extent: Extent, text_column: str, most_bytes: int, report: Report
) -> Iterator[Document | Problem]:
    number, path = extent.first, printable(extent.path)
    compressed = extent.path.lower().endswith((".gz", ".zst"))
    place, unreported = extent.begin, 0
    if compressed and extent.file_bytes == 0:
        yield Problem(f"{path}: is empty, which no compressed file is; fetch the file again")
        return
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
        except (OSError, EOFError, zlib.error) as error:
            if not compressed or _is_of_the_way(error, extent):
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
            yield Problem(f"{path}, line {number}: longer than {most_bytes} bytes; {_TOO_LONG}")
            continue
        if number == 1:
            line = line.removeprefix(_UTF8_BOM)
        text = _text_of_plain_line(line, text_column)
        if text is not None:
            yield Document(f"{extent.doc_id}#L{number}", text)
        elif line and not line.isspace():
            try:
                texts = _texts_of_line(line, text_column)
            except _BadRecord as error:
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
            raise _BadRecord(f"neither valid UTF-8 nor without half a surrogate pair ({error})") from error
        decoded, errors = line.decode(errors="surrogateescape"), "surrogateescape"
    try:
        records = [json.loads(decoded)]
    except (ValueError, RecursionError) as error:
        records = _joined_records(decoded)
        if not records:
            raise _BadRecord(f"not JSON ({error}); correct or remove the line") from error
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


def _text_of(record: Any, text_column: str, errors: str) -> bytes:
    if not isinstance(record, dict):
        raise _BadRecord(f"expected an object with a key {text_column!r}, got {type(record).__name__}")
    if text_column not in record:
        raise _BadRecord(f"no key {text_column!r} among {sorted(record)}; name the text's key with --text-column")
    text = record[text_column]
    if not isinstance(text, str):
        raise _BadRecord(
            f"{text_column!r} is {type(text).__name__}, expected a string; correct the line, or name another key with "
            "--text-column"
        )
    try:
        return text.encode(errors=errors)
    except UnicodeEncodeError as error:
        raise _BadRecord(f"{text_column!r} has no UTF-8 form ({error}); correct the line") from error


def _read_table(
    file: Any, extent: Extent, text_column: str, most_bytes: int, report: Report
) -> Iterator[Document | Problem]:
    row = extent.first
    try:
        for batch, share in _record_batches(file, extent, text_column):
            yield from _rows(batch, text_column, extent, row, most_bytes)
            row += batch.num_rows
            report(round(share * extent.size_bytes))
    except (pa.ArrowException, OSError, _BadRecord) as error:
        if isinstance(error, OSError) and _is_of_the_way(error, extent):
            raise
        # Arrow's messages of damage run over lines.
        reason = " ".join(str(error).split())
        what = "" if isinstance(error, _BadRecord) else f"cannot be read as {extent.format} from row {row + 1} on: "
        yield Problem(f"{printable(extent.path)}: {what}{reason}")


def _record_batches(file: Any, extent: Extent, text_column: str) -> Iterator[tuple[pa.RecordBatch, float]]:
    """Yield record batches of the text's column, each with its share of the extent."""
    if extent.format == "parquet":
        # Not the whole row group at once.
        table = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
        _check_column(table.schema_arrow, text_column)
        groups = range(extent.begin, table.num_row_groups if extent.end < 0 else extent.end)
        metadata = [table.metadata.row_group(number) for number in groups]
        rows = sum(group.num_rows for group in metadata)
        n_bytes = sum(group.total_byte_size for group in metadata)
        at_a_time = max(1, min(_ROWS_AT_A_TIME, _BATCH_BYTES * rows // max(1, n_bytes)))
        for batch in table.iter_batches(at_a_time, row_groups=list(groups), columns=[text_column]):
            yield batch, batch.num_rows / rows
        return
    with pa.PythonFile(file) as source:
        magic = source.read(6)
        source.seek(0)
        open_reader = pa.ipc.open_file if magic == b"ARROW1" else pa.ipc.open_stream
        schema = open_reader(source).schema
        _check_column(schema, text_column)
        source.seek(0)
        only = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(text_column)])
        reader = open_reader(source, options=only)
        if magic == b"ARROW1":
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number), 1 / reader.num_record_batches
        else:
            for batch in reader:
                yield batch, 0.0


def _check_column(schema: pa.Schema, text_column: str) -> None:
    if text_column not in schema.names:
        raise _BadRecord(f"no column {text_column!r} among {schema.names}; name the text's column with --text-column")
    if schema.names.count(text_column) > 1:
        raise _BadRecord(f"several columns {text_column!r} among {schema.names}; rename all but one")
    kind = schema.field(text_column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not any(
        is_text(kind)
        for is_text in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_string_view,
            pa.types.is_binary,
            pa.types.is_large_binary,
            pa.types.is_binary_view,
        )
    ):
        raise _BadRecord(f"the column {text_column!r} is {kind}, expected strings; name another with --text-column")


def _rows(batch: Any, text_column: str, extent: Extent, row: int, most_bytes: int) -> Iterator[Document | Problem]:
    # As bytes, whatever the file calls them: an invalid string stays as it is.
    column = pc.cast(batch.column(text_column), pa.large_binary())
    for number, text in enumerate(column, start=row + 1):
        where = f"{printable(extent.path)}, row {number}"
        if not text.is_valid:
            yield Problem(f"{where}: {text_column!r} is null, expected a string")
        elif len(content := text.as_py()) > most_bytes:
            yield Problem(f"{where}: longer than {most_bytes} bytes; {_TOO_LONG}")
        else:
            yield Document(f"{extent.doc_id}#R{number}", content)


def _read_hub(extent: Extent, text_column: str, most_bytes: int, report: Report) -> Iterator[Document | Problem]:
    dataset = hub_dataset(extent.path, extent.modified)
    if dataset.column_names and text_column not in dataset.column_names:
        yield Problem(
            f"hf:{extent.path}: no column {text_column!r} among {dataset.column_names}; name the text's column with "
            "--text-column"
        )
        return
    row = 0
    try:
        shard = dataset.shard(num_shards=extent.end, index=extent.begin).with_format("arrow")
        for table in shard.iter(_ROWS_AT_A_TIME):
            _check_column(table.schema, text_column)
            for batch in table.select([text_column]).combine_chunks().to_batches():
                yield from _rows(batch, text_column, extent, row, most_bytes)
                row += batch.num_rows
                report(batch.nbytes)
    except Exception as error:  # the library lets through what its many parts raise
        reason = f"hf:{extent.path}, file {extent.begin}, after row {row}: {' '.join(str(error).split())}"
        if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _NETWORK_MODULES:
            raise DataError(f"{reason} ({type(error).__name__}); start again to go on") from error
        yield Problem(f"{reason} ({type(error).__name__})")


def _open_lines(file: Any, extent: Extent, report: Report) -> Any:
    """Return what lines are read from."""
    path = extent.path.lower()
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=_Reporting(file, report))
    if path.endswith(".zst"):
        raw = pa.CompressedInputStream(pa.PythonFile(_Reporting(file, report)), "zstd")
        return io.BufferedReader(raw, _DECOMPRESSED_BYTES)
    # Files of object stores cannot read a line of bounded length.
    return io.BufferedReader(_Reporting(file, lambda _: None), 1 << 20) if is_remote(extent.path) else file


def _is_of_the_way(error: Exception, extent: Extent) -> bool:
    """Tell whether a disk or a network failed rather than the file being damaged: nothing to pass over."""
    damaged = "runcated" in str(error) or isinstance(error, EOFError | zlib.error | gzip.BadGzipFile)
    return getattr(error, "errno", None) is not None or (is_remote(extent.path) and not damaged)


class _Reporting(io.RawIOBase):
    """A file that reports what is read of it."""

    def __init__(self, file: Any, report: Report):
        self._file, self._report = file, report

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def read(self, size: int = -1) -> bytes:
        piece = self._file.read(size)
        self._report(len(piece))
        return piece

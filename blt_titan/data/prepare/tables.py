"""Read tables: Parquet, Arrow files and streams, a data set of the hub. Only the text's column leaves them."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blt_titan.data.prepare.extents import TOO_LONG, BadRecordError, Document, Extent, Problem, Report, is_of_the_way
from blt_titan.data.prepare.file_systems import printable
from blt_titan.data.prepare.sources import hub_dataset
from blt_titan.data.store.arrow_file import checked_text
from blt_titan.data.store.errors import DataError

_ARROW_MAGIC = b"ARROW1"
_MOST_PADDED_BYTES = 64
_ROWS_AT_A_TIME = 64
_BATCH_BYTES = 8 * 1024**2
"""Bytes of a table's rows that are read at once, about."""
_READ_ERRORS = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError, EOFError)
"""What Arrow and its bindings raise over damaged files."""
_NETWORK_MODULES = ("requests", "urllib3", "httpx", "httpcore", "aiohttp", "huggingface_hub", "fsspec", "asyncio")


def read_table(
    file: Any, extent: Extent, text_column: str, most_bytes: int, report: Report
) -> Iterator[Document | Problem]:
    """Yield the rows of an extent of a Parquet or Arrow file; arguments as `read_lines`."""
    row = extent.first
    try:
        for batch, share in _record_batches(file, extent, text_column):
            yield from _rows(batch, text_column, extent, row, most_bytes)
            row += batch.num_rows
            report(round(share * extent.size_bytes))
    except DataError:
        raise
    except (*_READ_ERRORS, BadRecordError) as error:
        if isinstance(error, OSError) and is_of_the_way(error, extent):
            raise
        # Arrow's messages of damage run over lines.
        reason = " ".join(str(error).split())
        what = "" if isinstance(error, BadRecordError) else f"cannot be read as {extent.format} from row {row + 1} on: "
        yield Problem(f"{printable(extent.path)}: {what}{reason}")


def _record_batches(file: Any, extent: Extent, text_column: str) -> Iterator[tuple[pa.RecordBatch, float]]:
    """Yield record batches of the text's column, each with its share of the extent."""
    if extent.format == "parquet":
        # Not the whole row group at once.
        table = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
        _check_column(table.schema_arrow, text_column)
        _check_begins_with_its_rows(file, table.metadata)
        groups = range(extent.begin, table.num_row_groups if extent.end < 0 else extent.end)
        metadata = [table.metadata.row_group(number) for number in groups]
        rows = sum(group.num_rows for group in metadata)
        n_bytes = sum(group.total_byte_size for group in metadata)
        at_a_time = max(1, min(_ROWS_AT_A_TIME, _BATCH_BYTES * rows // max(1, n_bytes)))
        for batch in table.iter_batches(at_a_time, row_groups=list(groups), columns=[text_column]):
            yield batch, batch.num_rows / rows
        return
    with pa.PythonFile(file, mode="r") as source:
        n_bytes, place = source.size(), 0
        if is_file := source.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC:
            source.seek(0)
            pa.ipc.open_file(source)  # or it says what is wrong with the end
            # What follows the magic is a stream. Its footer alone would not tell of another file in front of it.
            place = _begin_of_messages(source)
        while True:
            source.seek(place)
            schema = pa.ipc.open_stream(source).schema
            _check_column(schema, text_column)
            source.seek(place)
            only = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(text_column)])
            for batch in pa.ipc.open_stream(source, options=only):
                yield batch, (source.tell() - place) / n_bytes
                place = source.tell()
            place = source.tell()
            if is_file:
                _check_footer_follows(source, place, n_bytes)
                return
            if not _another_stream_follows(source, place, n_bytes):
                return


def _begin_of_messages(source: Any) -> int:
    """Return where the first message of an Arrow file lies: writers pad the magic to 8 bytes, or to as many as 64."""
    source.seek(0)
    head = source.read(_MOST_PADDED_BYTES + 8)
    words = range(8, _MOST_PADDED_BYTES + 1, 8)
    return next((place for place in words if head[place : place + 8].strip(b"\0")), 8)


def _check_footer_follows(source: Any, place: int, n_bytes: int) -> None:
    """Raise if anything lies between the last batch and the footer of an Arrow file, but zeros."""
    source.seek(n_bytes - len(_ARROW_MAGIC) - 4)
    footer = n_bytes - len(_ARROW_MAGIC) - 4 - int.from_bytes(source.read(4), "little")
    if footer < place or not _only_zeros(source, place, footer):
        raise BadRecordError(
            f"the Arrow file in it ends soon after byte {place}, and other bytes follow, as in two files that were "
            "joined; take them apart"
        )


def _another_stream_follows(source: Any, place: int, n_bytes: int) -> bool:
    """Tell whether an Arrow stream begins where one ended, as in streams that were joined."""
    if _only_zeros(source, place, n_bytes):
        return False
    source.seek(place)
    if source.read(4) != b"\xff" * 4:
        raise BadRecordError(
            f"the Arrow stream in it ends at byte {place}, and {n_bytes - place} bytes follow that are no "
            "stream; remove them, or fetch the file again"
        )
    return True


def _only_zeros(source: Any, begin: int, end: int) -> bool:
    source.seek(begin)
    while begin < end:
        piece = source.read(min(end - begin, 1 << 20))
        begin += len(piece)
        if piece.strip(b"\0"):
            return False
    return True


def _check_begins_with_its_rows(file: Any, metadata: pq.FileMetaData) -> None:
    """Raise if another Parquet file stands before this one: the offsets of the last would be read in the first."""
    if not metadata.num_row_groups:
        return
    group = metadata.row_group(metadata.num_row_groups - 1)
    columns = [group.column(i) for i in range(group.num_columns)]
    end = max((c.dictionary_page_offset or c.data_page_offset) + c.total_compressed_size for c in columns)
    n_bytes = file.seek(0, 2)
    footer = n_bytes - 8 - metadata.serialized_size
    # Between them may be indexes.
    file.seek(end)
    joint = file.read(max(0, footer - end)).find(b"PAR1PAR1")
    if joint >= 0:
        raise BadRecordError(
            f"a Parquet file ends in it at byte {end + joint + 4}, and another follows; take them apart"
        )


def _check_column(schema: pa.Schema, text_column: str) -> None:
    if text_column not in schema.names:
        raise BadRecordError(
            f"no column {text_column!r} among {schema.names}; name the text's column with --text-column"
        )
    if schema.names.count(text_column) > 1:
        raise BadRecordError(f"several columns {text_column!r} among {schema.names}; rename all but one")
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
        raise BadRecordError(f"the column {text_column!r} is {kind}, expected strings; name another with --text-column")


def _rows(batch: Any, text_column: str, extent: Extent, row: int, most_bytes: int) -> Iterator[Document | Problem]:
    # As bytes, whatever the file calls them: an invalid string stays as it is.
    column = pc.cast(checked_text(batch.column(text_column)), pa.large_binary())
    for number, text in enumerate(column, start=row + 1):
        where = f"{printable(extent.path)}, row {number}"
        if not text.is_valid:
            yield Problem(f"{where}: {text_column!r} is null, expected a string")
        elif len(content := text.as_py()) > most_bytes:
            yield Problem(f"{where}: longer than {most_bytes} bytes; {TOO_LONG}")
        else:
            yield Document(f"{extent.doc_id}#R{number}", content)


def read_hub(extent: Extent, text_column: str, most_bytes: int, report: Report) -> Iterator[Document | Problem]:
    """Yield the rows of an extent of the hub; arguments as `read_lines`."""
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

"""Arrow IPC files read without trust: no number in them is used before it was checked against the bytes it speaks of.

In: a mapped file, and the index beside it that says where each record batch's message lies. Out: the columns' buffers,
as views into the map. A message is metadata, a FlatBuffers table of numbers, and a body that the numbers point into:

    FFFFFFFF | metadata size | metadata: rows, a node a column, buffers | body: offsets, ids, offsets, text
                                         52 rows, no nulls  (0, 212) (216, 1758) ..   0 33 66 ..

The decision that is not obvious: Arrow does not parse messages here. A right checksum only says that the bytes are
those that somebody wrote. Arrow believes offsets until `validate(full=True)`, and by then it has decompressed what a
message of 256 KiB says it holds, which can be gigabytes. The few fields that a record batch needs are read below; all
that Arrow could do beyond is refused.
"""

import math
import os
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

_NPY_MAGIC = b"\x93NUMPY\x01\x00"
_CONTINUATION = 0xFFFFFFFF
_METADATA_V5 = 4
_RECORD_BATCH = 3


def map_file(path: str | os.PathLike[str]) -> Any:
    """Map a file; return the `pa.Buffer` over its content, which keeps the map but not the file descriptor."""
    with pa.memory_map(str(path)) as source:
        return source.read_buffer()


def parse_index(content: bytes, shape: tuple[int, int], file_bytes: int) -> np.ndarray:
    """Read the index of a file of `file_bytes`: int64 [record batches, 5], columns 0 and 1 offset and message length.

    Raises:
        ValueError: it is not such an array, or a record batch lies outside of the file or over another.
    """
    magic, header_bytes = struct.unpack_from("<8sH", content) if len(content) >= 10 else (b"", 0)
    numbers = content[10 + header_bytes :]
    # Compared rather than parsed: a header is Python source, and how it is padded is all that may differ.
    header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}".encode().split()
    if (magic, content[10 : 10 + header_bytes].split()) != (_NPY_MAGIC, header) or len(numbers) != 8 * math.prod(shape):
        raise ValueError(f"not an array of NumPy, int64 {shape}")
    index = np.frombuffer(numbers, np.int64).reshape(shape)
    if index.min() < 0:
        raise ValueError("a number is negative")
    offsets, lengths = index[np.argsort(index[:, 0], kind="stable"), :2].T
    # Subtracted rather than added: sums of what an index may hold overflow.
    if (lengths > np.append(offsets[1:], file_bytes) - offsets).any():
        raise ValueError("a record batch lies outside of the file, or over another")
    return index


def record_batch_buffers(message: Any, buffers_of_columns: Sequence[int]) -> tuple[int, list[np.ndarray]]:
    """Parse a message that holds one record batch without nulls and without compression.

    Args:
        message: its raw bytes, a buffer.
        buffers_of_columns: how many buffers each column has, the validity bitmap first: 3 of strings, 2 of numbers.

    Returns:
        The number of rows; and the columns' buffers but for the bitmaps, uint8, views that lie within the message. What
        the buffers hold is not checked yet, nor their sizes.

    Raises:
        ValueError: it is anything else.
    """
    content = memoryview(message)
    try:
        marker, metadata_bytes = struct.unpack_from("<II", content)
        if marker != _CONTINUATION or metadata_bytes > len(content) - 8:
            raise ValueError("no message begins there")
        metadata, body = bytes(content[8 : 8 + metadata_bytes]), np.frombuffer(content, np.uint8)[8 + metadata_bytes :]
        root = _Table(metadata, _number(metadata, 0, "<I"))
        if (root.scalar(0, "<h"), root.scalar(1, "<B")) != (_METADATA_V5, _RECORD_BATCH):
            raise ValueError("the message is not a record batch of metadata version 5")
        if root.scalar(3, "<q") != len(body):
            raise ValueError(f"the message says that its body has {root.scalar(3, '<q')} bytes, it has {len(body)}")
        header = root.table(2)
        if header.place(3):
            raise ValueError("it is compressed")
        rows = header.scalar(0, "<q")
        if rows < 0 or header.pairs(1, len(buffers_of_columns)) != [(rows, 0)] * len(buffers_of_columns):
            raise ValueError("a column has nulls, or another number of rows")
        places = header.pairs(2, sum(buffers_of_columns))
    except struct.error as error:
        raise ValueError("its metadata points outside of itself") from error
    bitmaps = set(np.cumsum([0, *buffers_of_columns[:-1]]).tolist())
    buffers, end = [], 0
    for number, (offset, size) in enumerate(places):
        if offset < end or size < 0 or offset + size > len(body):
            raise ValueError(f"buffer {number} lies outside of the message, or over another")
        end = offset + size
        if number not in bitmaps:
            buffers.append(body[offset:end])
        elif size:
            raise ValueError("a column has a bitmap of nulls")
    return rows, buffers


def checked_offsets(rows: int, offsets: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the offsets of a column of strings, int64 [rows + 1]: value i is `values[offsets[i] : offsets[i + 1]]`.

    Args:
        rows: of the record batch.
        offsets: the buffer, uint8, of little-endian int32.
        values: the buffer of the values' bytes, uint8.

    Raises:
        ValueError: they do not begin with 0, one is smaller than the one before, or the last is beyond the values.
    """
    if offsets.nbytes < 4 * (rows + 1):
        raise ValueError(f"{offsets.nbytes} bytes of offsets are too few for {rows} rows")
    checked = offsets[: 4 * (rows + 1)].view("<i4").astype(np.int64)
    if checked[0] != 0 or (checked[1:] < checked[:-1]).any() or checked[-1] > len(values):
        raise ValueError(f"offsets do not rise from 0 to at most the {len(values)} bytes that they point into")
    return checked


def check_utf8(offsets: np.ndarray, values: np.ndarray) -> None:
    """Raise ValueError unless every string of a column is valid UTF-8; offsets as `checked_offsets` returns them."""
    used = values[: offsets[-1]]
    str(used.data, "utf-8")
    # All valid as one, and none beginning within a character: each valid.
    if (used[offsets[offsets < len(used)]] & 0xC0 == 0x80).any():
        raise ValueError("a string begins within a character")


def checked_text(column: Any) -> Any:
    """Return a column of text that Arrow parsed, of strings, bytes or a dictionary of them, as bytes.

    For files of others, which may be compressed and hold nulls, and strings that are not UTF-8.

    Raises:
        pyarrow.ArrowInvalid: an offset or an index points outside of its buffer; Arrow would follow it.
    """
    if pa.types.is_dictionary(column.type):
        return pa.DictionaryArray.from_arrays(column.indices, checked_text(column.dictionary))
    as_bytes = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    column = column.view(as_bytes.get(column.type, column.type))
    column.validate(full=True)
    return column


class _Table:
    """A table of a FlatBuffer; struct.error where it points outside of the buffer."""

    def __init__(self, buffer: bytes, at: int):
        self._buffer, self._at = buffer, at
        self._fields = at - _number(buffer, at, "<i")
        self._fields_bytes = _number(buffer, self._fields, "<H")

    def place(self, field: int) -> int:
        """Return where a field's value lies, 0 if it is absent."""
        entry = 4 + 2 * field
        relative = _number(self._buffer, self._fields + entry, "<H") if entry + 2 <= self._fields_bytes else 0
        return self._at + relative if relative else 0

    def scalar(self, field: int, kind: str) -> int:
        """Return a number; absent, it is 0."""
        at = self.place(field)
        return _number(self._buffer, at, kind) if at else 0

    def table(self, field: int) -> "_Table":
        """Return the table that a field points to."""
        return _Table(self._buffer, self._target(field))

    def pairs(self, field: int, count: int) -> list[tuple[int, int]]:
        """Return a vector of structs of two int64; ValueError unless there are `count`."""
        at = self._target(field)
        if (found := _number(self._buffer, at, "<I")) != count:
            raise ValueError(f"{found} columns or buffers, expected {count}")
        numbers = struct.unpack_from(f"<{2 * count}q", self._buffer, at + 4)
        return list(zip(numbers[::2], numbers[1::2], strict=True))

    def _target(self, field: int) -> int:
        at = self.place(field)
        if not at:
            raise struct.error("no such field")
        return at + _number(self._buffer, at, "<I")


def _number(buffer: bytes, at: int, kind: str) -> int:
    if at < 0:  # which `struct` would count from the end
        raise struct.error("before the buffer")
    return struct.unpack_from(kind, buffer, at)[0]

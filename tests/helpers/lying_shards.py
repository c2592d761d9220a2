"""Shards whose record batches are changed, and with them every checksum, so that only what they hold is wrong."""

import hashlib
import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from blt_titan.data.store.shards import SCHEMA

Edit = Callable[[bytearray], Any]
"""Changes a message in place, or returns another."""


def rewrite(directory: Path, edit: Edit, *, batch: int = 0, shard: str = "train-00000", listed="manifest.json") -> None:
    """Change a record batch of a shard, or of a sidecar where `listed` is its `sidecar.json`."""
    path = directory / f"{shard}.arrow"
    index = np.load(path.with_suffix(".index.npy"))
    content = path.read_bytes()
    messages = [bytearray(content[offset : offset + length]) for offset, length in index[:, :2].tolist()]
    edited = edit(messages[batch])
    messages[batch] = messages[batch] if edited is None else bytearray(edited)
    write_shard(directory, messages, index, shard=shard, listed=listed)


def write_shard(
    directory: Path,
    messages: list[bytearray],
    index: np.ndarray,
    *,
    shard: str = "train-00000",
    listed: str = "manifest.json",
    edit_index: Callable[[np.ndarray], np.ndarray] = lambda index: index,
    edit_index_bytes: Edit = lambda content: None,
    edit_entry: Callable[[dict[str, Any]], None] = lambda entry: None,
) -> None:
    """Write messages as a shard, the last at its end, with an index and an entry whose checksums are right."""
    content, index = bytearray(b"ARROW1\0\0"), index.copy()
    for row, message in zip(index, messages, strict=True):
        row[0], row[1], row[-1] = len(content), len(message), zlib.crc32(message)
        content += message
    content += b"ARROW1"
    written = io.BytesIO()
    np.save(written, edit_index(index))
    index_bytes = bytearray(written.getvalue())
    edit_index_bytes(index_bytes)
    (directory / f"{shard}.arrow").write_bytes(content)
    (directory / f"{shard}.index.npy").write_bytes(index_bytes)
    manifest = json.loads((directory / listed).read_bytes())
    shards = manifest["shards"] if "shards" in manifest else [s for of in manifest["splits"].values() for s in of]
    [entry] = [entry for entry in shards if entry["file"] == f"{shard}.arrow"]
    entry |= {"file_bytes": len(content), "index_sha256": hashlib.sha256(index_bytes).hexdigest()}
    edit_entry(entry)
    (directory / listed).write_text(json.dumps(manifest))


def places(message: bytes | bytearray, schema: pa.Schema = SCHEMA) -> list[list[tuple[int, int]]]:
    """Return where a sound message keeps each column's buffers: offset and bytes, 0 and 0 of a bitmap it has not."""
    batch, begin = batch_of(message, schema)
    return [[(b.address - begin, b.size) if b else (0, 0) for b in column.buffers()] for column in batch]


def batch_of(message: bytes | bytearray, schema: pa.Schema = SCHEMA) -> tuple[pa.RecordBatch, int]:
    """Return what a sound message holds, and the address of the copy of it that the record batch points into."""
    buffer = pa.py_buffer(bytes(message))
    return pa.ipc.read_record_batch(pa.ipc.read_message(buffer), schema), buffer.address


def message_of(batch: pa.RecordBatch, **options) -> bytes:
    """Return the message of a record batch as Arrow writes it with these options."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_batch(batch)  # the schema goes before it
        begin = sink.tell()
        writer.write_batch(batch)
        end = sink.tell()
    return sink.getvalue().to_pybytes()[begin:end]


def set_offset(column: str, row: int, value: int) -> Edit:
    """Return an edit that sets one offset of a column of text."""

    def edit(message: bytearray) -> None:
        begin, n_bytes = places(message)[SCHEMA.get_field_index(column)][1]
        at = begin + 4 * (row % (n_bytes // 4))
        message[at : at + 4] = value.to_bytes(4, "little", signed=True)

    return edit


def replace_metadata(old: int, new: int, occurrence: int = 0) -> Edit:
    """Return an edit that sets one 64-bit number of the metadata, found by its value."""

    def edit(message: bytearray) -> None:
        metadata_bytes = int.from_bytes(message[4:8], "little")
        numbers = np.frombuffer(message, "<i8", (8 + metadata_bytes) // 8)
        at = 8 * int(np.flatnonzero(numbers == old)[occurrence])
        message[at : at + 8] = new.to_bytes(8, "little", signed=True)

    return edit

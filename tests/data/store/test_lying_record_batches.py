"""Record batches and indices that lie, with right checksums: damage that is named, never a crash."""

import hashlib
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from blt_titan.data.prepare.documents import read_documents
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.shards import SCHEMA, ShardSet
from tests.helpers.lying_shards import (
    Edit,
    batch_of,
    message_of,
    places,
    replace_metadata,
    rewrite,
    set_offset,
    write_shard,
)
from tests.helpers.shard_files import (
    edit_manifest,
    write,
)


def in_values(column: int, value: bytes) -> Edit:
    """Return an edit that writes over what a column's offsets point to."""

    def edit(message: bytearray) -> None:
        begin, _ = places(message)[column][2]
        message[begin : begin + len(value)] = value

    return edit


def as_arrow_writes(change=lambda batch: batch, **options) -> Edit:
    """Return an edit that lets Arrow write the record batch otherwise."""
    return lambda message: message_of(change(batch_of(message)[0]), **options)


def with_null(batch: pa.RecordBatch) -> pa.RecordBatch:
    return pa.record_batch([batch[0], pa.array([None, *batch[1].to_pylist()[1:]], pa.binary())], schema=SCHEMA)


def with_large_offsets(batch: pa.RecordBatch) -> pa.RecordBatch:
    return pa.record_batch([batch[0].cast(pa.large_string()), batch[1].cast(pa.large_binary())], ["doc_id", "text"])


ROWS = 4


NO_BATCH = r"record batch 1: not a record batch of byte documents \(%s"


RISE = NO_BATCH % "offsets do not rise from 0"


LIES: dict[str, tuple[Edit, str]] = {
    **{
        f"{column}_{name}": (set_offset(column, row, value), RISE)
        for column in ("doc_id", "text")
        for name, row, value in [
            *(("far", 2, 2**31 - 1), ("negative", 2, -(2**31)), ("falling", 2, 0), ("first", 0, 1)),
            *(("first_negative", 0, -1), ("last_beyond", -1, 2**20)),
        ]
    },
    "text_short": (set_offset("text", -1, 900), "its index says"),
    "rows": (replace_metadata(ROWS, 2**40), NO_BATCH % "a column has nulls, or another number of rows"),
    "rows_of_column": (replace_metadata(ROWS, ROWS + 1, 2), NO_BATCH % "a column has nulls"),
    "text_of_no_size": (replace_metadata(997, 0), RISE),
    "text_beyond": (replace_metadata(997, 2**62), NO_BATCH % "buffer 5 lies outside of the message"),
    "offsets_of_few_bytes": (replace_metadata(4 * ROWS + 4, 4 * ROWS, 1), NO_BATCH % "16 bytes of offsets are too few"),
    "text_before": (replace_metadata(72, -8), NO_BATCH % "buffer 5 lies outside of the message"),
    "not_utf8": (in_values(0, b"\xff"), NO_BATCH % "'utf-8' codec can't decode"),
    "within_a_character": (in_values(0, "abcdé".encode()), NO_BATCH % "a string begins within a character"),
    "compressed": (as_arrow_writes(compression="zstd"), NO_BATCH % "it is compressed"),
    "null": (as_arrow_writes(with_null), NO_BATCH % "a column has nulls"),
    "large_offsets": (as_arrow_writes(with_large_offsets), RISE),
    "version": (as_arrow_writes(metadata_version=pa.ipc.MetadataVersion.V4), NO_BATCH % ".*metadata version 5"),
    "schema_message": (
        lambda message: SCHEMA.serialize().to_pybytes() + bytes(1000),
        NO_BATCH % "the message is not a record batch",
    ),
    "cut": (lambda message: message[:-8], NO_BATCH % "the message says that its body has"),
    "zeros": (lambda message: bytes(len(message)), NO_BATCH % "no message begins there"),
    "metadata_size": (lambda message: message[:4] + b"\xff\xff\xff\x7f" + message[8:], NO_BATCH % "no message begins"),
    "table": (
        lambda message: message[:8] + b"\xff\xff\xff\x7f" + message[12:],
        NO_BATCH % "its metadata points outside",
    ),
}


@pytest.fixture
def two_batches(tmp_path) -> Path:
    """One document, then four: their lies below are in the second record batch."""
    rng = np.random.default_rng(0)
    write(tmp_path, [(f"name{i}", rng.bytes(size)) for i, size in enumerate([990, 500, 0, 400, 97])])
    assert [batch.rows for batch in ShardSet(tmp_path, "train")] == [1, 4]
    return tmp_path


@pytest.mark.parametrize("lie", LIES)
def test_a_record_batch_that_lies_is_damage_although_its_checksum_is_right(two_batches, lie):
    edit, message = LIES[lie]
    rewrite(two_batches, edit, batch=1)
    shard_set = ShardSet(two_batches, "train")
    shard_set.verify_structure()
    shard_set.read(0)
    for check in (
        lambda: shard_set.read(1),
        shard_set.verify_checksums,
        lambda: list(read_documents(two_batches, split="train")),
    ):
        with pytest.raises(DataError, match=rf"train-00000\.arrow: .*{message}"):
            check()


def test_changed_text_with_right_checksums_reads(two_batches):
    rewrite(two_batches, set_offset("text", 1, 499), batch=1)
    assert np.diff(ShardSet(two_batches, "train").read(1).offsets).tolist() == [499, 1, 400, 97]


@pytest.mark.parametrize(
    ("column", "value"),
    [(0, -8), (0, 2**63 - 1), (0, 2**40), (1, 2**63 - 1), (1, 2**40), (1, -1), (2, -1), (3, 2**62), (0, 8)],
)
def test_an_index_row_that_lies_is_refused(two_batches, column, value):
    index = np.load(two_batches / "train-00000.index.npy")

    def lie(index: np.ndarray) -> np.ndarray:
        index[1, column] = value  # offset 8 is where the other record batch lies
        return index

    content = (two_batches / "train-00000.arrow").read_bytes()
    messages = [bytearray(content[offset : offset + length]) for offset, length in index[:, :2].tolist()]
    write_shard(two_batches, messages, index, edit_index=lie)
    with pytest.raises(DataError, match=r"train-00000\.index\.npy: does not fit its shard"):
        ShardSet(two_batches, "train").read(0)


@pytest.mark.parametrize("content", [b"", b"PK\3\4" + bytes(100), b"\x93NUMPY\1\0\xff\xff" + b"(" * 60_000])
def test_an_index_that_is_no_array_is_refused(two_batches, content):
    (two_batches / "train-00000.index.npy").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    edit_manifest(two_batches, lambda manifest: manifest["splits"]["train"][0].update(index_sha256=digest))
    with pytest.raises(DataError, match=r"train-00000\.index\.npy: .*: not an array of NumPy"):
        ShardSet(two_batches, "train").read(0)


@pytest.mark.parametrize(
    "index",
    [np.zeros((1, 5), np.int64), np.zeros((3, 4), np.int64), np.full((2, 5), 2**40), np.zeros((2, 5), np.float64)],
)
def test_an_index_that_does_not_fit_its_shard_is_refused(tmp_path, index):
    write(tmp_path, [("a", b"aaaa"), ("b", b"bbbb")], record_batch_bytes=1)
    path = tmp_path / "train-00000.index.npy"
    np.save(path, index)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_manifest(tmp_path, lambda content: content["splits"]["train"][0].update(index_sha256=digest))
    with pytest.raises(DataError, match="does not fit its shard"):
        ShardSet(tmp_path, "train").read(0)


def test_an_arrow_message_of_another_kind_is_refused(tmp_path):
    schema = pa.schema([("text", pa.int32())])
    batch = pa.record_batch([pa.array([1, 2], pa.int32())], schema=schema)
    write(tmp_path, [("a", b"aaaa")])
    shard_path, index_path = tmp_path / "train-00000.arrow", tmp_path / "train-00000.index.npy"
    with pa.ipc.new_file(shard_path, schema) as writer:
        writer.write_batch(batch)
    raw, message = shard_path.read_bytes(), batch.serialize().to_pybytes()
    np.save(index_path, np.array([[raw.index(message), len(message), 1, 4, zlib.crc32(message)]]))
    digest = hashlib.sha256(index_path.read_bytes()).hexdigest()
    entry = {"index_sha256": digest, "file_bytes": len(raw)}
    edit_manifest(tmp_path, lambda content: content["splits"]["train"][0].update(entry))
    with pytest.raises(DataError, match=r"train-00000\.arrow: record batch 0"):
        ShardSet(tmp_path, "train").read(0)

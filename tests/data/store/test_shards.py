import hashlib
import json
import pickle
import zlib
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from blt_titan.data.prepare.documents import read_documents
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.manifest import (
    MANIFEST_NAME,
    Counts,
    Manifest,
    ShardEntry,
    SourceCounts,
    read_manifest,
    write_manifest,
)
from blt_titan.data.store.shards import SCHEMA, ShardSet, ShardWriter, install
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

Documents = list[tuple[str, bytes]]


def write(directory: Path, documents: Documents, *, record_batch_bytes=1000, shard_bytes=2**30) -> None:
    """Write a data set whose train split is `documents`, in this order, and whose validation split is empty."""
    directory.mkdir(exist_ok=True)
    writer = ShardWriter(directory, "train", record_batch_bytes=record_batch_bytes, shard_bytes=shard_bytes)
    for begin, end in pairwise((0, len(documents) // 3, len(documents))):
        ids, texts = zip(*documents[begin:end], strict=True) if end > begin else ((), ())
        writer.add(pa.array(ids, pa.string()), pa.array(texts, pa.binary()))
    shards = writer.finish()
    install(directory, shards)
    counts = Counts(len(documents), sum(len(text) for _, text in documents), 0, 0, 0)
    write_manifest(directory, Manifest({}, counts, {"train": shards, "validation": ()}))


def read_all(shard_set: ShardSet) -> Documents:
    return [(doc_id, batch.document(row).tobytes()) for batch in shard_set for row, doc_id in enumerate(batch.doc_ids)]


def random_documents(count: int, mean_bytes: int, seed: int = 0) -> Documents:
    rng = np.random.default_rng(seed)
    return [(f"d{i}", rng.bytes(int(rng.integers(2 * mean_bytes)))) for i in range(count)]


def edit_manifest(directory: Path, edit) -> None:
    path = directory / MANIFEST_NAME
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


SOURCE_COUNTS = [field.name for field in fields(SourceCounts)]


@pytest.fixture
def three_shards(tmp_path) -> Path:
    write(tmp_path, random_documents(60, 200), shard_bytes=5000)
    assert len(read_manifest(tmp_path).splits["train"]) >= 3
    return tmp_path


AWKWARD = [
    ("random", np.random.default_rng(0).bytes(3000)),
    ("empty", b""),
    ("not UTF-8", b"\xff\xfe\x80 caf\xe9 \xed\xa0\x80"),
    ("NULs and line ends", b"\0\0\r\n\n\r"),
    ("long", bytes(range(256)) * (5_000_000 // 256)),
    ("naïve/ünïcode #L1", "é".encode()),
    ("empty at the end", b""),
]


@pytest.mark.parametrize("record_batch_bytes", [1, 1000, 2**26])
def test_documents_come_back_byte_for_byte(tmp_path, record_batch_bytes):
    write(tmp_path, AWKWARD, record_batch_bytes=record_batch_bytes)
    shard_set = ShardSet(tmp_path, "train")
    assert read_all(shard_set) == AWKWARD
    assert shard_set.documents == len(AWKWARD)
    assert shard_set.text_bytes == sum(len(text) for _, text in AWKWARD)


def test_a_record_batch_of_empty_documents_reads(tmp_path):
    write(tmp_path, [("a", b""), ("b", b"")])
    (batch,) = ShardSet(tmp_path, "train")
    assert batch.text.shape == (0,)
    assert batch.offsets.tolist() == [0, 0, 0]


def test_record_batches_hold_whole_documents_of_about_the_given_size(tmp_path):
    write(tmp_path, [(str(n), b"x" * n) for n in (400, 500, 200, 3000, 10, 20)])
    assert [np.diff(batch.offsets).tolist() for batch in ShardSet(tmp_path, "train")] == [
        [400, 500],
        [200],
        [3000],
        [10, 20],
    ]


def test_arrow_itself_reads_a_shard(tmp_path):
    write(tmp_path, AWKWARD)
    table = pa.ipc.open_file(tmp_path / "train-00000.arrow").read_all()
    assert table.column_names == ["doc_id", "text"]
    assert list(zip(table["doc_id"].to_pylist(), table["text"].to_pylist(), strict=True)) == AWKWARD


def test_text_is_a_read_only_view_that_outlives_the_reader(tmp_path):
    documents = random_documents(10, 500)
    write(tmp_path, documents, shard_bytes=1)
    shard_set = ShardSet(tmp_path, "train", max_open_shards=1)
    batches = list(shard_set)  # every shard but the last is closed again
    del shard_set
    assert b"".join(batch.text.tobytes() for batch in batches) == b"".join(text for _, text in documents)
    assert all(batch.text.dtype == np.uint8 and batch.offsets.dtype == np.int64 for batch in batches)
    assert all(batch.offsets.shape == (batch.rows + 1,) for batch in batches)
    assert not batches[0].text.flags.writeable
    assert not batches[0].text.flags.owndata


def test_record_batches_are_numbered_across_shards(three_shards):
    shard_set = ShardSet(three_shards, "train")
    shards = read_manifest(three_shards).splits["train"]
    assert len(shard_set) == sum(shard.record_batches for shard in shards)
    infos = [shard_set.record_batch_info(i) for i in range(len(shard_set))]
    expected = [(shard.file, n) for shard in shards for n in range(shard.record_batches)]
    assert [(info.shard_path.name, info.batch_in_shard) for info in infos] == expected
    for i, info in enumerate(infos):
        batch = shard_set.read(i)
        assert (batch.shard_path, batch.batch_in_shard) == (info.shard_path, info.batch_in_shard)
        assert (batch.rows, len(batch.text)) == (info.rows, info.text_bytes)
    for outside in (-1, len(shard_set)):
        with pytest.raises(IndexError, match=f"record batch {outside} is outside"):
            shard_set.read(outside)


def test_shards_stay_below_their_size_but_for_footers(three_shards):
    footer_bytes = 2000
    assert all(shard.file_bytes < 5000 + footer_bytes for shard in read_manifest(three_shards).splits["train"])


def test_no_more_shards_are_open_than_allowed(three_shards):
    shard_set = ShardSet(three_shards, "train", max_open_shards=2)
    for _ in shard_set:
        assert len(shard_set._open) <= 2


def test_a_reader_pickles_without_its_open_files(three_shards):
    shard_set = ShardSet(three_shards, "train")
    before = read_all(shard_set)
    copy = pickle.loads(pickle.dumps(shard_set))
    assert not copy._open
    assert read_all(copy) == before
    assert copy.fingerprint == shard_set.fingerprint


def test_fingerprint_identifies_the_content(tmp_path):
    documents = random_documents(20, 200)
    changed = [*documents[:-1], (documents[-1][0], documents[-1][1] + b"!")]
    for name, content in (("a", documents), ("b", documents), ("c", changed)):
        write(tmp_path / name, content)
    a, b, c = (ShardSet(tmp_path / name, "train").fingerprint for name in "abc")
    assert a == b != c


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_a_flipped_byte_names_file_and_record_batch(tmp_path, share):
    write(tmp_path, random_documents(30, 200))
    info = ShardSet(tmp_path, "train").record_batch_info(2)
    flip(info.shard_path, info.offset + int(share * (info.length - 1)))
    shard_set = ShardSet(tmp_path, "train")
    shard_set.verify_structure()
    for check in (lambda: shard_set.read(2), shard_set.verify_checksums):
        with pytest.raises(DataError, match=r"train-00000\.arrow: record batch 2: .*crc32"):
            check()
    shard_set.read(1)
    shard_set.read(3)


def test_sound_data_verifies(three_shards):
    shard_set = ShardSet(three_shards, "train")
    assert shard_set.verify_structure() is None
    assert shard_set.verify_checksums() is None
    # What was verified is every file that the manifest names.
    (three_shards / "train-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"train-00002\.arrow"):
        shard_set.verify_structure()


def test_a_truncated_shard_is_refused_at_construction(three_shards):
    path = three_shards / "train-00001.arrow"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"train-00001\.arrow: \d+ bytes, manifest\.json says \d+"):
        ShardSet(three_shards, "train")


@pytest.mark.parametrize("name", ["train-00001.arrow", "train-00001.index.npy"])
def test_a_missing_file_is_refused_at_construction(three_shards, name):
    (three_shards / name).unlink()
    with pytest.raises(DataError, match=f"{name}: No such file"):
        ShardSet(three_shards, "train")


def test_garbage_of_the_right_size_is_refused(three_shards):
    path = three_shards / "train-00000.arrow"
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))
    shard_set = ShardSet(three_shards, "train")
    for check in (lambda: shard_set.read(0), shard_set.verify_structure):
        with pytest.raises(DataError, match=r"train-00000\.arrow: not an Arrow IPC file"):
            check()


def test_a_tampered_index_is_refused(three_shards):
    flip(three_shards / "train-00000.index.npy", 140)
    shard_set = ShardSet(three_shards, "train")
    for check in (lambda: shard_set.read(0), shard_set.verify_structure):
        with pytest.raises(DataError, match=r"train-00000\.index\.npy: does not match its digest"):
            check()


def test_swapped_shards_of_one_size_are_refused(tmp_path):
    write(tmp_path, [("a", b"aaaa"), ("b", b"bbbb")], record_batch_bytes=1, shard_bytes=1)
    a, b = (tmp_path / "train-00000.arrow", tmp_path / "train-00001.arrow")
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)
    with pytest.raises(DataError, match=r"record batch 0: .*crc32"):
        ShardSet(tmp_path, "train").read(0)


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


def test_an_empty_or_unknown_split_is_refused(three_shards):
    with pytest.raises(DataError, match="split 'validation' holds no documents"):
        ShardSet(three_shards, "validation")
    with pytest.raises(DataError, match="no split 'test'; it may be one of train, validation"):
        ShardSet(three_shards, "test")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(version=2), "version 2 is unknown"),
        (lambda c: c.update(format="parquet"), "format 'parquet'"),
        (lambda c: c.pop("format"), "format None"),
        (lambda c: c.pop("counts"), "malformed"),
        (lambda c: c["splits"].pop("train"), "malformed"),
        (lambda c: c["splits"]["train"][0].update(surplus=1), "malformed"),
        (lambda c: c["splits"]["train"][0].update(file_bytes="many"), "file_bytes must be a whole number"),
        (lambda c: c["splits"]["train"][0].update(file="../elsewhere.arrow"), "plain file name"),
        (lambda c: c["splits"]["train"][0].update(file="train\0.arrow"), "plain file name"),
        (lambda c: c["splits"]["train"][0].update(record_batches=2**63), "record_batches must be at most file_bytes"),
        (lambda c: c["splits"]["train"].append(c["splits"]["train"][0]), "a file is named twice"),
        (lambda c: c["splits"].update(validation=c["splits"]["train"]), "a file is named twice"),
        (lambda c: c["counts"].update(documents=1), "counts say 1 documents"),
        (lambda c: c["settings"].update(sources=1), "sources must be a list"),
        (lambda c: c.update(sources=[dict.fromkeys(SOURCE_COUNTS, "many")]), "documents must be a whole number"),
        (lambda c: c.update(sources=[dict.fromkeys(SOURCE_COUNTS, 1)]), "source must be a string"),
    ],
)
def test_an_unknown_or_malformed_manifest_is_refused(three_shards, edit, message):
    edit_manifest(three_shards, edit)
    with pytest.raises(DataError, match=rf"manifest\.json: .*{message}"):
        ShardSet(three_shards, "train")


def test_a_manifest_that_is_missing_or_not_json_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"manifest\.json: no such file"):
        ShardSet(tmp_path, "train")
    for content in ("{", "[]", "\xff"):
        (tmp_path / MANIFEST_NAME).write_text(content, encoding="latin-1")
        with pytest.raises(DataError, match=r"manifest\.json"):
            ShardSet(tmp_path, "train")


def test_a_manifest_round_trips(tmp_path):
    shard = ShardEntry("train-00000.arrow", "train-00000.index.npy", "00", 9, 1, 1, 1)
    manifest = Manifest({"seed": 1, "max_bytes": None}, Counts(1, 1, 2, 3, 4), {"train": (shard,), "validation": ()})
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]

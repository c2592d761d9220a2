import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from blt_titan.data.store.errors import DataError
from blt_titan.data.store.manifest import (
    read_manifest,
)
from blt_titan.data.store.shards import ShardSet
from tests.helpers.shard_files import random_documents, read_all, write

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


def test_an_empty_or_unknown_split_is_refused(three_shards):
    with pytest.raises(DataError, match="split 'validation' holds no documents"):
        ShardSet(three_shards, "validation")
    with pytest.raises(DataError, match="no split 'test'; it may be one of train, validation"):
        ShardSet(three_shards, "test")

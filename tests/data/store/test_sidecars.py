"""Sidecars: what goes in comes out, rounded once; everything that does not fit is named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from blt_titan.data.prepare.job import prepare
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.manifest import SPLITS, read_manifest
from blt_titan.data.store.shards import ShardSet
from blt_titan.data.store.sidecars import (
    SIDECAR_NAME,
    EntropySidecar,
    SidecarSettings,
    SidecarWriter,
    begin_sidecar,
    complete_sidecar,
    is_done,
    sidecar_directory,
)
from blt_titan.patching.rounding import UINT8_EDGES_NATS, from_storage, to_storage
from tests.helpers.lying_shards import batch_of, message_of, places, replace_metadata, rewrite, write_shard

SETTINGS = SidecarSettings("float16", {"window": 8, "reset_at_newline": False}, "abc", "float32")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Three shards and more of train, one of validation."""
    directory = tmp_path_factory.mktemp("entropies")
    rng = np.random.default_rng(0)
    (directory / "source").mkdir()
    for i in range(40):
        (directory / "source" / f"{i}.txt").write_bytes(rng.integers(32, 127, 100 + 20 * i, np.uint8).tobytes())
    prepare(
        [directory / "source"],
        directory / "data",
        validation_fraction=0.1,
        seed=0,
        record_batch_bytes=1000,
        shard_bytes=8000,
        progress=False,
    )
    return directory / "data"


@pytest.fixture
def data(text, tmp_path) -> Path:
    shutil.copytree(text, tmp_path / "data")
    return tmp_path / "data"


def entropies_of(shard: str, batch: int, size: int) -> np.ndarray:
    return np.random.default_rng([batch, *shard.encode()]).gamma(1.5, 0.6, size).astype(np.float32)


def score(data: Path, settings: SidecarSettings = SETTINGS, *, shards: int | None = None) -> None:
    """Write made-up entropies, record batches backwards."""
    begin_sidecar(data, "default", settings)
    left = shards
    for split in SPLITS:
        shard_set = ShardSet(data, split)
        batches = list(shard_set)
        for entry in shard_set.entries:
            if left is not None and (left := left - 1) < 0:
                return
            writer = SidecarWriter(sidecar_directory(data, "default"), entry, settings.storage)
            for batch in reversed([batch for batch in batches if batch.shard_path.name == entry.file]):
                h = entropies_of(entry.file, batch.batch_in_shard, len(batch.text))
                writer.add(batch.batch_in_shard, h, batch.crc32)
            writer.finish()
    complete_sidecar(data, "default", settings)


def sidecar_of(data: Path, split: str = "train") -> EntropySidecar:
    return EntropySidecar(data, "default", ShardSet(data, split))


@pytest.mark.parametrize("storage", ["float16", "uint8"])
def test_what_is_read_is_what_was_written_and_rounded(data, storage):
    score(data, SETTINGS._replace(storage=storage))
    for split in SPLITS:
        shards, sidecar = ShardSet(data, split), sidecar_of(data, split)
        assert sidecar.settings == SETTINGS._replace(storage=storage)
        sidecar.verify_structure()
        for batch in shards:
            written = entropies_of(batch.shard_path.name, batch.batch_in_shard, len(batch.text))
            expected = from_storage(to_storage(written, storage))
            np.testing.assert_array_equal(sidecar(batch), expected)
            assert sidecar(batch).dtype == np.float32
    assert not list(sidecar_directory(data, "default").glob("*.tmp"))


@pytest.mark.parametrize(("storage", "bytes_each"), [("float16", 2), ("uint8", 1)])
def test_storage_is_two_bytes_or_one_for_each_of_text(data, storage, bytes_each):
    score(data, SETTINGS._replace(storage=storage))
    for shard in read_manifest(data).splits["train"]:
        stored = (sidecar_directory(data, "default") / shard.file).stat().st_size
        framing = 400 * (shard.record_batches + 4)
        assert bytes_each * shard.text_bytes <= stored <= bytes_each * shard.text_bytes + framing


def test_codes_of_one_byte_keep_the_order_and_the_edges():
    h = np.sort(np.random.default_rng(0).gamma(1.5, 0.8, 10_000)).astype(np.float32)
    h[0] = 0.0
    codes = to_storage(h, "uint8")
    assert (np.diff(codes.astype(int)) >= 0).all()
    decoded = from_storage(codes)
    # A threshold on an edge decides alike for what was stored and for what was measured.
    for edge in UINT8_EDGES_NATS[::16]:
        np.testing.assert_array_equal(decoded > edge, h > edge)
    between = (h > UINT8_EDGES_NATS[0]) & (h < UINT8_EDGES_NATS[-1])
    assert (np.abs(decoded / np.maximum(h, 1e-9) - 1)[between] < 0.02).all()


def test_an_incomplete_sidecar_is_not_read_and_says_how_to_go_on(data):
    with pytest.raises(DataError, match=r"sidecar\.json: no such file.*blt-titan score"):
        sidecar_of(data)
    score(data, shards=2)
    shards = [shard for split in SPLITS for shard in read_manifest(data).splits[split]]
    directory = sidecar_directory(data, "default")
    assert [is_done(directory, shard) for shard in shards] == [True, True] + [False] * (len(shards) - 2)
    assert not complete_sidecar(data, "default", SETTINGS)
    with pytest.raises(DataError, match="let scoring finish"):
        sidecar_of(data)


def test_settings_are_kept_from_the_beginning(data):
    begin_sidecar(data, "default", SETTINGS)
    begin_sidecar(data, "default", SETTINGS)
    other = SETTINGS._replace(weights_sha256="other", compute_dtype="bfloat16")
    with pytest.raises(DataError, match="made with another weights_sha256, compute_dtype"):
        begin_sidecar(data, "default", other)
    score(data)
    begin_sidecar(data, "default", SETTINGS)
    with pytest.raises(DataError, match="made with another"):
        begin_sidecar(data, "default", other)


def test_a_flipped_byte_is_found(data):
    score(data)
    path = sidecar_directory(data, "default") / "train-00000.arrow"
    content = bytearray(path.read_bytes())
    index = np.load(path.with_suffix("").with_suffix(".index.npy"))
    content[index[1, 0] + index[1, 1] // 2] ^= 1
    path.write_bytes(content)
    batches, sidecar = list(ShardSet(data, "train")), sidecar_of(data)
    sidecar(batches[0])
    with pytest.raises(DataError, match=r"default/train-00000\.arrow: record batch 1: does not match its crc32"):
        sidecar(batches[1])


def set_value(value: float, storage: str = "float16"):
    """Return an edit that sets the third entropy of a record batch."""

    def edit(message: bytearray) -> None:
        begin, _ = places(message, pa.schema({"entropies_nats": storage}))[0][1]
        message[begin + 4 : begin + 6] = np.float16(value).tobytes()

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_value(np.nan), "entropies must be finite and not negative"),
        (set_value(np.inf), "entropies must be finite and not negative"),
        (set_value(-1.0), "entropies must be finite and not negative"),
        (
            lambda m: replace_metadata(2 * values_of(m), 2 * values_of(m) - 1, -1)(m),
            r"holds (\d+) entropies in \d+ bytes",
        ),
        (lambda m: replace_metadata(2 * values_of(m), 2**62, -1)(m), "buffer 1 lies outside of the message"),
        (lambda m: replace_metadata(values_of(m), 2**40)(m), "a column has nulls, or another number of rows"),
        (lambda m: message_of(batch_of(m, FLOAT16)[0], compression="zstd"), "it is compressed"),
        (lambda m: message_of(as_uint8(batch_of(m, FLOAT16)[0])), r"holds (\d+) entropies in \d+ bytes, expected \1"),
    ],
    ids=["nan", "inf", "negative", "buffer_too_small", "buffer_outside", "rows", "compressed", "another_type"],
)
def test_a_record_batch_that_lies_is_damage_although_its_checksum_is_right(data, edit, message):
    score(data)
    directory, batches = sidecar_directory(data, "default"), list(ShardSet(data, "train"))
    [shard, *_] = read_manifest(data).splits["train"]
    rewrite(directory, edit, batch=1, listed=SIDECAR_NAME)
    sidecar = sidecar_of(data)
    sidecar.verify_structure()
    sidecar(batches[0])
    with pytest.raises(DataError, match=rf"default/train-00000\.arrow: record batch 1: {message}"):
        sidecar(batches[1])
    # `score_entropies --verify` scores it again.
    entries = {entry["file"]: entry for entry in json.loads((directory / SIDECAR_NAME).read_bytes())["shards"]}
    (directory / f"{shard.file}.done.json").write_text(json.dumps(entries[shard.file]))
    assert is_done(directory, shard)
    assert not is_done(directory, shard, verify="float16")


FLOAT16 = pa.schema({"entropies_nats": pa.float16()})


def values_of(message: bytearray) -> int:
    return batch_of(message, FLOAT16)[0].num_rows


def as_uint8(batch: pa.RecordBatch) -> pa.RecordBatch:
    return pa.record_batch([pa.array(np.zeros(batch.num_rows, np.uint8))], ["entropies_nats"])


def test_sound_shards_are_done_in_either_storage(data):
    for storage in ("float16", "uint8"):
        shutil.rmtree(sidecar_directory(data, "default"), ignore_errors=True)
        score(data, SETTINGS._replace(storage=storage))
        [shard, *_] = read_manifest(data).splits["train"]
        assert is_done(sidecar_directory(data, "default"), shard, verify=storage)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_values_that_are_no_entropies_are_refused(data, value):
    [shard, *_] = read_manifest(data).splits["train"]
    writer = SidecarWriter(sidecar_directory(data, "default"), shard, "float16")
    with pytest.raises(DataError, match=r"train-00000\.arrow: record batch 0: the entropy model gave values that"):
        writer.add(0, np.array([1.0, value]), 0)
    writer.abandon()
    assert not list(sidecar_directory(data, "default").iterdir())


def test_two_launches_over_one_shard_leave_one_sound_shard(data):
    """The first to finish completes the sidecar, the second comes too late."""
    score(data)
    expected = {path.name: path.read_bytes() for path in sidecar_directory(data, "default").iterdir()}
    [entry, *_] = read_manifest(data).splits["train"]
    writers = [SidecarWriter(sidecar_directory(data, "default"), entry, "float16") for _ in range(2)]
    for batch in ShardSet(data, "train", only=entry.file):
        h = entropies_of(entry.file, batch.batch_in_shard, len(batch.text))
        for writer in writers:
            writer.add(batch.batch_in_shard, h, batch.crc32)
    for writer in writers:
        writer.finish()
        assert complete_sidecar(data, "default", SETTINGS)
    assert {path.name for path in sidecar_directory(data, "default").iterdir()} == set(expected)
    sidecar = sidecar_of(data)
    for batch in ShardSet(data, "train"):
        h = entropies_of(batch.shard_path.name, batch.batch_in_shard, len(batch.text))
        np.testing.assert_array_equal(sidecar(batch), h.astype(np.float16))


def test_swapped_files_are_found(data):
    score(data)
    directory = sidecar_directory(data, "default")
    content = json.loads((directory / SIDECAR_NAME).read_bytes())
    first, second = content["shards"][:2]
    for key in ("file", "index_file"):
        one, two = directory / first[key], directory / second[key]
        kept = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(kept)
    # By size, where sizes differ; else by the digest of the index; else, were that swapped too, by the text's crc.
    with pytest.raises(DataError, match=r"train-0000[01]"):
        sidecar_of(data).verify_structure()
    for key in ("index_sha256", "file_bytes", "record_batches"):
        first[key], second[key] = second[key], first[key]
    (directory / SIDECAR_NAME).write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"record batch 0: belongs to .* files were swapped"):
        sidecar_of(data)(ShardSet(data, "train").read(0))


def edit_entry(directory: Path, **changes) -> None:
    content = json.loads((directory / SIDECAR_NAME).read_bytes())
    content["shards"][0] |= changes
    (directory / SIDECAR_NAME).write_text(json.dumps(content))


def test_an_index_of_fewer_record_batches_is_refused(data):
    score(data)
    directory, batches = sidecar_directory(data, "default"), list(ShardSet(data, "train"))
    index = np.load(directory / "train-00000.index.npy")[:1]
    content = (directory / "train-00000.arrow").read_bytes()
    message = bytearray(content[index[0, 0] : index[0, 0] + index[0, 1]])
    edit_entry(directory, record_batches=1)
    write_shard(directory, [message], index, listed=SIDECAR_NAME)
    sidecar = sidecar_of(data)
    sidecar(batches[0])
    with pytest.raises(DataError, match=r"train-00000\.arrow: record batch 1: there are only 1"):
        sidecar(batches[1])
    edit_entry(directory, record_batches=2)
    with pytest.raises(DataError, match=r"train-00000\.index\.npy: does not fit its shard"):
        sidecar_of(data)(batches[0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "train-00001.arrow").unlink(), r"train-00001\.arrow: No such file"),
        (lambda d: (d / "train-00001.arrow").write_bytes(b"short"), r"train-00001\.arrow: 5 bytes, sidecar\.json says"),
        (lambda d: (d / "sidecar.json").write_text("{"), r"sidecar\.json: cannot be read"),
        (lambda d: (d / "sidecar.json").write_text('{"format": "x"}'), r"format 'x' version None is unknown"),
        (
            lambda d: (d / "sidecar.json").write_text((d / "sidecar.json").read_text().replace("float16", "float17")),
            r"sidecar\.json: malformed \(ValueError\(\"storage 'float17'\"\)\)",
        ),
        (lambda d: edit_entry(d, index_file="../../evil.npy"), r"sidecar\.json: malformed .*plain file name"),
        (lambda d: edit_entry(d, file_bytes="many"), r"sidecar\.json: malformed .*whole number"),
        (lambda d: (d / "sidecar.json").write_text("[" * 100_000), r"sidecar\.json: cannot be read"),
    ],
    ids=[
        *("missing", "truncated", "not_json", "another_format", "unknown_storage"),
        *("index_elsewhere", "size_no_number", "deep_nesting"),
    ],
)
def test_what_is_missing_or_malformed_is_refused_at_construction(data, damage, message):
    score(data)
    damage(sidecar_directory(data, "default"))
    with pytest.raises(DataError, match=message):
        sidecar_of(data)


def test_text_that_was_prepared_again_is_noticed(data):
    score(data)
    manifest = json.loads((data / "manifest.json").read_bytes())
    manifest["splits"]["train"][1]["index_sha256"] = "0" * 64
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"train-00001\.arrow has other text.*score it again"):
        sidecar_of(data)

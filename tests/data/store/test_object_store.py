"""Object stores: the rows are those of local files, whatever is kept, evicted, damaged or away."""

import logging
import multiprocessing
import os
import pickle
import shutil
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from blt_titan.data.rows import workers
from blt_titan.data.rows.ahead import ReadAhead
from blt_titan.data.rows.held_out import HeldOutRows
from blt_titan.data.rows.loader import RowLoader
from blt_titan.data.rows.order import StreamOrder
from blt_titan.data.rows.patcher import EntropyPatcher
from blt_titan.data.rows.source import RowSource
from blt_titan.data.store import object_store
from blt_titan.data.store.disk_cache import FOLDER, DiskCache
from blt_titan.data.store.errors import DataError, UnreachableError
from blt_titan.data.store.fetch_counts import counted
from blt_titan.data.store.object_store import Fetching
from blt_titan.data.store.shards import ShardSet
from blt_titan.data.store.sidecars import (
    EntropySidecar,
    EntropySidecars,
    SidecarSettings,
    SidecarWriter,
    begin_sidecar,
    complete_sidecar,
    sidecar_directory,
)
from blt_titan.data.store.waits import Wait
from blt_titan.patching.rule import PatchRule
from tests.helpers.small_loader import PATCHER, SHAPE, STREAMS, random_documents, rows_of, take, write

TINY_CACHE_BYTES = 6000
"""Six of some 120 record batches, and the indexes."""
BATCHES = 60


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data set in several shards, with a sidecar of made-up entropies."""
    directory = tmp_path_factory.mktemp("store") / "data"
    write(directory, [text for seed in range(4) for text in random_documents(seed)])
    settings, rng = SidecarSettings("float16", {}, "made up", "float32"), np.random.default_rng(0)
    begin_sidecar(directory, "default", settings)
    for split in ("train", "validation"):
        for entry in ShardSet(directory, split).entries:
            writer = SidecarWriter(sidecar_directory(directory, "default"), entry, "float16")
            for batch in ShardSet(directory, split, only=entry.file):
                writer.add(batch.batch_in_shard, rng.gamma(1.2, 0.8, len(batch.text)).astype(np.float32), batch.crc32)
            writer.finish()
    assert complete_sidecar(directory, "default", settings)
    return directory


def source_of(
    place: str | Path, fetching: Fetching | None = None, *, scored=False, split="train", ahead=5
) -> RowSource:
    shards = ShardSet(place, split, fetching=fetching)
    if not scored:
        return RowSource(shards, PATCHER, SHAPE, ahead if shards.is_remote else 0)
    sidecars = EntropySidecars([EntropySidecar(str(place), "default", shards)])
    patcher = EntropyPatcher(PatchRule("global", 1.0, max_patch_bytes=16), sidecars)
    return RowSource(shards, patcher, SHAPE, ahead if shards.is_remote else 0)


def loader_of(source: RowSource, **settings) -> RowLoader:
    order = StreamOrder(len(source.shards), STREAMS, 0)
    return RowLoader(source, order, **({"rows_per_batch": 2} | settings))


def kept_bytes(cache_dir: Path) -> int:
    return sum(path.stat().st_size for path in (cache_dir / FOLDER).iterdir() if path.name not in ("used", "locks"))


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize(("num_workers", "ahead"), [(0, 5), (2, 3), (0, 0)])
def test_rows_are_those_of_local_files_with_a_tiny_cache(data, tmp_path, scored, num_workers, ahead):
    expected = rows_of(take(loader_of(source_of(data, scored=scored)), BATCHES))
    fetching, before = Fetching(tmp_path / "cache", TINY_CACHE_BYTES), counted()
    source = source_of(f"file://{data}", fetching, scored=scored, ahead=ahead)
    assert torch.equal(rows_of(take(loader_of(source, num_workers=num_workers), BATCHES)), expected)
    assert counted().evictions > before.evictions, "the test means to make room"
    assert counted().requests > before.requests
    assert kept_bytes(fetching.cache_dir) <= TINY_CACHE_BYTES


def test_positions_are_those_of_local_files(data, tmp_path):
    fetching = Fetching(tmp_path / "cache")
    local, remote = loader_of(source_of(data)), loader_of(source_of(f"file://{data}", fetching))
    take(remote, 11)
    state = remote.state_dict()
    take(local, 11)
    assert local.state_dict()["identity"] == state["identity"]
    assert np.array_equal(local.state_dict()["positions"], state["positions"])
    resumed = loader_of(source_of(f"file://{data}", fetching))
    resumed.load_state_dict(state)
    assert torch.equal(rows_of(take(resumed, 20)), rows_of(take(local, 20)))


def test_held_out_rows_are_those_of_local_files_and_come_from_the_cache_again(data, tmp_path):
    expected = rows_of(list(HeldOutRows(source_of(data, split="validation"), rows_per_batch=4)))
    rows = HeldOutRows(source_of(f"file://{data}", Fetching(tmp_path), split="validation"), rows_per_batch=4)
    assert torch.equal(rows_of(list(rows)), expected)
    before = counted()
    assert torch.equal(rows_of(list(rows)), expected)
    assert counted().fetched_bytes == before.fetched_bytes
    assert counted().cache_hits >= before.cache_hits + len(rows.source.shards)


def test_a_record_batch_is_fetched_once_and_nothing_else_of_its_shard(data, tmp_path):
    before, manifest_bytes = counted(), (data / "manifest.json").stat().st_size
    shards = ShardSet(f"file://{data}", "train", fetching=Fetching(tmp_path))
    for batch, local in zip(shards, ShardSet(data, "train"), strict=True):
        assert batch.doc_ids == local.doc_ids
        assert np.array_equal(batch.text, local.text)
        assert str(batch.shard_path) == f"file://{data}/{local.shard_path.name}"
    lengths = sum(shards.record_batch_info(i).length for i in range(len(shards)))
    assert counted().fetched_bytes - before.fetched_bytes == lengths + shards.index_bytes + manifest_bytes
    again = pickle.loads(pickle.dumps(shards))
    before = counted()
    assert [batch.crc32 for batch in again] == [batch.crc32 for batch in shards]
    assert counted().fetched_bytes == before.fetched_bytes


def test_a_damaged_copy_in_the_cache_is_fetched_again(data, tmp_path):
    url, fetching = f"file://{data}", Fetching(tmp_path)
    list(ShardSet(url, "train", fetching=fetching))
    for path in (tmp_path / FOLDER).iterdir():
        if path.name not in ("used", "locks"):
            path.write_bytes(path.read_bytes()[:-1] + b"?")
    before = counted()
    crcs = [batch.crc32 for batch in ShardSet(url, "train", fetching=fetching)]
    assert crcs == [batch.crc32 for batch in ShardSet(data, "train")]
    assert counted().fetched_bytes > before.fetched_bytes


def test_changed_and_truncated_objects_are_found(data, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    shards = ShardSet(f"file://{copy}", "train", fetching=Fetching(tmp_path / "cache"))
    info = shards.record_batch_info(3)
    content = bytearray((copy / info.shard_path.name).read_bytes())
    content[info.offset + info.length // 2] ^= 1
    (copy / info.shard_path.name).write_bytes(content)
    with pytest.raises(DataError, match=rf"file://.*{info.shard_path.name}: record batch 3: the bytes have crc32"):
        shards.read(3)
    (copy / info.shard_path.name).write_bytes(content[: info.offset + 10])
    with pytest.raises(DataError, match="record batch 3: the bytes have crc32"):
        shards.read(3)
    with pytest.raises(DataError, match=rf"{info.shard_path.name}: {info.offset + 10} bytes, manifest.json says"):
        ShardSet(f"file://{copy}", "train", fetching=Fetching(tmp_path / "cache"))
    (copy / info.shard_path.name).unlink()
    with pytest.raises(DataError, match=rf"{info.shard_path.name}: no such object .*restore it"):
        shards.read(3)


class _Away(Exception):
    """What a driver raises when its store is away."""


@pytest.fixture
def failing(monkeypatch):
    """Have reads of local files through fsspec fail: as often as `failing.left` says."""

    class Failing:
        left = 0
        error: Exception = _Away("connection refused")

    cls = type(fsspec.filesystem("file"))
    cat_file = cls.cat_file

    def fail(self, path, *args, **options):
        if path.endswith(".arrow") and Failing.left > 0:
            Failing.left -= 1
            raise Failing.error
        return cat_file(self, path, *args, **options)

    monkeypatch.setattr(cls, "cat_file", fail)
    monkeypatch.setattr(object_store, "FIRST_PAUSE_S", 0.01)
    return Failing


def test_failures_that_pass_are_tried_again_and_counted(data, tmp_path, failing, caplog):
    failing.left, before = 3, counted()
    with caplog.at_level(logging.WARNING):
        ShardSet(f"file://{data}", "train", fetching=Fetching(tmp_path)).read(0)
    assert counted().retries == before.retries + 3
    assert "train-00000.arrow: _Away: connection refused; trying again" in caplog.text


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (_Away("connection refused"), r"cannot be read: tried \d+ times .*fetch_timeout_s = 0.3.*_Away"),
        (PermissionError("ExpiredToken"), "access is denied"),
    ],
)
def test_a_store_that_is_away_ends_the_rows_and_is_no_damage(data, tmp_path, failing, error, message):
    failing.error = error
    source = source_of(f"file://{data}", Fetching(tmp_path, timeout_s=0.3))
    failing.left = 10**9
    log = tmp_path / "quarantined.jsonl"
    with pytest.raises(UnreachableError, match=rf"file://.*train-0000\d\.arrow: {message}"):
        take(loader_of(source, quarantine=True, quarantine_log=log), 10)
    assert not log.exists()


def test_a_worker_whose_store_is_away_says_so_and_is_not_lost(data, tmp_path, failing, monkeypatch):
    monkeypatch.setattr(workers, "_LOOK_S", 0.1)
    source = source_of(f"file://{data}", Fetching(tmp_path, timeout_s=4.0))
    failing.left = 10**9
    with pytest.raises(
        UnreachableError, match=r"file://.*\.arrow: cannot be read: tried .*fetch_timeout_s = 4\).*_Away"
    ):
        take(loader_of(source, num_workers=1, wait_s=0.5), 10)


def test_a_driver_that_does_not_come_back_is_asked_again(data, tmp_path, monkeypatch):
    cls, calls = type(fsspec.filesystem("file")), []
    cat_file, over = cls.cat_file, threading.Event()

    def hang_once(self, path, *args, **options):
        calls.append(path)
        if len(calls) == 1:
            over.wait(60)
        return cat_file(self, path, *args, **options)

    shards = ShardSet(f"file://{data}", "train", fetching=Fetching(tmp_path, timeout_s=8.0))
    monkeypatch.setattr(cls, "cat_file", hang_once)
    monkeypatch.setattr(object_store, "FIRST_PAUSE_S", 0.01)
    began = time.monotonic()
    assert len(shards.read(0).text)
    assert time.monotonic() - began < 8.0
    over.set()
    assert calls[0] == calls[1]


def test_the_cache_keeps_what_was_used_last(tmp_path):
    cache, contents = DiskCache(tmp_path, 1000), {f"{n:064x}": bytes([n]) * 100 for n in range(12)}
    names = list(contents)
    for name in names[:9]:
        cache.put(name, contents[name])
    for name in names[:3]:
        assert cache.get(name) == contents[name]
    for name in names[9:]:
        cache.put(name, contents[name])
    assert [cache.get(name) is not None for name in names[:3]] == [True] * 3
    assert cache.get(names[3]) is None
    assert all(cache.get(name) == contents[name] for name in names[9:])
    assert kept_bytes(tmp_path) <= 1000
    cache.put("f" * 64, bytes(1001))
    assert cache.get("f" * 64) is None, "larger than all of the cache"
    (tmp_path / FOLDER / "used").write_bytes(b"nonsense")
    cache.put("e" * 64, bytes(200))
    assert cache.get("e" * 64) == bytes(200)
    assert kept_bytes(tmp_path) <= 1000


def _put_and_get(directory: Path, seed: int, most: int) -> None:
    cache, rng = DiskCache(directory, most), np.random.default_rng(seed)
    for n in rng.integers(200, size=400).tolist():
        name = f"{n:064x}"
        with cache.alone(name, Wait("it")):
            content = cache.get(name)
            if content is None:
                cache.put(name, bytes([n]) * (50 + n))
        assert content in (None, bytes([n]) * (50 + n)), "half a file"
        used = kept_bytes_meanwhile(directory)
        assert used <= most, f"{used} bytes"


def kept_bytes_meanwhile(directory: Path) -> int:
    return sum(size for _, size, _ in DiskCache(directory, 0)._files())


def test_processes_that_share_a_cache_keep_its_bound(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_put_and_get, args=(tmp_path, seed, 5000)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    assert kept_bytes(tmp_path) == int((tmp_path / FOLDER / "used").read_bytes())


def test_a_cache_that_cannot_be_had_is_a_sentence(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot be written .*data\.cache_dir"):
        DiskCache(tmp_path / "file", 1000).check()
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    with pytest.raises(DataError, match=r"data\.cache_bytes = \d+: .* has room for"):
        DiskCache(tmp_path, 2 * free + 10**9).check()
    DiskCache(tmp_path, 1000).check()


def test_a_full_disk_under_the_cache_is_said_once_and_rows_go_on(data, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    shards = ShardSet(f"file://{data}", "train", fetching=Fetching(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert len(list(shards)) == len(shards)
    assert caplog.text.count("No space left on device: what is fetched is not kept there") == 1


def test_what_is_read_ahead_is_bounded_and_in_the_order_that_it_is_due():
    read: list[int] = []

    def note(key: int) -> int:
        read.append(key)
        if key == 7:
            raise DataError("seven")
        return 10 * key

    ahead = ReadAhead(note, 1)
    for key, due in ((1, 0), (3, 30), (2, 20), (7, 70)):
        ahead.expect(key, due)
    assert ahead.take(1) == 10
    assert ahead.take(5) == 50, "was never expected"
    assert [ahead.take(key) for key in (2, 3)] == [20, 30]
    with pytest.raises(DataError, match="seven"):
        ahead.take(7)
    assert [key for key in read if key != 5] == [1, 2, 3, 7]
    assert len(ahead._begun) == 0
    ahead.close()

"""Shards read straight from an S3 server: whole rows against local files, with failures, ranks and workers."""

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import fsspec
import pytest
import torch
import torch.distributed as dist

from blt_titan.commands import inspect
from blt_titan.config.check import check_run, load_run_config
from blt_titan.config.read import RunConfigError
from blt_titan.data.rows.loader import RowLoader
from blt_titan.data.rows.order import StreamOrder
from blt_titan.data.rows.source import RowSource
from blt_titan.data.store import object_store
from blt_titan.data.store.errors import UnreachableError
from blt_titan.data.store.fetch_counts import counted
from blt_titan.data.store.object_store import Fetching
from blt_titan.data.store.shards import ShardSet
from tests.helpers.distributed import run_distributed
from tests.helpers.prepared import run, write_source
from tests.helpers.s3_server import CREDENTIALS, ROOT, s3_server
from tests.helpers.small_loader import PATCHER, SHAPE, interleaved, random_documents, rows_of, take, write

pytestmark = pytest.mark.slow
pytest.importorskip("s3fs", reason="needs the extra s3")
pytest.importorskip("moto", reason="needs the extra dev")

URL = "s3://bucket/data"
TINY_CACHE_BYTES = 6000
STREAMS, BATCHES = 12, 40


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("s3") / "data"
    write(directory, [text for seed in range(3) for text in random_documents(seed)])
    return directory


@pytest.fixture(scope="module")
def server(data):
    with s3_server() as server:
        _upload(data)
        yield server


def _upload(data: Path) -> None:
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    fs.mkdir("bucket")
    for path in data.iterdir():
        fs.put_file(str(path), f"bucket/data/{path.name}")


def loader_of(place: str | Path, cache_dir: Path, **settings) -> RowLoader:
    shards = ShardSet(place, "train", fetching=Fetching(cache_dir, TINY_CACHE_BYTES))
    source = RowSource(shards, PATCHER, SHAPE, 4 if shards.is_remote else 0)
    return RowLoader(source, StreamOrder(len(shards), STREAMS, 0), **({"rows_per_batch": 2} | settings))


@pytest.fixture(scope="module")
def expected(data, tmp_path_factory) -> torch.Tensor:
    return rows_of(take(loader_of(data, tmp_path_factory.mktemp("unused")), BATCHES))


def test_two_workers_through_failures_make_the_rows_of_local_files(server, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(object_store, "FIRST_PAUSE_S", 0.01)
    failed, before = server.failed(), counted()
    server.fail(every=5)
    try:
        found = rows_of(take(loader_of(URL, tmp_path, num_workers=2), BATCHES))
    finally:
        server.fail(every=0)
    assert torch.equal(found, expected)
    now = counted()
    assert now.evictions > before.evictions
    assert 0 < now.retries - before.retries <= server.failed() - failed


def _rows_of_rank(cache_dir: Path) -> torch.Tensor:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return rows_of(take(loader_of(URL, cache_dir, dp_rank=rank, dp_size=ranks, num_workers=2), BATCHES // ranks))


def test_two_ranks_with_workers_share_a_cache_and_make_the_rows_of_local_files(server, expected, tmp_path):
    assert torch.equal(interleaved(run_distributed(_rows_of_rank, 2, tmp_path)), expected)


def check(place: str, *overrides: str) -> None:
    config = load_run_config(
        [f"--job.config_file={ROOT}/train_configs/debug.toml", f"--training.dataset_path={place}", *overrides]
    )
    check_run(config, world_size=1, verify_data=True)


def test_what_is_not_there_is_a_sentence_before_ranks_start(server, data, tmp_path):
    few = [f"--data.streams={STREAMS}", f"--data.cache_dir={tmp_path}", f"--job.dump_folder={tmp_path}/run"]
    check(URL, *few, "--data.cache_bytes=1000000")
    for place in ("s3://nowhere/data", "s3://bucket/nothing"):
        with pytest.raises(RunConfigError, match=rf"dataset_path = '{place}': {place}/manifest\.json: no such object"):
            check(place, *few)
    with pytest.raises(RunConfigError, match=r"data\.cache_bytes = 1000: must be at least \d+"):
        check(URL, *few, "--data.cache_bytes=1000")
    [index] = [entry.index_file for entry in ShardSet(data, "train").entries][:1]
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    fs.rm_file(f"bucket/data/{index}")
    try:
        with pytest.raises(ValueError, match=rf"{URL}/{index}: no such object, but manifest\.json names it"):
            check(URL, *few)
    finally:
        fs.put_file(str(data / index), f"bucket/data/{index}")


def test_without_credentials_a_command_says_so_in_a_line(server, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key not in CREDENTIALS} | {
        "HOME": str(tmp_path),
        "AWS_EC2_METADATA_DISABLED": "true",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "blt_titan", "config", "debug", "--check", f"--training.dataset_path={URL}"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert f"{URL}/manifest.json" in done.stderr
    assert "credentials" in done.stderr


def test_prepare_writes_there_and_inspect_reads_there(server, tmp_path, capsys):
    run(write_source(tmp_path / "source"), tmp_path / "here")
    run(tmp_path / "source", "s3://bucket/prepared", work=str(tmp_path / "work"))
    assert inspect.main(["s3://bucket/prepared", "--no-progress"]) == 0
    assert "all sound" in capsys.readouterr().out
    remote = ShardSet("s3://bucket/prepared", "train", fetching=Fetching(tmp_path / "cache"))
    assert remote.fingerprint == ShardSet(tmp_path / "here", "train").fingerprint


def test_a_killed_server_ends_the_rows_with_a_sentence(data, tmp_path, expected):
    with s3_server() as server:
        fs_options = {"endpoint_url": server.url, "skip_instance_cache": True}
        fs = fsspec.filesystem("s3", **fs_options)
        fs.mkdir("killed")
        for path in data.iterdir():
            fs.put_file(str(path), f"killed/data/{path.name}")
        shards = ShardSet("s3://killed/data", "train", fetching=Fetching(tmp_path, timeout_s=20))
        source = RowSource(shards, PATCHER, SHAPE, 4)
        order = StreamOrder(len(shards), STREAMS, 0)
        batches = iter(RowLoader(source, order, rows_per_batch=2, num_workers=2, quarantine=True, prefetch_factor=1))
        found = [next(batches) for _ in range(2)]
        server.kill()
        said = r"s3://killed/data/train-\d+\.\S+: cannot be read: tried \d+ times"
        with pytest.raises(UnreachableError, match=said):
            found.extend(islice(batches, 500))
        rows = rows_of(found)[: len(expected)]
        assert torch.equal(rows, expected[: len(rows)])

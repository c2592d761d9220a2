"""A run that stops anywhere and goes on with other ranks and workers makes the rows of one that never stopped."""

import dataclasses
import hashlib
import itertools
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from blt_titan.data.rows.loader import RowLoader
from blt_titan.data.rows.patcher import EntropyPatcher
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.shards import RecordBatch, ShardSet
from blt_titan.patching.rounding import Storage
from blt_titan.patching.rule import PatchRule
from tests.helpers.elastic_rank import STREAMS
from tests.helpers.small_loader import interleaved, loader_of, merged, random_documents, rows_of, take, write

WORLDS = (8, 6, 16, 4, 3)
STOPS = 200
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("elastic") / "data"
    write(directory, [text for seed in range(8) for text in random_documents(seed)])
    shards = ShardSet(directory, "train")
    assert len(shards) > STREAMS
    assert len(shards) % STREAMS
    return directory


def world(data: Path, dp_size: int, state: dict, num_workers: int) -> list[RowLoader]:
    loaders = [
        loader_of(data, streams=STREAMS, dp_rank=rank, dp_size=dp_size, rows_per_batch=1, num_workers=num_workers)
        for rank in range(dp_size)
    ]
    for loader in loaders:
        if state:
            loader.load_state_dict(state)
    return loaders


def hashes(rows: torch.Tensor) -> list[bytes]:
    return [hashlib.blake2b(row.numpy().tobytes(), digest_size=16).digest() for row in rows]


def broken_run(data: Path, stops: list[tuple[int, int, int]]) -> tuple[list[bytes], dict]:
    """Return the rows' hashes of a run in parts, (ranks, rows of each, workers), and its last state."""
    rows: list[bytes] = []
    state: dict = {}
    for dp_size, rows_of_each, num_workers in stops:
        loaders = world(data, dp_size, state, num_workers)
        ranks = [rows_of(take(loader, rows_of_each)) for loader in loaders]
        rows += hashes(interleaved(ranks, len(rows)))
        state = merged([loader.state_dict() for loader in loaders])
        assert state["rows_served"] == len(rows)
    return rows, state


def unbroken_run(data: Path, n_rows: int) -> list[bytes]:
    return hashes(rows_of(take(loader_of(data, streams=STREAMS, rows_per_batch=1), n_rows)))


def test_two_hundred_stops_lose_and_repeat_nothing(data):
    rng = np.random.default_rng(0)
    worlds = itertools.cycle(WORLDS)
    stops = [(dp_size, int(rng.integers(1, 4 * STREAMS // dp_size)), 0) for dp_size in itertools.islice(worlds, STOPS)]
    served = itertools.accumulate((dp_size * rows for dp_size, rows, _ in stops), initial=0)
    uneven = sum(rows % dp_size > 0 for rows, (dp_size, *_) in zip(served, stops, strict=False))
    assert uneven > STOPS // 2, "ranks shall seldom divide the rows that were served"
    rows, state = broken_run(data, stops)
    assert rows == unbroken_run(data, len(rows))
    order = loader_of(data, streams=STREAMS).order
    epochs = [order.epoch(stream, int(pick)) for stream, pick in enumerate(state["positions"][:, 0])]
    assert min(epochs) >= 2, "the test means to go through several epochs"


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_come_and_go(data, num_workers):
    stops = [(8, 13, 0), (6, 9, num_workers), (3, 25, num_workers), (16, 5, 0), (4, 11, 3 - num_workers), (6, 8, 2)]
    rows, _ = broken_run(data, stops)
    assert rows == unbroken_run(data, len(rows))


def test_another_global_batch_keeps_the_order(data):
    """24 rows a step and then 96, at a stop that is no multiple of the streams."""
    loaders = world(data, 6, {}, 0)
    rows = hashes(interleaved([rows_of(take(loader, 4)) for loader in loaders]))
    state = merged([loader.state_dict() for loader in loaders])
    assert state["rows_served"] % STREAMS
    for loader in (loaders := world(data, 4, state, 0)):
        loader.rows_per_batch = 24
    rows += hashes(interleaved([rows_of(take(loader, 2)) for loader in loaders]))
    assert rows == unbroken_run(data, len(rows))


@dataclasses.dataclass
class _Entropies:
    fingerprint: str
    storage: Storage = "float16"

    def __call__(self, batch: RecordBatch) -> np.ndarray:
        raise AssertionError("no row is asked for")


def test_a_run_that_goes_on_with_other_patches_is_told(data, caplog):
    def patched(threshold: float, fingerprint: str, may_change: bool = False) -> RowLoader:
        loader = loader_of(data, streams=STREAMS, rows_per_batch=1, patching_may_change=may_change)
        patcher = EntropyPatcher(PatchRule("global", threshold), _Entropies(fingerprint))
        loader.source = dataclasses.replace(loader.source, patcher=patcher)
        return loader

    state = patched(1.5, "abc").state_dict()
    # These are names in files: a checkpoint of today must be found by them tomorrow.
    assert {"patching.rule", "patching.threshold", "entropies"} <= json.loads(state["identity"])["patching"].keys()
    patched(1.5, "abc").load_state_dict(state)
    assert not caplog.records
    with pytest.raises(DataError, match=r"threshold = 1\.5, this run has 2\.5.*patching\.allow_change"):
        patched(2.5, "abd").load_state_dict(state)
    patched(2.5, "abd", may_change=True).load_state_dict(state)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "with patching.threshold = 1.5, this run has 2.5: from here on patches are cut otherwise" in messages[0]
    assert "with entropies (of the model) = 'abc', this run has 'abd'" in messages[1]


def start(folder: Path, data: Path, world_size: int, workers: int, steps: int) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    common = [str(argument) for argument in (world_size, port, folder, data, workers, steps)]
    command = [sys.executable, "-m", "tests.helpers.elastic_rank"]
    return [subprocess.Popen([*command, str(rank), *common], cwd=ROOT) for rank in range(world_size)]


def logged(folder: Path) -> list[tuple[int, str]]:
    """Rows that ranks logged: number and hash; a line that a kill tore is left out."""
    lines = [line for path in folder.glob("*.log") for line in path.read_text().split("\n")[:-1]]
    return [(int(number), digest) for number, digest in map(str.split, lines)]


@pytest.mark.slow
def test_kill_9_five_times_and_another_world_each_time(data, tmp_path):
    """Real ranks and workers, killed together at a moment of chance, saves included; the last world comes through."""
    rng = np.random.default_rng(0)
    worlds = [(4, 0), (2, 2), (6, 0), (3, 1), (8, 0)]
    steps, before = 400, 0
    resumed_at = []
    for world_size, workers in worlds:
        ranks = start(tmp_path, data, world_size, workers, steps)
        wanted = before + int(rng.integers(3, 12)) * STREAMS + int(rng.integers(STREAMS))
        deadline = time.monotonic() + 120
        while len(logged(tmp_path)) < wanted:
            assert all(rank.poll() is None for rank in ranks), "a rank ended by itself"
            assert time.monotonic() < deadline, "no rows within 120 s"
            time.sleep(0.005)
        for rank in ranks:
            rank.send_signal(signal.SIGKILL)
        for rank in ranks:
            rank.wait()
        before = len(logged(tmp_path))
        complete = [int(path.parent.name[5:]) for path in tmp_path.glob("step-*/.metadata")]
        resumed_at.append(max(complete))
        # As the trainer does: what was half written is removed before it is written again.
        for path in tmp_path.glob("step-*"):
            if not (path / ".metadata").exists():
                shutil.rmtree(path)
    last = resumed_at[-1] + 4
    for rank in start(tmp_path, data, 1, 2, last):
        assert rank.wait(120) == 0
    assert resumed_at == sorted(resumed_at)
    assert resumed_at[-1] >= 6
    rows = logged(tmp_path)
    expected = [digest.hex() for digest in unbroken_run(data, max(number for number, _ in rows) + 1)]
    assert {number for number, _ in rows} >= set(range(last * STREAMS)), "a row was lost"
    wrong = [number for number, digest in rows if digest != expected[number]]
    assert not wrong, f"{len(wrong)} rows are not those of an undisturbed run, the first is {wrong[0]}"
    print(f"resumed at steps {resumed_at}; {len(rows):,} rows hashed, {len(rows) - len(dict(rows)):,} of them twice")

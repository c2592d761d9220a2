"""A run that stops anywhere and goes on with other ranks and workers makes the rows of one that never stopped."""

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from blt_titan.data.loader import RowLoader
from blt_titan.data.shards import ShardSet
from tests.small_loader import interleaved, loader_of, merged, random_documents, rows_of, take, write

STREAMS = 48
WORLDS = (8, 6, 16, 4)
STOPS = 200


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
    """Return the rows' hashes of a run in parts, (ranks, steps, workers) of each, and its last state."""
    rows: list[bytes] = []
    state: dict = {}
    for dp_size, steps, num_workers in stops:
        # A global batch is 48 rows here, which all worlds divide: a step of dp ranks is 48 / dp rows of each.
        loaders = world(data, dp_size, state, num_workers)
        ranks = [rows_of(take(loader, steps * STREAMS // dp_size)) for loader in loaders]
        rows += hashes(interleaved(ranks))
        state = merged([loader.state_dict() for loader in loaders])
        assert state["rows_served"] == len(rows)
    return rows, state


def unbroken_run(data: Path, n_rows: int) -> list[bytes]:
    return hashes(rows_of(take(loader_of(data, streams=STREAMS, rows_per_batch=1), n_rows)))


def test_two_hundred_stops_lose_and_repeat_nothing(data):
    rng = np.random.default_rng(0)
    worlds = itertools.cycle(WORLDS)
    stops = [(next(worlds), int(rng.integers(1, 4)), 0) for _ in range(STOPS)]
    rows, state = broken_run(data, stops)
    assert rows == unbroken_run(data, len(rows))
    order = loader_of(data, streams=STREAMS).order
    epochs = [order.epoch(stream, int(pick)) for stream, pick in enumerate(state["positions"][:, 0])]
    assert min(epochs) >= 2, "the test means to go through several epochs"


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_come_and_go(data, num_workers):
    stops = [(8, 2, 0), (4, 1, num_workers), (6, 2, num_workers), (16, 1, 0), (4, 2, 3 - num_workers)]
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

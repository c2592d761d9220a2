"""Loader workers that are stopped or killed: begun anew once with the same rows, then named, with what they read."""

import fcntl
import itertools
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from blt_titan.data.rows import loader as loader_module
from blt_titan.data.rows import workers as workers_module
from blt_titan.data.rows.workers import Note, Worker, WorkerLostError
from tests.helpers.small_loader import loader_of, random_documents, rows_of, take, write

BATCHES = 200


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("workers") / "data"
    write(directory, random_documents(0) * 8)
    return directory


@pytest.fixture(scope="module")
def undisturbed(data) -> torch.Tensor:
    return rows_of(take(loader_of(data), BATCHES))


@pytest.fixture(autouse=True)
def _small_pipes_and_waits(monkeypatch):
    """So that a worker is stopped with half a block in its pipe, and is missed soon."""
    pipe = os.pipe

    def small_pipe() -> tuple[int, int]:
        reader, writer = pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        return reader, writer

    monkeypatch.setattr(os, "pipe", small_pipe)
    monkeypatch.setattr(workers_module, "_LOOK_S", 0.1)


def hit_a_worker(number: signal.Signals) -> None:
    os.kill(max(child.pid or 0 for child in multiprocessing.active_children()), number)


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_lost_worker_costs_no_row_and_repeats_none(number, data, undisturbed, caplog):
    loader = loader_of(data, num_workers=3, wait_s=3.0)
    batches = iter(loader)
    before = list(itertools.islice(batches, 21))
    hit_a_worker(number)
    after = list(itertools.islice(batches, BATCHES - 21))
    assert torch.equal(rows_of(before + after), undisturbed)
    [said] = [record.getMessage() for record in caplog.records if "loader worker 2" in record.getMessage()]
    how = r"no sign of life for 3 s \(its process is stopped\)" if number == signal.SIGSTOP else r"ended \(by SIGKILL"
    assert re.search(
        rf"{how}.*; it was (reading|packing rows, last of) \S+/train-\d+\.arrow: record batch \d+\. ", said
    )
    assert "no row is lost or repeated" in said


def test_a_worker_that_is_lost_again_soon_ends_the_rows(data, undisturbed, monkeypatch):
    loader = loader_of(data, num_workers=2, wait_s=3.0)
    batches = iter(loader)
    take_some = list(itertools.islice(batches, 5))
    hit_a_worker(signal.SIGKILL)
    take_some += itertools.islice(batches, 60)
    hit_a_worker(signal.SIGSTOP)
    with pytest.raises(
        WorkerLostError, match=r"worker 1 .*stopped.*Workers were begun anew already, \d+ batches before"
    ):
        list(itertools.islice(batches, BATCHES))
    assert not multiprocessing.active_children()
    # After a while they have proved themselves.
    monkeypatch.setattr(loader_module, "RENEWED_AFTER_BATCHES", 10)
    batches = iter(loader := loader_of(data, num_workers=2, wait_s=3.0))
    rows = []
    for _ in range(4):
        rows += itertools.islice(batches, 50)
        hit_a_worker(signal.SIGKILL)
    assert torch.equal(rows_of(rows), undisturbed)
    assert loader.state_dict()["rows_served"] == 2 * BATCHES


def test_a_slow_worker_that_works_is_waited_for_longer():
    def busy(seconds: float):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass
        yield seconds

    worker = Worker(0, lambda _number, _note: busy(1.5), ahead=1, wait_s=0.5)
    assert worker.next_block() == 1.5
    worker.close()
    worker = Worker(0, lambda _number, note: (note("it was in a loop"), busy(60))[1], ahead=1, wait_s=0.5)
    with pytest.raises(WorkerLostError, match=r"is busy, but has made no batch for [23] s; it was in a loop"):
        worker.next_block()
    worker.close()


def test_what_is_raised_in_a_worker_is_raised_with_its_traceback():
    def broken():
        yield 1
        raise KeyError("missing")

    worker = Worker(0, lambda _number, _note: broken(), ahead=2, wait_s=5.0)
    assert worker.next_block() == 1
    with pytest.raises(KeyError, match="missing") as error:
        worker.next_block()
    assert "in broken" in "".join(error.value.__notes__)
    worker.close()


def test_a_note_is_cut_to_its_room():
    note = Note()
    assert note.read() == ""
    note.write("é" * 10_000)
    assert note.read().startswith("éé")
    note.write("short")
    assert note.read() == "short"

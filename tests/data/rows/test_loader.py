import itertools
import multiprocessing
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from blt_titan.batch import IGNORE_LABEL, LAYOUT_FIELDS, PADDING, Batch
from blt_titan.byte_vocab import BOS_ID, EOS_ID, document_ids
from blt_titan.data.rows.collate import collate_rows
from blt_titan.data.rows.held_out import HeldOutRows
from blt_titan.data.rows.loader import RowLoader
from blt_titan.data.rows.order import StreamOrder
from blt_titan.data.rows.packing import RowShape
from blt_titan.data.rows.source import RowSource
from blt_titan.data.rows.streams import POSITION_FIELDS, RowStream
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.shards import ShardSet
from tests.helpers.layout_fields import fields_of
from tests.helpers.small_loader import (
    PATCHER,
    ROWS_PER_BATCH,
    SHAPE,
    STREAMS,
    interleaved,
    loader_of,
    merged,
    random_documents,
    rows_of,
    take,
    write,
)

DOCUMENTS = random_documents(0)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("loader") / "data"
    write(directory, DOCUMENTS)
    shards = ShardSet(directory, "train")
    assert len(shards) > 2 * STREAMS
    assert len(shards) % STREAMS
    assert len({shards.record_batch_info(i).shard_path for i in range(len(shards))}) > 1
    return directory


@pytest.fixture(scope="module")
def expected(data) -> torch.Tensor:
    """The first rows of the run: two epochs and more."""
    return rows_of(take(loader_of(data), 200))


def test_rows_come_from_their_streams_in_turn(data, expected):
    """The sequence itself, from the parts that other tests check: row n is the next one of stream n mod S."""
    loader = loader_of(data)
    read, order = loader.source.read, loader.order
    streams = [RowStream(lambda pick, s=s: read(order.record_batch(s, pick)), SHAPE) for s in range(STREAMS)]
    for n, row in enumerate(expected):
        made = streams[n % STREAMS].next_row()
        assert made is not None
        assert torch.equal(row, rows_of([collate_rows([made], SHAPE)])[0])
    assert min(order.epoch(s, int(stream.position()[0])) for s, stream in enumerate(streams)) >= 1


def test_batches_are_what_the_model_takes(data):
    (batch,) = take(loader_of(data, rows_per_batch=3), 1)
    assert isinstance(batch, Batch)
    layout = fields_of(batch.layout)
    assert list(layout) == list(LAYOUT_FIELDS)
    for name, tensor in (layout | {"ids_BS": batch.ids_BS, "labels_BS": batch.labels_BS}).items():
        assert tensor.shape == (3, SHAPE.n_patches if name.endswith("BP") else SHAPE.n_bytes)
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()


def test_rows_longer_than_int16_cross_the_process_border(data):
    """Ids travel as int16, but positions may be larger."""
    source = RowSource(ShardSet(data, "train"), PATCHER, RowShape(2, 20_000, 20_000))
    loader = RowLoader(source, StreamOrder(len(source.shards), STREAMS, 0), rows_per_batch=1, num_workers=1)
    (batch,) = take(loader, 1)
    n = int((batch.layout.byte_doc_BS != PADDING).sum())
    assert n > np.iinfo(np.int16).max
    assert batch.layout.byte_pos_BS[0, :n].tolist() == list(range(n))


@pytest.mark.parametrize("rows_per_batch", [1, 5])
@pytest.mark.parametrize("num_workers", [0, 2, 3])
def test_neither_workers_nor_batch_size_change_the_rows(data, expected, num_workers, rows_per_batch):
    rows = rows_of(take(loader_of(data, num_workers=num_workers, rows_per_batch=rows_per_batch), 40 // rows_per_batch))
    assert torch.equal(rows, expected[:40])


def test_the_seed_alone_decides(data, expected):
    assert torch.equal(rows_of(take(loader_of(data), 20)), expected[:40])
    other = rows_of(take(loader_of(data, seed=1), 20))
    assert not torch.equal(other, expected[:40])
    assert not torch.equal(other[:STREAMS], expected[:STREAMS])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_share_the_rows_of_the_run(data, expected, num_workers):
    for dp_size in (2, 3) if num_workers == 0 else (2,):
        ranks = [
            rows_of(take(loader_of(data, dp_rank=rank, dp_size=dp_size, num_workers=num_workers), 15))
            for rank in range(dp_size)
        ]
        assert torch.equal(interleaved(ranks), expected[: len(ranks[0]) * dp_size])


@pytest.mark.parametrize(("save_workers", "resume_workers"), [(0, 0), (0, 2), (2, 0), (2, 3)])
def test_a_run_resumes_after_any_batch(data, expected, save_workers, resume_workers):
    loader = loader_of(data, num_workers=save_workers)
    states = [loader.state_dict()]
    for _ in itertools.islice(loader, 40):
        states.append(loader.state_dict())
    # Processes take a while to start: with them, not after every batch.
    stops = range(41) if not resume_workers else (0, 1, 7, 40)
    for stop in stops:
        resumed = loader_of(data, num_workers=resume_workers)
        resumed.load_state_dict(states[stop])
        first = stop * ROWS_PER_BATCH
        assert torch.equal(rows_of(take(resumed, 14)), expected[first : first + 28])


def test_a_state_is_not_changed_by_what_follows(data, expected):
    loader = loader_of(data)
    take(loader, 3)
    state = loader.state_dict()
    before = state["positions"].copy()
    take(loader, 10)
    resumed = loader_of(data)
    resumed.load_state_dict(state)
    take(resumed, 10)
    assert np.array_equal(state["positions"], before)
    assert state["rows_served"] == 6


def test_a_loader_goes_on_when_iterated_again(data, expected):
    loader = loader_of(data, num_workers=2)
    rows = [rows_of(take(loader, 3)), rows_of(take(loader, 4))]
    assert torch.equal(torch.cat(rows), expected[:14])


@pytest.mark.parametrize(("dp_before", "dp_after"), [(1, 2), (2, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_resumes_on_another_number_of_ranks(data, expected, dp_before, dp_after, num_workers):
    changes = dict(num_workers=num_workers, rows_per_batch=1)
    before = [loader_of(data, dp_rank=r, dp_size=dp_before, **changes) for r in range(dp_before)]
    # 42 rows divide by all ranks, and not by the streams, so that some streams are a row ahead of the others.
    rows = [rows_of(take(loader, 42 // dp_before)) for loader in before]
    state = merged([loader.state_dict() for loader in before])
    assert state["rows_served"] == 42
    assert torch.equal(interleaved(rows), expected[:42])
    after = [loader_of(data, dp_rank=r, dp_size=dp_after, **changes) for r in range(dp_after)]
    for loader in after:
        loader.load_state_dict(state)
    rest = interleaved([rows_of(take(loader, 7)) for loader in after])
    assert torch.equal(rest, expected[42 : 42 + len(rest)])
    # And back again.
    state = merged([loader.state_dict() for loader in after])
    loader = loader_of(data)
    loader.load_state_dict(state)
    first = state["rows_served"]
    assert torch.equal(rows_of(take(loader, 10)), expected[first : first + 20])


def test_the_merge_is_given_what_this_rank_owns(data):
    given = []

    def merge(positions: torch.Tensor) -> torch.Tensor:
        given.append(positions)
        return torch.zeros_like(positions)

    loader = loader_of(data, dp_rank=1, dp_size=3, merge_positions=merge)
    take(loader, 4)
    state = loader.state_dict()
    assert np.array_equal(state["positions"], np.zeros((STREAMS, len(POSITION_FIELDS))))
    (own,) = given
    is_own = torch.arange(STREAMS) % 3 == 1
    assert (own[~is_own] == -1).all()
    assert (own[is_own] >= 0).all()
    assert own[is_own][:, 2].tolist() == [2, 2, 2, 2]  # eight rows of four streams


def test_a_state_that_was_not_merged_is_refused(data):
    loader = loader_of(data, dp_rank=0, dp_size=2)
    take(loader, 1)
    with pytest.raises(DataError, match="one rank only"):
        loader_of(data).load_state_dict(loader.state_dict())


@pytest.mark.parametrize("batches", [5, 7], ids=["two over", "one over"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_that_do_not_divide_the_rows_that_were_served_go_on(data, expected, num_workers, batches):
    before = [loader_of(data, dp_rank=r, dp_size=4, rows_per_batch=1, num_workers=num_workers) for r in range(4)]
    for loader in before:
        take(loader, batches)
    state = merged([loader.state_dict() for loader in before])
    first = state["rows_served"]
    assert first == 4 * batches
    assert first % 3
    after = [loader_of(data, dp_rank=r, dp_size=3, rows_per_batch=2, num_workers=num_workers) for r in range(3)]
    steps = []
    for loader in after:
        loader.load_state_dict(state)
        # Iterated twice, so that what makes rows begins amid them too.
        steps.append([rows_of([batch]) for part in (3, 4) for batch in take(loader, part)])
        assert loader.rows_served == first + 7 * 6
    for step in range(7):
        together = interleaved([ranks[step] for ranks in steps], first)
        assert torch.equal(together, expected[first + 6 * step : first + 6 * (step + 1)]), f"step {step}"
    # Each stream is where its rows end, with whoever owns it.
    whole = loader_of(data, rows_per_batch=1)
    take(whole, first + 42)
    assert np.array_equal(merged([loader.state_dict() for loader in after])["positions"], whole._positions)


def test_ranks_keep_their_streams_wherever_they_begin(data):
    """A rank's rows come from the streams whose positions it saves, from any row of the run on."""
    for rows_served in range(2 * STREAMS):
        for rank in range(3):
            loader = loader_of(data, dp_rank=rank, dp_size=3, rows_per_batch=1)
            loader.go_to(np.zeros_like(loader._positions), rows_served)
            take(loader, STREAMS // 3)
            moved = np.flatnonzero(loader._positions[:, POSITION_FIELDS.index("rows")])
            assert moved.tolist() == list(range(rank, STREAMS, 3)), f"rank {rank} after {rows_served} rows"


def test_another_order_or_other_data_is_refused_by_name(data, tmp_path):
    state = loader_of(data).state_dict()
    write(tmp_path / "other", random_documents(1))
    with pytest.raises(DataError, match=r"data\.streams = 12, this run has 6"):
        loader_of(data, streams=6).load_state_dict(state)
    with pytest.raises(DataError, match=r"data\.seed = 0, this run has 5"):
        loader_of(data, seed=5).load_state_dict(state)
    with pytest.raises(DataError, match=r"training\.dataset_path \(fingerprint\) = '[0-9a-f]{64}'"):
        loader_of(tmp_path / "other").load_state_dict(state)
    # The same data elsewhere is the same data.
    shutil.copytree(data, tmp_path / "moved")
    loader_of(tmp_path / "moved").load_state_dict(state)


@pytest.mark.parametrize(
    ("wanted", "dp_size", "got"),
    [(0, 1, 0), (1, 1, 1), (4, 1, 4), (5, 1, 4), (11, 1, 6), (99, 1, 12), (5, 2, 3), (4, 3, 4), (9, 12, 1), (7, 3, 4)],
)
def test_workers_are_lowered_to_a_divisor_of_the_streams(data, wanted, dp_size, got):
    assert loader_of(data, dp_size=dp_size, num_workers=wanted).num_workers == got


def test_fewer_record_batches_than_streams_are_refused(data):
    n = len(ShardSet(data, "train"))
    loader_of(data, streams=n)
    with pytest.raises(DataError, match=rf"{n} record batches, fewer than data\.streams = {n + 1}"):
        loader_of(data, streams=n + 1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_record_batch_is_named(data, tmp_path, num_workers):
    directory = tmp_path / "damaged"
    shutil.copytree(data, directory)
    loader = loader_of(directory, num_workers=num_workers)
    shards = loader.source.shards
    # Stream 1's third record batch: rows come out before it is read.
    info = shards.record_batch_info(loader.order.record_batch(1, 2))
    with info.shard_path.open("r+b") as file:
        file.seek(info.offset + info.length // 2)
        (byte,) = file.read(1)
        file.seek(info.offset + info.length // 2)
        file.write(bytes([byte ^ 1]))
    batches = iter(loader)
    next(batches)
    with pytest.raises(DataError) as error:
        list(itertools.islice(batches, 200))
    assert str(error.value).startswith(f"{info.shard_path}: record batch {info.batch_in_shard}: the bytes have crc32")
    assert not multiprocessing.active_children(), "workers that are left to the garbage collector take 5 s each to end"


def serve_one_long_row(directory: Path, workers: "multiprocessing.Queue[list[int]]") -> None:
    shape = RowShape(64, 4096, 4096)  # more than a pipe holds, so that its writer waits for its reader
    shards = ShardSet(directory, "train")
    loader = RowLoader(
        RowSource(shards, PATCHER, shape), StreamOrder(len(shards), 2, 0), rows_per_batch=1, num_workers=2
    )
    batches = iter(loader)
    next(batches)
    workers.put([child.pid for child in multiprocessing.active_children() if child.pid])
    time.sleep(3600)


def test_workers_die_with_a_trainer_that_is_killed(tmp_path):
    write(tmp_path / "data", [b"some words " * 100] * 300)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    trainer = context.Process(target=serve_one_long_row, args=(tmp_path / "data", queue))
    trainer.start()
    workers = queue.get(timeout=60)
    assert len(workers) == 2
    assert all(is_running(worker) for worker in workers)
    trainer.kill()
    trainer.join()
    deadline = time.monotonic() + 20
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline, "workers outlive their trainer"
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # dead, and not yet collected by whoever inherited it


def held_out(directory: Path, *, rows_per_batch=ROWS_PER_BATCH, **changes) -> HeldOutRows:
    source = RowSource(ShardSet(directory, "validation"), PATCHER, SHAPE)
    return HeldOutRows(source, rows_per_batch=rows_per_batch, **changes)


def in_order(ranks: list[list[Batch]], pick) -> torch.Tensor:
    """One field of all rows in the order of the data: row n is rank n mod dp's."""
    return interleaved([torch.cat([pick(batch) for batch in batches]) for batches in ranks])


@pytest.mark.parametrize("rows_per_batch", [1, 2, 7])
@pytest.mark.parametrize("dp_size", [1, 2, 3])
def test_held_out_targets_are_scored_once_in_every_layout(data, dp_size, rows_per_batch):
    ranks = [
        list(held_out(data, dp_rank=rank, dp_size=dp_size, rows_per_batch=rows_per_batch)) for rank in range(dp_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(batch.labels_BS.shape == (rows_per_batch, SHAPE.n_bytes) for batches in ranks for batch in batches)
    ids = np.concatenate([document_ids(document) for document in DOCUMENTS])
    labels = in_order(ranks, lambda batch: batch.labels_BS)
    np.testing.assert_array_equal(labels[labels != IGNORE_LABEL], ids[ids != BOS_ID])
    assert (labels == EOS_ID).sum() == len(DOCUMENTS)
    real = in_order(ranks, lambda batch: batch.layout.byte_doc_BS) != PADDING
    tokens = in_order(ranks, lambda batch: batch.ids_BS)
    np.testing.assert_array_equal(tokens[real], ids)
    # Rows of padding come last, and no batch is padding on all ranks.
    empty = ~real.any(dim=1)
    assert (labels[empty] == IGNORE_LABEL).all()
    assert empty.sum() < dp_size * rows_per_batch
    assert torch.equal(empty, empty.sort(stable=True).values)


def test_held_out_rows_are_the_same_each_time(data):
    rows = held_out(data)
    assert torch.equal(rows_of(list(rows)), rows_of(list(rows)))


def test_ranks_without_held_out_rows_run_padding(tmp_path):
    write(tmp_path / "tiny", [b"just one row"])
    batches = [list(held_out(tmp_path / "tiny", dp_rank=rank, dp_size=3)) for rank in range(3)]
    assert [len(rank) for rank in batches] == [1, 1, 1]
    targets = [int((batch.labels_BS != IGNORE_LABEL).sum()) for rank in batches for batch in rank]
    assert targets == [13, 0, 0]


@pytest.mark.parametrize("max_rows", [1, 5])
def test_a_limit_of_held_out_rows_is_the_same_rows_in_every_layout(data, max_rows):
    ids = np.concatenate([document_ids(document) for document in DOCUMENTS])
    found = []
    for dp_size, rows_per_batch in ((1, 1), (2, 2), (4, 3)):
        layout = dict(dp_size=dp_size, rows_per_batch=rows_per_batch, max_rows=max_rows)
        ranks = [list(held_out(data, dp_rank=rank, **layout)) for rank in range(dp_size)]
        real = in_order(ranks, lambda batch: batch.layout.byte_doc_BS) != PADDING
        assert real.any(dim=1).sum() == max_rows
        found.append(in_order(ranks, lambda batch: batch.ids_BS)[real].tolist())
    assert found[0] == found[1] == found[2] == ids[: len(found[0])].tolist()

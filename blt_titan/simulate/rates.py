"""Rows per second that a loader worker makes on this machine, with text cut by the run's own rule.

Nothing is read from a disk and no checksum is taken: what patching, packing and laying out cost.
"""

import itertools
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from blt_titan.data.rows.collate import collate_rows
from blt_titan.data.rows.dataset import RowDataset
from blt_titan.data.rows.order import StreamOrder
from blt_titan.data.rows.packing import Row
from blt_titan.data.rows.streams import POSITION_FIELDS, RowStream
from blt_titan.simulate.data import Text, open_text, run_patcher

_MEASURED_S = 1.5
_FEW_STREAMS = 4
_WARM_UP_ROWS = 8
_HELD_STREAMS = 32


@dataclass(frozen=True)
class WorkerRates:
    """Rows per second of one process that has a core to itself: what it does not compute is not counted."""

    steady: float
    """A worker's, patched and packed, every stream amid its text."""
    after_start: float
    """A worker's, while it meets every stream for the first time since a start and reads a whole record batch."""
    laid_out: float
    """The trainer's, which makes batches of them."""


def worker_rates(text: Text, rows_per_batch: int, *, measured_s: float = _MEASURED_S) -> WorkerRates:
    """Measure a worker, and what the trainer does with its rows; takes three times `measured_s`."""
    data = open_text(text)
    source = replace(data.source, patcher=run_patcher(text.rule))

    def rows(streams: int) -> Iterator[list[Row]]:
        order = StreamOrder(data.order.record_batches, streams, text.order_seed)
        positions = np.zeros((streams, len(POSITION_FIELDS)), np.int64)
        made = RowDataset(
            source, order, dp_rank=0, dp_size=1, positions=positions, first_row=0, rows_per_block=rows_per_batch
        )
        for block in made.blocks():
            if isinstance(block, Exception):
                raise block
            yield [row for row, _ in block]

    few = rows(min(_FEW_STREAMS, data.order.record_batches))
    for _ in range(-(-_WARM_UP_ROWS // rows_per_batch)):
        batch = next(few)
    steady = _per_second(lambda: next(few), measured_s)
    fresh = rows(text.streams)
    after_start = _per_second(lambda: next(fresh), measured_s)
    laid_out = _per_second(lambda: collate_rows(batch, source.shape), measured_s)
    return WorkerRates(*(rate * rows_per_batch for rate in (steady, after_start, laid_out)))


def stream_bytes(text: Text) -> float:
    """Return the memory that a stream amid its text holds, the mean of a few."""
    data = open_text(text)

    def begun() -> list[RowStream]:
        streams = [
            RowStream(lambda pick, n=n: data.source.read(data.order.record_batch(n, pick)), data.source.shape)
            for n in range(min(_HELD_STREAMS, text.streams))
        ]
        for stream in streams:
            stream.next_row()
        return streams

    begun()  # cuts the templates, which are no stream's
    tracemalloc.start()
    try:
        streams = begun()
        return tracemalloc.get_traced_memory()[0] / len(streams)
    finally:
        tracemalloc.stop()


def _per_second(make: Callable[[], object], measured_s: float) -> float:
    began = time.process_time()
    for done in itertools.count(1):
        make()
        if (took := time.process_time() - began) >= measured_s:
            return done / took
    raise AssertionError

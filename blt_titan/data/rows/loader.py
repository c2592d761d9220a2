"""From shards to batches: rows made by worker processes, in an order that no layout changes.

Row n of the run, counted over all ranks and steps, comes from stream n mod S. Data-parallel rank r serves the rows with
n mod dp = r, so dp must divide S, and worker w of W makes every W-th of the rank's rows. With S = 6, dp = 2, W = 3:

    rank 0   rows 0 2 4 6 8 10 ...   from streams 0 2 4 0 2 4 ...   made by workers 0 1 2 0 1 2 ...
    rank 1   rows 1 3 5 7 9 11 ...   from streams 1 3 5 1 3 5 ...   made by workers 0 1 2 0 1 2 ...

After any N rows, each rank goes on with the first of its own that is not among them: dp rows in a row, wherever they
begin, hold one of each rank, so a step takes consecutive rows and dp need not divide N. With dp = 4 after N = 10 rows:

    rank 0   rows 12 16 ...      rank 1   rows 13 17 ...      rank 2   rows 10 14 ...      rank 3   rows 11 15 ...

State rides with the batch: a row carries its stream's position after it, and the loader's state is that of the batches
it has handed out, so what workers made ahead is neither lost nor repeated. The state is one table of S positions,
gathered over ranks at a save; it fits any number of ranks and workers.
"""

import itertools
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blt_titan.batch import WHOLE_ROW, Batch, ContextSlice
from blt_titan.data.rows.collate import collate_rows
from blt_titan.data.rows.continuation import check_continues, data_identity
from blt_titan.data.rows.dataset import Block, RowDataset
from blt_titan.data.rows.mixture import MixtureOrder
from blt_titan.data.rows.order import StreamOrder
from blt_titan.data.rows.packing import Row
from blt_titan.data.rows.source import RowSource
from blt_titan.data.rows.streams import POSITION_FIELDS
from blt_titan.data.rows.workers import Worker, WorkerLostError
from blt_titan.data.store.errors import DataError
from blt_titan.patching.registry import RuleError

logger = logging.getLogger(__name__)

WAIT_S = 300.0
"""How long a worker may show no sign of life, unless a run says otherwise."""
RENEWED_AFTER_BATCHES = 1000
"""After so many, workers that had to be begun anew have proved themselves, and may be once more."""
_QUARANTINED_FIELD = POSITION_FIELDS.index("quarantined")


class RowLoader:
    """Batches of one data-parallel rank, endless, with a state that any layout can continue from.

    Args:
        source: the data and the row shape.
        order: the streams.
        dp_rank: this rank among the data-parallel ranks.
        dp_size: data-parallel ranks; must divide `order.streams`.
        rows_per_batch: B.
        context_slice: the part of each row that this rank takes; ranks with the same `dp_rank` read the same rows.
        num_workers: worker processes; lowered to a divisor of the rank's streams, so that no stream has two makers.
        prefetch_factor: batches that each worker makes ahead; None for 2.
        wait_s: seconds without a sign of life after which a worker is lost. Workers are begun anew once.
        quarantine: pass over record batches that cannot be used, name them in the log and count them in the state;
            else the first one ends the iteration with its error.
        quarantine_log: a file that gets a line for each of them, when it is read (workers read ahead).
        patching_may_change: go on from a state that was written with other patches.
        merge_positions: makes the table whole: entries that other ranks own are -1 on entry. None where one rank
            owns all streams.

    Raises:
        DataError: if the data has fewer record batches than the run has streams.
    """

    def __init__(
        self,
        source: RowSource,
        order: StreamOrder | MixtureOrder,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        rows_per_batch: int,
        context_slice: ContextSlice = WHOLE_ROW,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        wait_s: float = WAIT_S,
        quarantine: bool = False,
        quarantine_log: Path | None = None,
        patching_may_change: bool = False,
        merge_positions: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        assert order.streams % dp_size == 0
        if order.record_batches < order.streams:
            raise DataError(
                f"the data has {order.record_batches} record batches, fewer than data.streams = {order.streams}: "
                "lower it, or prepare the data with smaller record batches"
            )
        self.source = source
        self.order = order
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.rows_per_batch = rows_per_batch
        self.context_slice = context_slice
        own_streams = order.streams // dp_size
        self.num_workers = next(
            w for w in range(min(num_workers, own_streams), -1, -1) if w == 0 or own_streams % w == 0
        )
        self._prefetch_factor = prefetch_factor or 2
        self._wait_s = wait_s
        self._batches_since_lost: int | None = None
        self._quarantine = quarantine
        # Of ranks that share rows, one writes.
        self._quarantine_log = quarantine_log if context_slice.index == 0 else None
        self._quarantined_told = 0
        self._patching_may_change = patching_may_change
        self._merge_positions = merge_positions
        fields = len(POSITION_FIELDS) + (len(order.sizes) if isinstance(order, MixtureOrder) else 0)
        self._positions = np.zeros((order.streams, fields), dtype=np.int64)
        self._rows_served = 0  # by all ranks together

    def __iter__(self) -> Iterator[Batch]:
        for rows in self.packed_batches():
            yield collate_rows(rows, self.source.shape, self.context_slice)

    def packed_batches(self) -> Iterator[list[Row]]:
        """Yield the rows of each batch before they are laid out; the state moves on with them, as with batches."""
        rows = self._rows()
        while True:
            try:
                taken = list(itertools.islice(rows, self.rows_per_batch))
            except WorkerLostError as lost:
                self._note_lost(lost)
                # What was made ahead is made again, and nothing else: positions are those of batches handed out.
                rows = self._rows()
                continue
            for _, position in taken:
                self._positions[self._next_row() % self.order.streams] = position
                self._rows_served += self.dp_size
            if self._batches_since_lost is not None:
                self._batches_since_lost += 1
            yield [row for row, _ in taken]

    def _next_row(self) -> int:
        """Return the number of the row that this rank serves next: of its rows, the first that was not served."""
        return self._rows_served + (self.dp_rank - self._rows_served) % self.dp_size

    def _note_lost(self, lost: WorkerLostError) -> None:
        """Say that workers are begun anew.

        Raises:
            WorkerLostError: they were, not long ago.
        """
        if self._batches_since_lost is not None and self._batches_since_lost < RENEWED_AFTER_BATCHES:
            raise WorkerLostError(
                f"{lost}. Workers were begun anew already, {self._batches_since_lost} batches before; see that the "
                "data can be read there, and that memory is enough"
            ) from lost
        self._batches_since_lost = 0
        logger.warning(f"{lost}. All workers of this rank begin anew where its streams are; no row is lost or repeated")

    def _rows(self) -> Iterator[tuple[Row, np.ndarray]]:
        dataset = RowDataset(
            self.source,
            self.order,
            dp_rank=self.dp_rank,
            dp_size=self.dp_size,
            positions=self._positions.copy(),
            first_row=self._next_row() // self.dp_size,
            rows_per_block=self.rows_per_batch,
            quarantine=self._quarantine,
            quarantine_log=self._quarantine_log,
        )
        if not self.num_workers:
            for block in dataset.blocks():
                yield from _sound(block)
            return
        workers: list[Worker] = []
        try:
            for number in range(self.num_workers):
                workers.append(
                    Worker(
                        number,
                        lambda worker, note: dataset.blocks(worker, self.num_workers, note),
                        ahead=self._prefetch_factor,
                        wait_s=self._wait_s,
                    )
                )
            # Workers answer in turn, each with every W-th row.
            while True:
                for rows in zip(*[_sound(worker.next_block()) for worker in workers], strict=True):
                    yield from rows
        finally:
            for worker in workers:
                worker.close()

    def take_quarantined(self) -> int:
        """Return the record batches that this rank has skipped since the last call, as the batches come to them.

        Of ranks that share rows, the first slice's alone counts them.
        """
        own = int(self._positions[self.dp_rank :: self.dp_size, _QUARANTINED_FIELD].sum())
        new, self._quarantined_told = own - self._quarantined_told, own
        return new if self.context_slice.index == 0 else 0

    @property
    def rows_served(self) -> int:
        """Rows that all ranks together have been given, so the number of the row that comes next."""
        return self._rows_served

    def position_crc32(self) -> int:
        """Return a checksum of where this rank's streams are; ranks that read the same rows have the same."""
        return zlib.crc32(self._positions[self.dp_rank :: self.dp_size].tobytes())

    def ids_by_dataset(self) -> np.ndarray:
        """Return the ids of each mixed data set in the run's batches of this rank so far, int64 [data sets].

        Of ranks that share rows, the first slice's alone counts them.
        """
        own = self._positions[self.dp_rank :: self.dp_size, len(POSITION_FIELDS) :].sum(axis=0)
        return own * (self.context_slice.index == 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last batch handed out; collective over ranks if positions are merged."""
        own = torch.full(self._positions.shape, -1, dtype=torch.int64)
        own[self.dp_rank :: self.dp_size] = torch.from_numpy(self._positions)[self.dp_rank :: self.dp_size]
        whole = self._merge_positions(own) if self._merge_positions else own
        return {
            # An array, not a tensor: DCP refuses a tensor of another size before the identity below can say why.
            "positions": whole.numpy(),
            "rows_served": self._rows_served,
            "identity": json.dumps(self.identity()),
        }

    def identity(self) -> dict[str, Any]:
        """Return what says which data is read, in which order and with which patches."""
        return data_identity(self.source.shards.fingerprint, self.order, self.source.patcher.decided_by)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the batches of a saved state, made by any number of ranks and workers.

        Raises:
            DataError: if the state belongs to other data, to another order or to other patches; names what differs.
        """
        saved, may_change = json.loads(state_dict["identity"]), self._patching_may_change
        for changed in check_continues(saved, self.identity(), patching_may_change=may_change):
            logger.warning(changed)
        self.go_to(state_dict["positions"], int(state_dict["rows_served"]))

    def go_to(self, positions: np.ndarray, rows_served: int) -> None:
        """Continue at a place of this loader's data, int64 [streams, fields], and the rows that were served before it.

        Raises:
            DataError: if there is no such place.
        """
        if (positions < 0).any():
            raise DataError("the checkpoint holds the stream positions of one rank only; save with merge_positions")
        if positions.shape != self._positions.shape:
            raise DataError(
                f"the checkpoint's stream positions are {list(positions.shape)}, this code's "
                f"{list(self._positions.shape)} ({', '.join(POSITION_FIELDS)}): it was written by another version"
            )
        self._positions = positions.copy()
        self._quarantined_told = 0
        self.take_quarantined()
        self._rows_served = rows_served


def _sound(block: Block | DataError | RuleError) -> Block:
    """Return the block; an error is a value to workers, and is raised here."""
    if isinstance(block, DataError | RuleError):
        raise block
    return block

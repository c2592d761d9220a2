"""The rows that one process makes: those of a data-parallel rank, or a worker's share of them.

Which rows are whose is said in `loader.py`. A block of packed rows leaves, each with its stream's position after it; a
record batch that cannot be used is skipped and noted, or ends the rows with its error.
"""

import itertools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from blt_titan.data.rows.ahead import ReadAhead
from blt_titan.data.rows.mixture import MixtureOrder
from blt_titan.data.rows.order import StreamOrder
from blt_titan.data.rows.packing import PatchedIds, Row
from blt_titan.data.rows.source import RowSource
from blt_titan.data.rows.streams import POSITION_FIELDS, QUARANTINED, RowStream
from blt_titan.data.store.errors import DataError, UnreachableError
from blt_titan.patching.registry import RuleError

logger = logging.getLogger(__name__)

Block = list[tuple[Row, np.ndarray]]
"""Rows, each with its stream's position after it."""

MOST_QUARANTINED_IN_A_ROW = 1000
"""So that a run whose data is gone ends."""


class RowDataset:
    """The rows of one data-parallel rank, or a worker's share of them.

    Made of blocks of `rows_per_block` packed rows, each with its stream's position after it. NumPy arrays and not
    tensors: a pipe measured faster than shared memory that is mapped anew for each block, and containers have little of
    that.
    """

    def __init__(
        self,
        source: RowSource,
        order: StreamOrder | MixtureOrder,
        *,
        dp_rank: int,
        dp_size: int,
        positions: np.ndarray,
        first_row: int,
        rows_per_block: int,
        quarantine: bool = False,
        quarantine_log: Path | None = None,
    ):
        self.source = source
        self.order = order
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.positions = positions
        self.quarantine_log = quarantine_log
        self.first_row = first_row
        self.rows_per_block = rows_per_block
        self.quarantine = quarantine
        self._quarantined_in_a_row = 0
        self._note: Callable[[str], None] | None = None
        self._rows_made = 0

    def blocks(
        self, worker: int = 0, workers: int = 1, note: Callable[[str], None] | None = None
    ) -> Iterator[Block | DataError | RuleError]:
        """Make the blocks of one of `workers`; after data that cannot be used comes the error, without end.

        Args:
            worker: which one.
            workers: how many share the rank's rows.
            note: is told what is being read.
        """
        self._note = note
        try:
            yield from self._blocks(worker, workers)
        except (DataError, RuleError) as error:
            yield from itertools.repeat(error)  # see `RowLoader._rows`

    def _blocks(self, worker: int, workers: int) -> Iterator[Block]:
        rows_of_rank = itertools.count(self.first_row + worker, workers)
        streams: dict[int, RowStream] = {}
        self._ahead = ReadAhead(lambda place: self.source.load(self.order.record_batch(*place)), self.source.read_ahead)
        # Every stream's first record batch is due when the turn first comes to it.
        self._own_streams = self.order.streams // self.dp_size // workers
        if self.source.read_ahead:
            for turn in range(self._own_streams):
                number = self._stream(self.first_row + worker + turn * workers)
                self._ahead.expect((number, int(self.positions[number][0])), turn)
        try:
            while True:
                block: Block = []
                for row_of_rank in itertools.islice(rows_of_rank, self.rows_per_block):
                    number = self._stream(row_of_rank)
                    stream = streams.get(number) or streams.setdefault(number, self._open(number))
                    row = stream.next_row()
                    assert row is not None
                    block.append((row, stream.position()))
                    self._rows_made += 1
                yield block
        finally:
            self._ahead.close()

    def _stream(self, row_of_rank: int) -> int:
        return (row_of_rank * self.dp_size + self.dp_rank) % self.order.streams

    def _open(self, number: int) -> RowStream:
        order = self.order
        stream = RowStream(
            lambda pick: self._read(number, pick),
            self.source.shape,
            datasets=self.positions.shape[1] - len(POSITION_FIELDS),
            dataset_of=(lambda pick: order.dataset(number, pick)) if isinstance(order, MixtureOrder) else None,
        )
        stream.seek(self.positions[number])
        return stream

    def _read(self, number: int, pick: int) -> PatchedIds:
        record_batch = self.order.record_batch(number, pick)
        if self._note is not None:
            self._note(f"it was reading {self.source.shards.place_of(record_batch)}")
        try:
            patched = self.source.patch(self._ahead.take((number, pick)))
        except UnreachableError:
            raise  # nothing is wrong with the data
        except DataError as error:
            self._quarantined_in_a_row += 1
            if not self.quarantine:
                raise
            if self._quarantined_in_a_row == MOST_QUARANTINED_IN_A_ROW:
                raise DataError(
                    f"{self._quarantined_in_a_row} record batches in a row could not be used, the last: {error}"
                ) from error
            logger.warning(f"in quarantine: {error}")
            if self.quarantine_log is not None:
                self._log_quarantined(self.quarantine_log, str(error))
            self._ahead.expect((number, pick + 1), self._rows_made)
            return QUARANTINED
        self._quarantined_in_a_row = 0
        if self._note is not None:
            self._note(f"it was packing rows, last of {self.source.shards.place_of(record_batch)}")
        # The stream's turn comes once in as many rows as there are streams, until its ids are in rows.
        turns = len(patched.ids) // self.source.shape.n_bytes
        self._ahead.expect((number, pick + 1), self._rows_made + self._own_streams * turns)
        return patched

    def _log_quarantined(self, path: Path, what: str) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as log:
                log.write(json.dumps({"dp_rank": self.dp_rank, "what": what}) + "\n")
        except OSError as error:  # the state counts it all the same
            logger.warning(f"{path}: cannot be written ({error.strerror})")

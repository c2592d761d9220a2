"""From shards to batches: rows made by worker processes, in an order that no layout changes.

Row n of the run, counted over all ranks and steps, comes from stream n mod S. Data-parallel rank r serves the rows with
n mod dp = r, so dp must divide S, and worker w of W makes every W-th of the rank's rows. With S = 6, dp = 2, W = 3:

    rank 0   rows 0 2 4 6 8 10 ...   from streams 0 2 4 0 2 4 ...   made by workers 0 1 2 0 1 2 ...
    rank 1   rows 1 3 5 7 9 11 ...   from streams 1 3 5 1 3 5 ...   made by workers 0 1 2 0 1 2 ...

State rides with the batch: a row carries its stream's position after it, and the loader's state is that of the batches
it has handed out, so what workers made ahead is neither lost nor repeated. The state is one table of S positions,
gathered over ranks at a save; it fits any number of ranks and workers.
"""

import itertools
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from blt_titan.batch import WHOLE_ROW, ContextSlice
from blt_titan.data.prepare.worker_pool import die_with_parent
from blt_titan.data.rows.collate import Batch, collate_rows
from blt_titan.data.rows.mixture import MixtureOrder, ShardSets
from blt_titan.data.rows.order import StreamOrder
from blt_titan.data.rows.packing import (
    MarkByEntropy,
    MarkPatchStarts,
    PatchedIds,
    Row,
    RowShape,
    empty_row,
    patch_documents,
    patch_scored_documents,
)
from blt_titan.data.rows.streams import POSITION_FIELDS, QUARANTINED, RowStream
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.shards import RecordBatch, ShardSet

logger = logging.getLogger(__name__)

Block = list[tuple[Row, np.ndarray]]
"""Rows, each with its stream's position after it."""

IDENTITY_KEY = "dataloader.identity"
"""Where a checkpoint says what data its run reads: JSON, the keys that cannot change and `patching`."""
ROWS_KEY = "dataloader.rows_served"
"""Where it says how many rows all ranks together have read."""
_NO_SNAPSHOTS = 1 << 62
"""torchdata's own state is not used: it refuses another number of workers."""
_QUARANTINED_FIELD = POSITION_FIELDS.index("quarantined")
MOST_QUARANTINED_IN_A_ROW = 1000
"""So that a run whose data is gone ends."""


ReadEntropies = Callable[[RecordBatch], np.ndarray]
"""The entropies of a record batch: fp32 [text bytes], in nats, rounded as they decide."""


@dataclass(frozen=True)
class RowSource:
    """What makes a row: the data, how it is patched, and the row's shape."""

    shards: ShardSet | ShardSets
    mark_starts: MarkPatchStarts | MarkByEntropy
    shape: RowShape
    read_entropies: ReadEntropies | None = None
    """For the rules that go by entropies."""
    patching: Mapping[str, Any] = field(default_factory=dict)
    """What decides where patches begin, by name; to tell a run that goes on with other patches."""

    def read(self, record_batch: int) -> PatchedIds:
        """Read and patch one record batch."""
        batch = self.shards.read(record_batch)
        if self.read_entropies is None:
            return patch_documents(batch.text, batch.offsets, cast(MarkPatchStarts, self.mark_starts))
        return patch_scored_documents(
            batch.text, batch.offsets, self.read_entropies(batch), cast(MarkByEntropy, self.mark_starts)
        )


class RowDataset(IterableDataset):
    """The rows of one data-parallel rank, or in a worker process that worker's share of them.

    Yields blocks of `rows_per_block` packed rows, each with its stream's position after it. NumPy arrays and not
    tensors: a pipe measured faster than shared memory that is mapped anew for each block, and containers have little of
    that. After data that cannot be used comes the error instead.
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

    def __iter__(self) -> Iterator[Block | DataError]:
        try:
            yield from self._blocks()
        except DataError as error:
            yield from itertools.repeat(error)  # see `RowLoader._rows`

    def _blocks(self) -> Iterator[Block]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        rows_of_rank = itertools.count(self.first_row + first, step)
        streams: dict[int, RowStream] = {}
        while True:
            block: Block = []
            for row_of_rank in itertools.islice(rows_of_rank, self.rows_per_block):
                number = (row_of_rank * self.dp_size + self.dp_rank) % self.order.streams
                stream = streams.get(number) or streams.setdefault(number, self._open(number))
                row = stream.next_row()
                assert row is not None
                block.append((row, stream.position()))
            yield block

    def _open(self, number: int) -> RowStream:
        order = self.order
        stream = RowStream(
            lambda pick: self._read(order.record_batch(number, pick)),
            self.source.shape,
            datasets=self.positions.shape[1] - len(POSITION_FIELDS),
            dataset_of=(lambda pick: order.dataset(number, pick)) if isinstance(order, MixtureOrder) else None,
        )
        stream.seek(self.positions[number])
        return stream

    def _read(self, record_batch: int) -> PatchedIds:
        try:
            patched = self.source.read(record_batch)
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
                self._note(self.quarantine_log, str(error))
            return QUARANTINED
        self._quarantined_in_a_row = 0
        return patched

    def _note(self, path: Path, what: str) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as log:
                log.write(json.dumps({"dp_rank": self.dp_rank, "what": what}) + "\n")
        except OSError as error:  # the state counts it all the same
            logger.warning(f"{path}: cannot be written ({error.strerror})")


class RowLoader:
    """Batches of one data-parallel rank, endless, with a state that any layout can continue from.

    Args:
        source: the data and the row shape.
        order: the streams.
        dp_rank: this rank among the data-parallel ranks.
        dp_size: data-parallel ranks; must divide `order.streams`.
        rows_per_batch: B.
        part: the context slice of each row that this rank takes; ranks with the same `dp_rank` read the same rows.
        num_workers: worker processes; lowered to a divisor of the rank's streams, so that no stream has two makers.
        prefetch_factor: batches that each worker makes ahead.
        pin_memory: page-locked batches for faster copies to a GPU.
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
        part: ContextSlice = WHOLE_ROW,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        pin_memory: bool = False,
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
        self.part = part
        own_streams = order.streams // dp_size
        self.num_workers = next(
            w for w in range(min(num_workers, own_streams), -1, -1) if w == 0 or own_streams % w == 0
        )
        self._prefetch_factor = prefetch_factor
        self._pin_memory = pin_memory
        self._quarantine = quarantine
        # Of ranks that share rows, one writes.
        self._quarantine_log = quarantine_log if part.index == 0 else None
        self._quarantined_told = 0
        self._patching_may_change = patching_may_change
        self._merge_positions = merge_positions
        fields = len(POSITION_FIELDS) + (len(order.sizes) if isinstance(order, MixtureOrder) else 0)
        self._positions = np.zeros((order.streams, fields), dtype=np.int64)
        self._rows_served = 0  # by all ranks together

    def __iter__(self) -> Iterator[Batch]:
        rows = self._rows()
        while True:
            taken = list(itertools.islice(rows, self.rows_per_batch))
            rows_taken = [row for row, _ in taken]
            batch = collate_rows(rows_taken, self.source.shape, self.part, pin_memory=self._pin_memory)
            for _, position in taken:
                self._positions[(self._rows_served + self.dp_rank) % self.order.streams] = position
                self._rows_served += self.dp_size
            yield batch

    def _rows(self) -> Iterator[tuple[Row, np.ndarray]]:
        dataset = RowDataset(
            self.source,
            self.order,
            dp_rank=self.dp_rank,
            dp_size=self.dp_size,
            positions=self._positions.copy(),
            first_row=self._rows_served // self.dp_size,
            rows_per_block=self.rows_per_batch,
            quarantine=self._quarantine,
            quarantine_log=self._quarantine_log,
        )
        blocks = iter(
            StatefulDataLoader(
                dataset,
                batch_size=None,
                collate_fn=_unchanged,
                num_workers=self.num_workers,
                prefetch_factor=self._prefetch_factor if self.num_workers else None,
                snapshot_every_n_steps=_NO_SNAPSHOTS,
                worker_init_fn=_die_with_the_trainer,
            )
        )
        # Workers answer in turn, each with every W-th row. An error is a value to them and is raised here, after which
        # no traceback refers to `blocks`: left to the garbage collector, torch would wait 5 s for each worker.
        try:
            while one_of_each := list(itertools.islice(blocks, max(1, self.num_workers))):
                for block in one_of_each:
                    if isinstance(block, DataError):
                        raise block
                for rows in zip(*one_of_each, strict=True):
                    yield from rows
        finally:
            del blocks

    def take_quarantined(self) -> int:
        """Return the record batches that this rank has passed over since the last call, as the batches come to them.

        Of ranks that share rows, the first slice's alone counts them.
        """
        own = int(self._positions[self.dp_rank :: self.dp_size, _QUARANTINED_FIELD].sum())
        new, self._quarantined_told = own - self._quarantined_told, own
        return new if self.part.index == 0 else 0

    def position_crc32(self) -> int:
        """Return a checksum of where this rank's streams are; ranks that read the same rows have the same."""
        return zlib.crc32(self._positions[self.dp_rank :: self.dp_size].tobytes())

    def ids_by_dataset(self) -> np.ndarray:
        """Return the ids of each mixed data set in the run's batches of this rank so far, int64 [data sets].

        Of ranks that share rows, the first slice's alone counts them.
        """
        own = self._positions[self.dp_rank :: self.dp_size, len(POSITION_FIELDS) :].sum(axis=0)
        return own * (self.part.index == 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last batch handed out; collective over ranks if positions are merged."""
        own = torch.full(self._positions.shape, -1, dtype=torch.int64)
        own[self.dp_rank :: self.dp_size] = torch.from_numpy(self._positions)[self.dp_rank :: self.dp_size]
        whole = self._merge_positions(own) if self._merge_positions else own
        identity = _identity(self.source.shards.fingerprint, self.order) | {"patching": dict(self.source.patching)}
        return {
            # An array, not a tensor: DCP refuses a tensor of another size before the identity below can say why.
            "positions": whole.numpy(),
            "rows_served": self._rows_served,
            "identity": json.dumps(identity),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the batches of a saved state, made by any number of ranks and workers.

        Raises:
            DataError: if the state belongs to other data, to another order or to other patches; names what differs.
        """
        saved = json.loads(state_dict["identity"])
        fingerprint, patching = self.source.shards.fingerprint, self.source.patching
        may_change = self._patching_may_change
        for changed in check_continues(saved, fingerprint, self.order, patching, patching_may_change=may_change):
            logger.warning(changed)
        rows_served = int(state_dict["rows_served"])
        if rows_served % self.dp_size:
            raise DataError(f"{rows_served} rows were served, which {self.dp_size} data-parallel ranks do not divide")
        if (state_dict["positions"] < 0).any():
            raise DataError("the checkpoint holds the stream positions of one rank only; save with merge_positions")
        if state_dict["positions"].shape != self._positions.shape:
            raise DataError(
                f"the checkpoint's stream positions are {list(state_dict['positions'].shape)}, this code's "
                f"{list(self._positions.shape)} ({', '.join(POSITION_FIELDS)}): it was written by another version"
            )
        self._positions = state_dict["positions"].copy()
        self._quarantined_told = 0
        self.take_quarantined()
        self._rows_served = rows_served


def _identity(fingerprint: str, order: StreamOrder | MixtureOrder) -> dict[str, Any]:
    return {
        "data.streams": order.streams,
        "data.seed": order.seed,
        "training.dataset_path (fingerprint)": fingerprint,
        **({"data.mixture (shares)": list(order.shares)} if isinstance(order, MixtureOrder) else {}),
    }


def check_continues(
    saved: Mapping[str, Any],
    fingerprint: str,
    order: StreamOrder | MixtureOrder,
    patching: Mapping[str, Any],
    *,
    patching_may_change: bool,
) -> list[str]:
    """Check that a run can go on in the data of a saved state.

    Args:
        saved: what the state says of its data.
        fingerprint: of the run's data.
        order: the run's streams.
        patching: what decides where its patches begin, by name.
        patching_may_change: go on with other patches.

    Returns:
        A sentence for each thing that is otherwise from here on.

    Raises:
        DataError: if the state belongs to other data, to another order or to other patches; names what differs.
    """
    for key, value in _identity(fingerprint, order).items():
        if saved.get(key) != value:
            raise DataError(
                f"the checkpoint's data order cannot be continued: it was written with {key} = {saved.get(key)!r}, "
                f"this run has {value!r}; set it as it was, or begin in another job.dump_folder"
            )
    changed, before = [], saved.get("patching", {})
    for key, value in patching.items():
        if before.get(key) == value:
            continue
        said = f"the checkpoint was written with {key} = {before.get(key)!r}, this run has {value!r}"
        if not patching_may_change and key in before:
            raise DataError(
                f"{said}, so patches would be cut otherwise: set it as it was, or set patching.allow_change = true"
            )
        changed.append(f"{said}: from here on patches are cut otherwise (no text is lost or repeated)")
    return changed


class HeldOutRows:
    """The rows of a held-out split: documents in order, each byte exactly once, the same rows in every layout.

    Iterating yields this rank's batches; all ranks yield equally many. Rows that the data does not fill are padding
    without targets.

    Args:
        source: the data and the row shape.
        dp_rank: this rank among the data-parallel ranks.
        dp_size: data-parallel ranks.
        rows_per_batch: B.
        max_rows: rows of the split, counted over all ranks, that are yielded; None for all.
        part: the context slice of each row that this rank takes.
    """

    def __init__(
        self,
        source: RowSource,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        rows_per_batch: int,
        max_rows: int | None = None,
        part: ContextSlice = WHOLE_ROW,
    ):
        self.source = source
        self.part = part
        self.max_rows = max_rows
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.rows_per_batch = rows_per_batch

    def __iter__(self) -> Iterator[Batch]:
        n_record_batches = len(self.source.shards)
        stream = RowStream(lambda pick: self.source.read(pick) if pick < n_record_batches else None, self.source.shape)
        rows = itertools.islice(iter(stream.next_row, None), self.max_rows)
        while together := list(itertools.islice(rows, self.dp_size * self.rows_per_batch)):
            own = together[self.dp_rank :: self.dp_size]
            own += [empty_row(self.source.shape)] * (self.rows_per_batch - len(own))
            yield collate_rows(own, self.source.shape, self.part)


def _unchanged(block: Any) -> Any:
    return block


def _die_with_the_trainer(_worker: int) -> None:
    """Keep a worker from outliving its trainer.

    torch's own watch only ends the worker's loop: a row that fills the pipe would then be waited for, for ever, because
    every worker holds the reading end too.
    """
    die_with_parent()

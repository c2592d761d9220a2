"""Held-out rows: every byte of a split exactly once, in the same rows whatever the layout of ranks."""

import itertools
from collections.abc import Iterator

from blt_titan.batch import WHOLE_ROW, Batch, ContextSlice
from blt_titan.data.rows.ahead import ReadAhead
from blt_titan.data.rows.collate import collate_rows
from blt_titan.data.rows.packing import PatchedIds, empty_row
from blt_titan.data.rows.source import RowSource
from blt_titan.data.rows.streams import RowStream


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
        context_slice: the part of each row that this rank takes.
    """

    def __init__(
        self,
        source: RowSource,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        rows_per_batch: int,
        max_rows: int | None = None,
        context_slice: ContextSlice = WHOLE_ROW,
    ):
        self.source = source
        self.context_slice = context_slice
        self.max_rows = max_rows
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.rows_per_batch = rows_per_batch

    def __iter__(self) -> Iterator[Batch]:
        n_record_batches, source = len(self.source.shards), self.source
        ahead = ReadAhead(source.load, source.read_ahead)

        def read(pick: int) -> PatchedIds | None:
            for coming in range(pick, min(pick + source.read_ahead, n_record_batches)):
                ahead.expect(coming, coming)
            return source.patch(ahead.take(pick)) if pick < n_record_batches else None

        stream = RowStream(read, source.shape)
        rows = itertools.islice(iter(stream.next_row, None), self.max_rows)
        while together := list(itertools.islice(rows, self.dp_size * self.rows_per_batch)):
            own = together[self.dp_rank :: self.dp_size]
            own += [empty_row(self.source.shape)] * (self.rows_per_batch - len(own))
            yield collate_rows(own, self.source.shape, self.context_slice)
        ahead.close()

"""What makes a row: the data, how it is patched, and the row's shape."""

from dataclasses import dataclass

import numpy as np

from blt_titan.data.rows.mixture import ShardSets
from blt_titan.data.rows.packing import PatchedIds, RowShape
from blt_titan.data.rows.patcher import RowPatcher
from blt_titan.data.store.record_batch import RecordBatch
from blt_titan.data.store.shards import ShardSet

Loaded = tuple[RecordBatch, np.ndarray | None]
"""A record batch, and what its patches need beside it."""


@dataclass(frozen=True)
class RowSource:
    """What makes a row: the data, how it is patched, and the row's shape."""

    shards: ShardSet | ShardSets
    patcher: RowPatcher
    shape: RowShape
    read_ahead: int = 0
    """Record batches that each process reads before they are asked for; for data that comes from an object store."""

    def read(self, record_batch: int) -> PatchedIds:
        """Read and patch one record batch.

        Raises:
            DataError: it, or the entropies of its patches, are missing or damaged.
        """
        return self.patch(self.load(record_batch))

    def load(self, record_batch: int) -> Loaded:
        """Read what comes from files; threads may call it.

        Raises:
            DataError: as `read`.
        """
        batch = self.shards.read(record_batch)
        return batch, self.patcher.read_beside(batch)

    def patch(self, loaded: Loaded) -> PatchedIds:
        """Patch what was loaded.

        Raises:
            DataError: as `read`.
        """
        return self.patcher.patch(*loaded)

"""What makes a row: the data, how it is patched, and the row's shape."""

from dataclasses import dataclass

from blt_titan.data.rows.mixture import ShardSets
from blt_titan.data.rows.packing import PatchedIds, RowShape
from blt_titan.data.rows.patcher import RowPatcher
from blt_titan.data.store.shards import ShardSet


@dataclass(frozen=True)
class RowSource:
    """What makes a row: the data, how it is patched, and the row's shape."""

    shards: ShardSet | ShardSets
    patcher: RowPatcher
    shape: RowShape

    def read(self, record_batch: int) -> PatchedIds:
        """Read and patch one record batch.

        Raises:
            DataError: it, or the entropies of its patches, are missing or damaged.
        """
        return self.patcher.patch(self.shards.read(record_batch))

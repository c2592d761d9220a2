"""The ranks that read the same rows: they share the entropies of the text, and must stay at the same place of it."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from blt_titan.data.store.shards import RecordBatch
from blt_titan.titan import Parallelism, device_type


class RowsDifferError(RuntimeError):
    """Ranks that read the same rows are not at the same place of the data."""


class RowRanks:
    """The ranks that read the same rows: those of a data-parallel rank, over pp, cp and tp.

    Building it is collective over all ranks.

    Args:
        pp: pipeline-parallel degree.
        context: cp x tp, the slices of a row.
    """

    def __init__(self, pp: int, context: int):
        ranks = torch.arange(dist.get_world_size()).view(pp, -1, context)
        group, _ = dist.new_subgroups_by_enumeration(ranks.transpose(0, 1).flatten(1).tolist())
        assert isinstance(group, dist.ProcessGroup)
        self.group = group

    def share(self, make: Callable[[], np.ndarray], batch: RecordBatch) -> np.ndarray:
        """Have the first rank make the entropies of a record batch, fp32 [text bytes], and give them to all.

        Raises:
            RowsDifferError: the ranks are at different record batches.
        """
        if not self._agree(batch.crc32):
            raise RowsDifferError(
                f"rank {dist.get_rank()}: ranks that read the same rows are at different record batches, this one at "
                f"{batch.shard_path}: record batch {batch.batch_in_shard}. One of them passed over what others could "
                "read (their logs say what): see that all nodes have the same files"
            )
        shared = torch.empty(len(batch.text), device=device_type)
        if self.group.rank() == 0:
            shared.copy_(torch.from_numpy(make()))
        dist.broadcast(shared, group=self.group, group_src=0)
        return shared.cpu().numpy()

    def check_position(self, position_crc32: int, step: int) -> None:
        """Check that no record batch was passed over on some of the ranks, and not on others.

        Args:
            position_crc32: `RowLoader.position_crc32` of this rank.
            step: the step just made.

        Raises:
            RowsDifferError: the ranks are at different places of the data.
        """
        if not self._agree(position_crc32):
            raise RowsDifferError(
                f"rank {dist.get_rank()}: at step {step} ranks that read the same rows are not at the same place "
                "of the data: one of them passed over a record batch that others could read (the logs of the ranks say "
                "which). Nothing was saved since; see that all nodes have the same files"
            )

    def _agree(self, value: int) -> bool:
        """Tell whether all ranks have the same value."""
        ends = torch.tensor([value, -value], device=device_type)
        dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=self.group)
        return bool(ends.sum() == 0)


def row_ranks(parallelism: Parallelism) -> RowRanks | None:
    """Return the ranks that read the same rows as this one; None if it is alone. Collective when first called."""
    context = parallelism.context_parallel_degree * parallelism.tensor_parallel_degree
    pp = parallelism.pipeline_parallel_degree
    return _row_ranks(dist.group.WORLD, pp, context) if pp * context > 1 else None


@cache
def _row_ranks(_world: Any, pp: int, context: int) -> RowRanks:
    return RowRanks(pp, context)

"""Hash tables whose columns lie on different ranks: looked up where they are, never gathered.

A BLT's tables hold most of its parameters (3 of 4.5 billion in the 1B) and a step reads few of their rows, so
gathering them as FSDP does would move a hundred times what is used. Here rank r of n holds columns r d / n to
(r + 1) d / n of all rows. Per micro-batch the ranks gather each other's byte ids (4 bytes each), every rank hashes and
sums its columns for all of them, and one all-to-all returns whole vectors to whoever asked; backward goes the same way
home. Shapes are fixed, nothing is read by the host, and no rank is hotter than another.

With replicas the gradient is a partial sum on each; `reduce_partial_gradients` adds them once per step.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from parallelisms.collectives import gather_rows, swap_columns_for_rows

_ID_BITS = 9  # 260 ids


class ColumnLookUp:
    """Looks up in tables whose columns lie on several ranks, for the bytes of all of them.

    Args:
        mesh: of the table: (bytes) or (dp_replicate, bytes).
        compute_dtype: dtype of the sums that travel and leave.
    """

    def __init__(self, mesh: DeviceMesh, compute_dtype: torch.dtype):
        self.mesh = mesh[mesh.mesh_dim_names[-1]] if mesh.ndim > 1 else mesh  # pyright: ignore[reportOptionalSubscript]
        self.grad_placements = [*[Partial()] * (mesh.ndim - 1), Shard(1)]
        self.compute_dtype = compute_dtype

    def __call__(self, embedding: Any, ids_BT: torch.Tensor, doc_BT: torch.Tensor, skip: int) -> torch.Tensor:
        """Sum the tables' rows for all but the first `skip` bytes: [B, T] -> [B, T - skip, d]."""
        B, S = ids_BT.shape[0], ids_BT.shape[1] - skip
        # Documents count from -2 (before the row) up; with the id beside it one integer says all.
        everyone = gather_rows((doc_BT.int() + 2) << _ID_BITS | ids_BT.int(), self.mesh)
        ids, docs = everyone & (1 << _ID_BITS) - 1, (everyone >> _ID_BITS) - 2
        weight = embedding.weight.to_local(grad_placements=self.grad_placements)
        columns = embedding.sum_rows(ids, docs, skip, weight).to(self.compute_dtype)
        return swap_columns_for_rows(columns.flatten(0, 1), self.mesh).view(B, S, -1)


def shard_columns(hash_embedding: nn.Module, mesh: DeviceMesh, *, compute_dtype: torch.dtype) -> ColumnLookUp:
    """Replace the table by a DTensor of columns.

    Args:
        hash_embedding: the module; its `weight` [rows, d] may be on the meta device.
        mesh: (bytes) or (dp_replicate, bytes); the last axis divides d.
        compute_dtype: dtype of the sums that travel and leave. Tables and sums stay in the weight's own dtype.

    Returns:
        How to look up in it from now on.
    """
    module: Any = hash_embedding
    placements = [*[Replicate()] * (mesh.ndim - 1), Shard(1)]
    module.weight = nn.Parameter(distribute_tensor(module.weight.data, mesh, placements, src_data_rank=None))
    return ColumnLookUp(mesh, compute_dtype)


def reduce_partial_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up gradients that are still one summand per replica; after the last micro-batch, before clipping."""
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor) and any(placement.is_partial() for placement in gradient.placements):
            assert isinstance(parameter, DTensor)
            parameter.grad = gradient.redistribute(placements=parameter.placements)


def local_columns(parameter: nn.Parameter) -> tuple[torch.Tensor, range] | None:
    """Return this rank's part of a table as a tensor and its columns; None if it is not split by whole columns."""
    if not isinstance(parameter, DTensor):
        return parameter.data, range(parameter.shape[1])
    if any(isinstance(placement, Shard) and placement.dim == 0 for placement in parameter.placements):
        return None
    local = parameter.to_local()
    axis = next((i for i, placement in enumerate(parameter.placements) if isinstance(placement, Shard)), None)
    first = 0 if axis is None else parameter.device_mesh.get_local_rank(axis) * local.shape[1]
    return local, range(first, first + local.shape[1])

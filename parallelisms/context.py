"""Context parallelism: a row lies on several ranks, bytes and patches each with the exchange that fits them.

Over bytes, attention sees a window, so each rank sends the keys and values of its slice's last W - 1 bytes to the ranks
after it. Over patches, attention sees the whole document, so keys and values are gathered over `cp`; what was gathered
is not kept for backward but gathered again. The bytes at the beginning of a slice read the patch before it.
"""

from dataclasses import replace
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from blt_titan.batch import RowSplit
from blt_titan.model.placement import Placement
from parallelisms.collectives import gather_along_dim_1, receive_from_before
from parallelisms.meshes import Meshes


class HaloAttention:
    """Windowed attention of a slice: brings the keys of the W - 1 bytes before it, then attends as on one device."""

    def __init__(self, attend: Any, mesh: DeviceMesh, halo_slices: int):
        self.attend = attend
        self.mesh = mesh
        self.halo_slices = halo_slices

    def __call__(self, q_BSHK: torch.Tensor, k_BSHK: torch.Tensor, v_BSHK: torch.Tensor, mask: Any) -> torch.Tensor:
        """Attend under a `SlicedMask`: [B, S, H, K] in and out."""
        kv_BSHX = torch.cat([k_BSHK, v_BSHK], dim=-1)
        tail_BTHX = _take(kv_BSHX, mask.tail_BT)
        arrived = receive_from_before(tail_BTHX, self.mesh, reach=self.halo_slices)
        # A row of zeros stands for bytes before the row, and keeps the first rank's exchange in the graph.
        arrived = torch.cat([torch.zeros_like(kv_BSHX[:, :1]), arrived], dim=1)
        halo_BWHX = _take(arrived, mask.halo_BW + 1)
        k, v = torch.cat([halo_BWHX, kv_BSHX], dim=1).chunk(2, dim=-1)
        return self.attend(q_BSHK, k, v, mask.inner)


class GatheredAttention:
    """Global attention of a part of the row's patches: gathers the others' keys and values, again in backward."""

    def __init__(self, attend: Any, mesh: DeviceMesh):
        self.attend = attend
        self.mesh = mesh

    def __call__(self, q_BSHK: torch.Tensor, k_BSHK: torch.Tensor, v_BSHK: torch.Tensor, mask: Any) -> torch.Tensor:
        """Attend: [B, S, H, K] in and out, S the patch slots of this part."""
        # The price of not keeping keys and values of the whole row is one more attention forward.
        return checkpoint(self._attend, q_BSHK, k_BSHK, v_BSHK, mask, use_reentrant=False, preserve_rng_state=False)

    def _attend(self, q_BSHK: torch.Tensor, k_BSHK: torch.Tensor, v_BSHK: torch.Tensor, mask: Any) -> torch.Tensor:
        kv_BTHX = gather_along_dim_1(torch.cat([k_BSHK, v_BSHK], dim=-1), self.mesh)
        k, v = kv_BTHX.chunk(2, dim=-1)
        return self.attend(q_BSHK, k, v, mask)


class LastPatchBefore:
    """Hands the state of each slice's last patch to the next slice."""

    def __init__(self, mesh: DeviceMesh):
        self.mesh = mesh

    def __call__(self, p_BPG: torch.Tensor, last_patch_B1: torch.Tensor) -> torch.Tensor:
        """Return the last patch before this slice [B, 1, G]; zeros for the first slice, which has no use for it."""
        arrived = receive_from_before(_take(p_BPG, last_patch_B1), self.mesh, reach=1)
        return torch.cat([torch.zeros_like(p_BPG[:, :1]), arrived], dim=1)[:, -1:]


def with_context_parallel(placement: Placement, meshes: Meshes, *, halo_slices: int) -> Placement:
    """Return the placement of a BLT, or of a stage of one, whose ranks hold slices of rows.

    Args:
        placement: as it is without.
        meshes: `context` and `cp` are used.
        halo_slices: how many slices back a byte's window can begin (`batch.ContextSlice`).
    """
    split = RowSplit(slices=meshes.context.size(), query_part=meshes.cp.get_local_rank(), query_parts=meshes.cp.size())
    placement = replace(placement, split=split)
    if meshes.context.size() > 1:
        placement = replace(
            placement,
            attend_bytes=HaloAttention(placement.attend_bytes, meshes.context, halo_slices),
            last_patch_before=LastPatchBefore(meshes.context),
        )
    if meshes.cp.size() > 1:
        placement = replace(placement, attend_patches=GatheredAttention(placement.attend_patches, meshes.cp))
    return placement


def _take(x_BSX: torch.Tensor, slot_BT: torch.Tensor) -> torch.Tensor:
    """Read slots of each row, zeros where the slot is negative: [B, S, ...], [B, T] -> [B, T, ...]."""
    index = slot_BT.long().view(*slot_BT.shape, *[1] * (x_BSX.ndim - 2))
    taken = x_BSX.gather(1, index.clamp(min=0).expand(-1, -1, *x_BSX.shape[2:]))
    return taken * (index >= 0)

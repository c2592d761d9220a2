"""The device meshes of a run: one arrangement of the ranks, seen as two worlds.

Ranks count up through pp, dp_replicate, dp_shard, cp, tp, the last fastest, as torchtitan has them. Bytes and patches
group them differently (8 ranks, dp_shard = cp = tp = 2):

    rank                 0    1    2    3    4    5    6    7
    bytes                0    1    2    3    4    5    6    7     weights of the local models are sharded over all
    context              0    1    2    3    0    1    2    3     slice of each row; encoder and decoder run on it alone
    patches (fsdp)       0    0    1    1    2    2    3    3     global weights are sharded over dp_shard x cp ...
    tp                   0    1    0    1    0    1    0    1     ... and split by heads and columns

Rank (c, t) of a row makes the patches of context slice c * tp + t, which is its sequence-parallel shard of cp part c:
nothing is redistributed where bytes become patches.
"""

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh

from blt_titan.titan import ParallelDims


@dataclass(frozen=True)
class Meshes:
    """Views of the ranks of one pipeline stage; every axis is there, of size 1 where it is not used."""

    patches: DeviceMesh
    """(fsdp) or, with replicas, (dp_replicate, fsdp): what the global weights are sharded over, beside `tp`."""
    bytes: DeviceMesh
    """(bytes) or (dp_replicate, bytes): what the local weights and the hash table are sharded over."""
    context: DeviceMesh
    """The ranks that share a row, cp x tp."""
    cp: DeviceMesh
    """Axis of the row's patches."""
    tp: DeviceMesh
    """Axis of the global blocks' heads and columns."""


def build_meshes(parallel_dims: ParallelDims) -> Meshes:
    """Build the meshes; collective over all ranks, and to be called once: each axis is a process group."""
    pp, replicas, shards = parallel_dims.pp, parallel_dims.dp_replicate, parallel_dims.dp_shard
    cp, tp = parallel_dims.cp, parallel_dims.tp
    world = parallel_dims.world_mesh
    dense = world._unflatten(0, (pp, replicas, shards * cp, tp), ("pp", "dp_replicate", "fsdp", "tp"))
    by_byte = world._unflatten(0, (pp, replicas, shards * cp * tp), ("pp", "dp_replicate", "bytes"))
    by_row = world._unflatten(0, (pp * replicas * shards, cp * tp), ("rows", "context"))
    by_part = world._unflatten(0, (pp * replicas * shards, cp, tp), ("rows", "cp", "tp"))
    # torchtitan sets the timeouts of a run (`comm.*_timeout_seconds`) on the axes that it finds there.
    parallel_dims._meshes |= {
        "blt_fsdp": dense["fsdp"],
        "blt_fsdp_replicate": dense["dp_replicate"],
        "blt_tp": dense["tp"],
        "blt_bytes": by_byte["bytes"],
        "blt_bytes_replicate": by_byte["dp_replicate"],
        "blt_context": by_row["context"],
        "blt_cp": by_part["cp"],
    }
    replicated = replicas > 1
    return Meshes(
        patches=dense["dp_replicate", "fsdp"] if replicated else dense["fsdp"],
        bytes=by_byte["dp_replicate", "bytes"] if replicated else by_byte["bytes"],
        context=by_row["context"],
        cp=by_part["cp"],
        tp=dense["tp"],
    )

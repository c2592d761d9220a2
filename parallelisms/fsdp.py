"""Fully sharded data parallelism (FSDP2, and HSDP where dp_replicate > 1), over two meshes of one arrangement."""

from collections.abc import Collection

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard


def apply_fsdp(
    model: nn.Module,
    *,
    patch_mesh: DeviceMesh,
    byte_mesh: DeviceMesh,
    ignored: Collection[nn.Parameter],
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: bool,
    cpu_offload: bool,
) -> None:
    """Shard `model` in place: each global block, the hash tables, the encoder, the decoder, then what is left.

    Gradients are summed, not averaged: the loss is already divided by the targets of the whole global batch. So the
    reduce-scatter of the local modules also adds up what the ranks that share a row contribute.

    Args:
        model: a BLT, a stage of one, or an entropy model, by the names of its parts.
        patch_mesh: shards the blocks in `layers`; 1-D (shard), or 2-D (replicate, shard) for HSDP.
        byte_mesh: shards the local modules, likewise.
        ignored: parameters that are split otherwise.
        param_dtype: dtype of parameters in forward and backward.
        reduce_dtype: dtype in which gradients are summed.
        reshard_after_forward: free a block's parameters between forward and backward. Never under pipeline: zero-bubble
            schedules lose gradients then, and the loss does not show it.
        cpu_offload: keep parameters, gradients and optimizer state in host memory.
    """
    offload: OffloadPolicy = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    # Inputs keep their dtype: casting them would round the fp32 rotary tables that blocks receive.
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)

    def shard(module: nn.Module, mesh: DeviceMesh, reshard: bool) -> None:
        own_ignored = set(module.parameters()) & set(ignored)
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=reshard,
            ignored_params=own_ignored or None,
        )

    for block in model.get_submodule("layers").children():
        shard(block, patch_mesh, reshard_after_forward)
    for name in ("hash_embedding", "encoder", "decoder"):
        part = getattr(model, name, None)
        if part is not None and not set(part.parameters()) <= set(ignored):
            shard(part, byte_mesh, reshard_after_forward)
    # The root holds what is needed at once in forward and in backward: nothing to gain from resharding it.
    shard(model, patch_mesh, False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has no scaled sum, and with a factor of 1 none is needed anywhere.
            module.set_force_sum_reduction_for_comms(True)

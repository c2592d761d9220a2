"""Fully sharded data parallelism (FSDP2, and HSDP where dp_replicate > 1)."""

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard


def apply_fsdp(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: bool,
    cpu_offload: bool,
) -> None:
    """Shard `model` in place: each global block, the hash tables, the encoder, the decoder, then what is left.

    Gradients are summed, not averaged: the loss is already divided by the targets of the whole global batch.

    Args:
        model: a BLT or an entropy model, by the names of its parts.
        mesh: 1-D (shard), or 2-D (replicate, shard) for HSDP.
        param_dtype: dtype of parameters in forward and backward.
        reduce_dtype: dtype in which gradients are summed.
        reshard_after_forward: free a block's parameters between forward and backward.
        cpu_offload: keep parameters, gradients and optimizer state in host memory.
    """
    offload: OffloadPolicy = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    # Inputs keep their dtype: casting them would round the fp32 rotary tables that blocks receive.
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    layers = model.get_submodule("layers")
    parts = [getattr(model, name, None) for name in ("hash_embedding", "encoder", "decoder")]
    for module in [*layers.children(), *parts]:
        if module is not None:
            fully_shard(
                module, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=reshard_after_forward
            )
    # The root holds what is needed at once in forward and in backward: nothing to gain from resharding it.
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has no scaled sum, and with a factor of 1 none is needed anywhere.
            module.set_force_sum_reduction_for_comms(True)

"""Tensor and sequence parallelism of the global transformer, with torch's own DTensor styles.

Between blocks a rank holds its slice of the patches, [B, P / ranks, G], as a plain tensor. Norms run on it; attention
and feed-forward gather it, split their work by heads and by hidden columns, and scatter the sum of their outputs.
"""

import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)


def apply_tensor_parallel(model: nn.Module, mesh: DeviceMesh, *, float8_all_gather: bool) -> None:
    """Split the global blocks of `model` over `mesh`.

    Args:
        model: a BLT or a stage of one; its local parts are not touched.
        mesh: the tp axis; divides the global heads and the hidden width.
        float8_all_gather: gather activations in float8 (blocks converted with tensorwise scaling).
    """
    colwise, rowwise, prepare = ColwiseParallel, RowwiseParallel, PrepareModuleInput
    if float8_all_gather:
        from torchao.float8.float8_tensor_parallel import (
            Float8ColwiseParallel,
            Float8RowwiseParallel,
            PrepareFloat8ModuleInput,
        )

        colwise, rowwise, prepare = Float8ColwiseParallel, Float8RowwiseParallel, PrepareFloat8ModuleInput
    plan = {
        "attention_norm": SequenceParallel(),
        "attention": prepare(
            # The rotary tables and the mask are plain, the same on all ranks of the axis; what attends is no tensor.
            input_layouts=(Shard(1), None, None, None),
            desired_input_layouts=(Replicate(), None, None, None),
        ),
        "attention.wq": colwise(),
        "attention.wk": colwise(),
        "attention.wv": colwise(),
        "attention.wo": rowwise(output_layouts=Shard(1)),
        "ffn_norm": SequenceParallel(),
        "feed_forward": prepare(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "feed_forward.w1": colwise(),
        "feed_forward.w2": rowwise(output_layouts=Shard(1)),
        "feed_forward.w3": colwise(),
    }
    for block in model.get_submodule("layers").children():
        parallelize_module(block, mesh, plan)

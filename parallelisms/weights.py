"""Initial weights of a split model: each rank keeps its slice of the tensor that the single process would draw."""

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor, distribute_tensor


def write_shard(parameter: nn.Parameter, full: torch.Tensor) -> None:
    """Store this rank's slice of `full` into a parameter that may be a DTensor.

    Every rank has drawn the same `full`, so nothing is sent.
    """
    if isinstance(parameter, DTensor):
        full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(full)

"""Gradient clipping where parameters live on different meshes and pipeline stages."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def clip_grad_norm(
    parameters: Iterable[nn.Parameter], max_norm: float, *, pp_mesh: DeviceMesh | None, foreach: bool = True
) -> torch.Tensor:
    """Scale gradients in place so that their norm is at most `max_norm`.

    Tensors of different meshes cannot be stacked, so norms are taken by mesh and joined as the root of their sum of
    squares, which pipeline stages then add up.

    Args:
        parameters: of all model parts of this rank.
        max_norm: L2 norm of all gradients together.
        pp_mesh: the pipeline axis; None without pipeline.
        foreach: use the fused implementation.

    Returns:
        The norm before clipping, fp32 scalar, the same on every rank.
    """
    by_mesh: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter)
    squares = []
    for group in by_mesh.values():
        norm = torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None], foreach=foreach)
        squares.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).float() ** 2)
    total = torch.stack(squares).sum()
    if pp_mesh is not None:
        dist.all_reduce(total, group=pp_mesh.get_group())
    norm = total.sqrt()
    for group in by_mesh.values():
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm, foreach=foreach)
    return norm

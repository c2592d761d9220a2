"""Differentiable exchanges along one mesh axis, of fixed shape, without a host read.

They gather and send along dim 0 only: torch's autograd of a gather along another dim loses the gradient where dim 0
has size 1.
"""

import torch
import torch.distributed._functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh

# torch 2.13 calls them all_gather_single, and warns of the names that 2.11 has.
_all_gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
_all_gather_autograd = (
    getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd
)


def gather_along_dim_1(x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """Concatenate the ranks' tensors, in rank order: [B, S, ...] -> [B, ranks * S, ...]; backward sums and scatters."""
    n, (B, S) = mesh.size(), x.shape[:2]
    gathered = _wait(_all_gather_autograd(x.contiguous(), 0, mesh.get_group()))
    return gathered.view(n, B, S, *x.shape[2:]).transpose(0, 1).reshape(B, n * S, *x.shape[2:])


def gather_rows(x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """Concatenate the ranks' tensors along dim 0, without gradient: [B, ...] -> [ranks * B, ...]."""
    return _wait(_all_gather(x.contiguous(), 0, mesh.get_group()))


def receive_from_before(x: torch.Tensor, mesh: DeviceMesh, *, reach: int) -> torch.Tensor:
    """Send to the next `reach` ranks, and receive from as many before: [B, T, ...] -> [B, senders * T, ...].

    The tensors lie in rank order. The first ranks have fewer senders, the very first none; the last send to fewer.
    """
    n, me = mesh.size(), mesh.get_local_rank()
    senders = range(max(me - reach, 0), me)
    receivers = range(me + 1, min(me + reach, n - 1) + 1)
    B, T = x.shape[:2]
    sent = x.unsqueeze(0).expand(len(receivers), *x.shape).reshape(len(receivers) * B, *x.shape[1:])
    received = collectives.all_to_all_single_autograd(
        sent.contiguous(),
        [B if rank in senders else 0 for rank in range(n)],
        [B if rank in receivers else 0 for rank in range(n)],
        mesh.get_group(),
    )
    by_sender = _wait(received).view(len(senders), B, *x.shape[1:])
    return by_sender.transpose(0, 1).reshape(B, len(senders) * T, *x.shape[2:])


def swap_columns_for_rows(x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """From some columns of all ranks' rows to all columns of the own: [ranks * R, d / ranks] -> [R, d]."""
    n = mesh.size()
    rows = x.shape[0] // n
    swapped = _wait(collectives.all_to_all_single_autograd(x.contiguous(), [rows] * n, [rows] * n, mesh.get_group()))
    return swapped.view(n, rows, -1).transpose(0, 1).reshape(rows, -1)


def _wait(x: torch.Tensor) -> torch.Tensor:
    return x.wait() if isinstance(x, collectives.AsyncCollectiveTensor) else x

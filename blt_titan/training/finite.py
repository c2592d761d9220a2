"""Whether weights are finite, asked of the device once for all of them."""

from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor


def largest_of(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the largest magnitude of each tensor, of what this rank has of it; NaN where one is.

    Takes no memory: unlike `isfinite`, which makes a tensor of its own for each.
    """
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    # Of a tensor smaller than its mesh, some ranks have nothing.
    return torch.stack(
        [torch.linalg.vector_norm(t, torch.inf).float() if t.numel() else t.new_zeros(()).float() for t in local]
    )


def are_finite(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return on the device, as a bool, whether this rank's part of all tensors is finite.

    >>> bool(are_finite([torch.ones(2), torch.zeros(0)])), bool(are_finite([torch.tensor([1.0, torch.nan])]))
    (True, False)
    """
    return largest_of(tensors).isfinite().all()


def not_finite(named: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Return the names of the tensors that are not finite in this rank's part; waits for the device."""
    names, tensors = zip(*named, strict=True)
    found = largest_of(tensors).isfinite().tolist()
    return [name for name, finite in zip(names, found, strict=True) if not finite]

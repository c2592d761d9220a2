"""From gradients of a sum to gradients of a mean: the division that a step makes once, when all targets are counted."""

from collections.abc import Iterable

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def divide_gradients(parameters: Iterable[nn.Parameter], divisor: torch.Tensor) -> None:
    """Divide all gradients in place.

    Args:
        parameters: of all model parts of this rank; sharded ones in their own part.
        divisor: scalar on the device, so that nothing waits; the same on every rank.
    """
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for parameter in parameters:
        if (gradient := parameter.grad) is not None:
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            by_device.setdefault(local.device, []).append(local)
    for device, gradients in by_device.items():
        torch._foreach_div_(gradients, divisor.to(device))  # pyright: ignore[reportPrivateImportUsage]

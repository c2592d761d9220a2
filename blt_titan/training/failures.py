"""A loss or a gradient norm that is not finite: noted at once, said when the host waits for the device anyway."""

import torch
import torch.distributed as dist


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient norm became NaN or infinite."""


class LossWatch:
    """The first step whose loss or gradient norm was not finite; kept on the device, so that nothing waits."""

    def __init__(self, device: torch.device):
        self._first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)

    def note(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Look at a step's loss and gradient norm, scalars on the device."""
        bad = ~(loss.isfinite() & grad_norm.isfinite())
        first = bad & (self._first_bad_step < 0)
        self._first_bad_step = torch.where(first, step, self._first_bad_step)

    def check(self) -> None:
        """Wait for the device, and stop the run if a step was bad.

        Raises:
            NonFiniteLossError: one was; names the first.
        """
        first_bad_step = int(self._first_bad_step)
        if first_bad_step >= 0:
            raise NonFiniteLossError(
                f"rank {dist.get_rank()}: the loss or the gradient norm of step {first_bad_step} is not finite. "
                "Nothing was saved since. Lower optimizer.lr, or look at the data of that step; if the last checkpoint "
                "is finite but useless already, begin from an earlier one with checkpoint.load_step"
            )

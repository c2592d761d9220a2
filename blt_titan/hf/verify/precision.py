"""A model in fp32 and in fp64: in the latter rounding hides nothing, so two models that differ are two functions."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

ResultT = TypeVar("ResultT")


class CastsTo(TorchFunctionMode):
    """Makes every cast to fp32 or fp64 by name, as in norms, softmax and rotary angles, one to `dtype`.

    It sees `.float()`, `.double()` and a dtype that is an argument itself, not one inside a list.

    Args:
        dtype: torch.float32 or torch.float64.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.cast = torch.Tensor.double if dtype == torch.float64 else torch.Tensor.float

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.float, torch.Tensor.double):
            func = self.cast
        changed = {key: self._replaced(value) for key, value in (kwargs or {}).items()}
        return func(*map(self._replaced, args), **changed)

    def _replaced(self, argument: Any) -> Any:
        return self.dtype if argument is torch.float32 or argument is torch.float64 else argument


def compute_in_both(model: nn.Module, compute: Callable[[], ResultT]) -> tuple[ResultT, ResultT]:
    """Compute with a model in fp32, then in fp64, in which it stays."""
    with torch.no_grad():
        fp32 = compute()
        model.double()
        with CastsTo(torch.float64):
            for module in model.modules():
                # transformers keeps the frequencies of its rotary angles, rounded to fp32 when they were made.
                if hasattr(module, "inv_freq"):
                    module.inv_freq = type(module)(module.config).inv_freq
            return fp32, compute()


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest absolute difference of two tensors' numbers."""
    return float((a.double() - b.double()).abs().max())

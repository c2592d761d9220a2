"""What the launches of all kernels decide alike."""

import torch
import triton.language as tl

from blt_titan.model.kernels.checks import summing_dtype

_ELEMENTS_PER_THREAD = 32
"""How much of the largest tile: a few such tiles live at a time, and a thread has 255 registers."""


def sum_type(x: torch.Tensor) -> tl.dtype:
    """Return Triton's name of the dtype that scores and sums are made in."""
    return {torch.float32: tl.float32, torch.float64: tl.float64}[summing_dtype(x)]


def padded(size: int) -> int:
    """Return the next power of two, as tiles are measured.

    >>> padded(1), padded(3), padded(64)
    (1, 4, 64)
    """
    return 1 << (size - 1).bit_length()


def warps_of(elements: int) -> int:
    """Return the warps, a power of two up to 8, that hold a tile of so many elements, a power of two.

    >>> warps_of(8 * 2 * 64), warps_of(8 * 4 * 64), warps_of(16)
    (1, 2, 1)
    """
    return min(8, max(1, elements // (32 * _ELEMENTS_PER_THREAD)))

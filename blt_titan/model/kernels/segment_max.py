"""The maximum over the bytes of each patch, feature by feature: what a patch starts from.

Bytes that share a maximum share its gradient evenly.

Letters: B rows, S byte slots, P patch slots, X features.
"""

import torch

from blt_titan.model.kernels.checks import check_first
from blt_titan.model.kernels.offsets import patch_of_bytes


def segment_max(x_BSX: torch.Tensor, first_BP1: torch.Tensor) -> torch.Tensor:
    """Take the maximum over the bytes of each patch.

    Args:
        x_BSX: features of bytes, in any floating dtype.
        first_BP1: bytes of patch p are slots first[b, p] to first[b, p + 1] - 1, int32 [B, P + 1]; see
            `first_of_patches`.

    Returns:
        [B, P, X] in the same dtype; exactly 0 for empty patches.

    Raises:
        ValueError: shapes or dtypes do not fit each other.
    """
    if x_BSX.ndim != 3:
        raise ValueError(f"segment_max: x_BSX must be [B, S, X], got {tuple(x_BSX.shape)}")
    check_first("segment_max", "first_BP1", first_BP1, len(x_BSX))
    return _segment_max(x_BSX, first_BP1)


@torch.library.custom_op("blt::segment_max", mutates_args=(), device_types="cpu")
def _segment_max(x: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Return what `segment_max` does."""
    (B, S, X), P = x.shape, first.shape[1] - 1
    row_BS = _rows(first, S)
    # Along the first dim, and with one index for all features, torch takes a way that is tens of times as fast.
    index = row_BS.view(-1, 1).expand(B * S, X)
    peaks = x.new_zeros(B * P + 1, X).scatter_reduce(0, index, x.reshape(-1, X), "amax", include_self=False)
    return peaks[:-1].clone().view(B, P, X)


@torch.library.custom_op("blt::segment_max_backward", mutates_args=(), device_types="cpu")
def _segment_max_backward(grad: torch.Tensor, x: torch.Tensor, first: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the features."""
    (B, S, X), P = x.shape, out.shape[1]
    row = _rows(first, S).flatten()
    # Nothing equals what bytes without a patch are compared with.
    peaks = torch.cat([out.flatten(0, 1), out.new_full((1, X), torch.nan)])
    share = (x.reshape(-1, X) == peaks.index_select(0, row)).to(torch.promote_types(x.dtype, torch.float32))
    ties = share.new_zeros(B * P + 1, X).index_add_(0, row, share)
    # A patch without bytes has no ties, and nobody reads its share.
    per_tie = torch.cat([grad.flatten(0, 1), grad.new_zeros(1, X)]) / ties.clamp_(min=1)
    return share.mul_(per_tie.index_select(0, row)).view(B, S, X).to(x.dtype)


def _rows(first: torch.Tensor, S: int) -> torch.Tensor:
    """Number the patches of all rows one after another; bytes that belong to none have the number after the last."""
    B, P = len(first), first.shape[1] - 1
    patch_BS, is_held_BS = patch_of_bytes(first, S)
    return torch.where(is_held_BS, patch_BS + torch.arange(B)[:, None] * P, B * P)


@_segment_max.register_kernel("cuda")
def _(x, first):
    from blt_titan.model.kernels import segment_max_triton

    return segment_max_triton.forward(x, first)


@_segment_max_backward.register_kernel("cuda")
def _(grad, x, first, out):
    from blt_titan.model.kernels import segment_max_triton

    return segment_max_triton.backward(grad, x, first, out)


@_segment_max.register_fake
def _(x, first):
    return x.new_empty(x.shape[0], first.shape[1] - 1, x.shape[2])


@_segment_max_backward.register_fake
def _(grad, x, first, out):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output)


def _backward(ctx, grad):
    return _segment_max_backward(grad, *ctx.saved_tensors), None


_segment_max.register_autograd(_backward, setup_context=_save)

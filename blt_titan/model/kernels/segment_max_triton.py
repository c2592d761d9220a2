"""Triton kernels of the maximum over the bytes of each patch; the twin is in `segment_max.py`.

A program takes a patch and a block of features and walks over the bytes of the patch, T at a time.

Letters: B rows, S byte slots, P patch slots, X features, T bytes of a step.
"""

import torch
import triton
import triton.language as tl

from blt_titan.model.kernels.tiles import padded, sum_type, warps_of

_T, _MOST_FEATURES = 8, 256


@triton.jit
def _forward(
    x, first, out, S, P, X: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, SUM: tl.constexpr
):
    """Write the maxima [B, P, X] of one patch, for a block of features."""
    p, b = tl.program_id(0) // BLOCKS, tl.program_id(1).to(tl.int64)
    f, t = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK), tl.arange(0, T)
    begin, end = tl.load(first + b * (P + 1) + p), tl.load(first + b * (P + 1) + p + 1)
    peak_TX = tl.full([T, BLOCK], -float("inf"), SUM)
    for step in range(begin, end, T):
        s = step + t
        mask = (s < end)[:, None] & (f < X)[None, :]
        x_TX = tl.load(x + (b * S + s)[:, None] * X + f[None, :], mask=mask, other=-float("inf")).to(SUM)
        peak_TX = tl.maximum(peak_TX, x_TX, propagate_nan=tl.PropagateNan.ALL)
    # A reduction would drop what is not a number.
    is_nan_X = tl.max((peak_TX != peak_TX).to(tl.int32), axis=0) > 0
    peak_X = tl.where(is_nan_X, float("nan"), tl.max(peak_TX, axis=0))
    out_X = tl.where(begin < end, peak_X, 0.0).to(out.dtype.element_ty)
    tl.store(out + (b * P + p) * X + f, out_X, mask=f < X)


@triton.jit
def _backward(
    grad,
    x,
    first,
    out,
    x_grad,
    S,
    P,
    X: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SUM: tl.constexpr,
):
    """Write the gradient of the bytes of one patch, for a block of features; ties share it evenly."""
    p, b = tl.program_id(0) // BLOCKS, tl.program_id(1).to(tl.int64)
    f, t = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK), tl.arange(0, T)
    begin, end = tl.load(first + b * (P + 1) + p), tl.load(first + b * (P + 1) + p + 1)
    at_patch_X = (b * P + p) * X + f
    peak_X = tl.load(out + at_patch_X, mask=f < X, other=0.0).to(SUM)
    grad_X = tl.load(grad + at_patch_X, mask=f < X, other=0.0).to(SUM)
    ties_X = tl.zeros([BLOCK], SUM)
    for step in range(begin, end, T):
        s = step + t
        mask = (s < end)[:, None] & (f < X)[None, :]
        x_TX = tl.load(x + (b * S + s)[:, None] * X + f[None, :], mask=mask, other=0.0).to(SUM)
        ties_X += tl.sum(tl.where(mask & (x_TX == peak_X[None, :]), 1.0, 0.0).to(SUM), axis=0)
    share_X = grad_X / tl.maximum(ties_X, 1.0)
    for step in range(begin, end, T):
        s = step + t
        mask = (s < end)[:, None] & (f < X)[None, :]
        at_TX = (b * S + s)[:, None] * X + f[None, :]
        x_TX = tl.load(x + at_TX, mask=mask, other=0.0).to(SUM)
        x_grad_TX = tl.where(x_TX == peak_X[None, :], share_X[None, :], 0.0)
        tl.store(x_grad + at_TX, x_grad_TX.to(x_grad.dtype.element_ty), mask=mask)


def forward(x: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Launch `_forward`: what `blt::segment_max` returns."""
    x, first = x.contiguous(), first.contiguous()
    out = x.new_empty(x.shape[0], first.shape[1] - 1, x.shape[2])
    sizes, grid = _sizes(x, first)
    _forward[grid](x, first, out, **sizes)
    return out


def backward(grad: torch.Tensor, x: torch.Tensor, first: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Launch `_backward`: what `blt::segment_max_backward` returns."""
    grad, x, first = grad.contiguous(), x.contiguous(), first.contiguous()
    # No program has the bytes that belong to no patch.
    x_grad = torch.zeros_like(x)
    sizes, grid = _sizes(x, first)
    _backward[grid](grad, x, first, out, x_grad, **sizes)
    return x_grad


def _sizes(x: torch.Tensor, first: torch.Tensor) -> tuple[dict, tuple[int, int]]:
    """Return the sizes that both kernels take, and their grid."""
    (B, S, X), P = x.shape, first.shape[1] - 1
    block = min(_MOST_FEATURES, padded(X))
    blocks = -(-X // block)
    sizes = dict(S=S, P=P, X=X, T=_T, BLOCK=block, BLOCKS=blocks, SUM=sum_type(x))
    return sizes | dict(num_warps=warps_of(_T * block)), (P * blocks, B)

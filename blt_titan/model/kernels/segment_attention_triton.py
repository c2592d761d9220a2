"""Triton kernels of the encoder's cross-attention; what they compute is said by the twin in `segment_attention.py`.

A program takes a patch and a head: the k queries stay in registers while it walks over the bytes of the patch, T at a
time. A patch of 4.5 bytes is one step, one of 512 bytes is 64. Every byte belongs to one program, so that gradients of
keys and values are written once, and those of queries are sums of one program in a fixed order.

Letters: B rows, S byte slots, P patch slots, N slots of a patch (k), H heads, K head size, T bytes of a step.
"""

import torch
import triton
import triton.language as tl

from blt_titan.model.kernels.checks import summing_dtype
from blt_titan.model.kernels.tiles import padded, sum_type, warps_of

_T = 8


@triton.jit
def _forward(
    q,
    k,
    v,
    first,
    out,
    lse,
    scale,
    S,
    P,
    H: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    T: tl.constexpr,
    N_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
    SUM: tl.constexpr,
):
    """Write outputs [B, P, N, H, K] and log-sum-exps [B, P, N, H] of one patch and head."""
    h, p, b = tl.program_id(0) % H, tl.program_id(0) // H, tl.program_id(1).to(tl.int64)
    begin, end = tl.load(first + b * (P + 1) + p), tl.load(first + b * (P + 1) + p + 1)
    n, d, t = tl.arange(0, N_PAD), tl.arange(0, K_PAD), tl.arange(0, T)
    slot_N = ((b * P + p) * N + n) * H + h
    at_NK = slot_N[:, None] * K + d[None, :]
    is_slot_NK = (n < N)[:, None] & (d < K)[None, :]
    q_NK = tl.load(q + at_NK, mask=is_slot_NK, other=0.0).to(SUM) * scale
    peak_N = tl.full([N_PAD], -float("inf"), SUM)
    total_N = tl.zeros([N_PAD], SUM)
    sum_NK = tl.zeros([N_PAD, K_PAD], SUM)
    for step in range(begin, end, T):
        s = step + t
        at_TK = ((b * S + s) * H + h)[:, None] * K + d[None, :]
        is_byte_TK = (s < end)[:, None] & (d < K)[None, :]
        k_TK = tl.load(k + at_TK, mask=is_byte_TK, other=0.0).to(SUM)
        v_TK = tl.load(v + at_TK, mask=is_byte_TK, other=0.0).to(SUM)
        score_TN = tl.sum(k_TK[:, None, :] * q_NK[None, :, :], axis=2)
        score_TN = tl.where((s < end)[:, None], score_TN, -float("inf"))
        # The first byte of a step is real, so that no peak is -inf after it.
        higher_N = tl.maximum(peak_N, tl.max(score_TN, axis=0))
        weight_TN = tl.exp(score_TN - higher_N[None, :])
        fade_N = tl.exp(peak_N - higher_N)
        total_N = total_N * fade_N + tl.sum(weight_TN, axis=0)
        sum_NK = sum_NK * fade_N[:, None] + tl.sum(weight_TN[:, :, None] * v_TK[:, None, :], axis=0)
        peak_N = higher_N
    has_bytes = begin < end
    safe_N = tl.where(has_bytes, total_N, 1.0)
    tl.store(out + at_NK, (sum_NK / safe_N[:, None]).to(out.dtype.element_ty), mask=is_slot_NK)
    tl.store(lse + slot_N, tl.where(has_bytes, peak_N + tl.log(safe_N), 0.0), mask=n < N)


@triton.jit
def _backward(
    grad,
    q,
    k,
    v,
    first,
    lse,
    q_grad,
    k_grad,
    v_grad,
    scale,
    S,
    P,
    H: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    T: tl.constexpr,
    N_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
    SUM: tl.constexpr,
):
    """Write the gradients of one patch's queries and of its bytes' keys and values, of one head."""
    h, p, b = tl.program_id(0) % H, tl.program_id(0) // H, tl.program_id(1).to(tl.int64)
    begin, end = tl.load(first + b * (P + 1) + p), tl.load(first + b * (P + 1) + p + 1)
    n, d, t = tl.arange(0, N_PAD), tl.arange(0, K_PAD), tl.arange(0, T)
    slot_N = ((b * P + p) * N + n) * H + h
    at_NK = slot_N[:, None] * K + d[None, :]
    is_slot_NK = (n < N)[:, None] & (d < K)[None, :]
    q_NK = tl.load(q + at_NK, mask=is_slot_NK, other=0.0).to(SUM) * scale
    grad_NK = tl.load(grad + at_NK, mask=is_slot_NK, other=0.0).to(SUM)
    lse_N = tl.load(lse + slot_N, mask=n < N, other=0.0)
    # What a score's gradient is taken against: the mean of the weights' gradients. Most patches are one step, whose
    # keys and values the second walk finds in the cache.
    mean_N = tl.zeros([N_PAD], SUM)
    for step in range(begin, end, T):
        s = step + t
        at_TK = ((b * S + s) * H + h)[:, None] * K + d[None, :]
        is_byte_TK = (s < end)[:, None] & (d < K)[None, :]
        k_TK = tl.load(k + at_TK, mask=is_byte_TK, other=0.0).to(SUM)
        v_TK = tl.load(v + at_TK, mask=is_byte_TK, other=0.0).to(SUM)
        weight_TN = tl.exp(tl.sum(k_TK[:, None, :] * q_NK[None, :, :], axis=2) - lse_N[None, :])
        # Beyond the patch values are 0, and with them these gradients.
        weight_grad_TN = tl.sum(v_TK[:, None, :] * grad_NK[None, :, :], axis=2)
        mean_N += tl.sum(tl.where((s < end)[:, None], weight_TN * weight_grad_TN, 0.0), axis=0)
    q_grad_NK = tl.zeros([N_PAD, K_PAD], SUM)
    for step in range(begin, end, T):
        s = step + t
        at_TK = ((b * S + s) * H + h)[:, None] * K + d[None, :]
        is_byte_TK = (s < end)[:, None] & (d < K)[None, :]
        k_TK = tl.load(k + at_TK, mask=is_byte_TK, other=0.0).to(SUM)
        v_TK = tl.load(v + at_TK, mask=is_byte_TK, other=0.0).to(SUM)
        weight_TN = tl.exp(tl.sum(k_TK[:, None, :] * q_NK[None, :, :], axis=2) - lse_N[None, :])
        weight_TN = tl.where((s < end)[:, None] & (n < N)[None, :], weight_TN, 0.0)
        weight_grad_TN = tl.sum(v_TK[:, None, :] * grad_NK[None, :, :], axis=2)
        score_grad_TN = weight_TN * (weight_grad_TN - mean_N[None, :])
        q_grad_NK += tl.sum(score_grad_TN[:, :, None] * k_TK[:, None, :], axis=0) * scale
        # The queries carry the scale already.
        k_grad_TK = tl.sum(score_grad_TN[:, :, None] * q_NK[None, :, :], axis=1)
        v_grad_TK = tl.sum(weight_TN[:, :, None] * grad_NK[None, :, :], axis=1)
        tl.store(k_grad + at_TK, k_grad_TK.to(k_grad.dtype.element_ty), mask=is_byte_TK)
        tl.store(v_grad + at_TK, v_grad_TK.to(v_grad.dtype.element_ty), mask=is_byte_TK)
    tl.store(q_grad + at_NK, q_grad_NK.to(q_grad.dtype.element_ty), mask=is_slot_NK)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `_forward`: what `blt::segment_attention` returns."""
    q, k, v, first = (x.contiguous() for x in (q, k, v, first))
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:4], dtype=summing_dtype(q))
    sizes, grid = _sizes(q, k)
    _forward[grid](q, k, v, first, out, lse, q.shape[-1] ** -0.5, **sizes)
    return out, lse


def backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch `_backward`: what `blt::segment_attention_backward` returns."""
    grad, q, k, v, first = (x.contiguous() for x in (grad, q, k, v, first))
    # No program has the bytes that belong to no patch.
    q_grad, k_grad, v_grad = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    sizes, grid = _sizes(q, k)
    _backward[grid](grad, q, k, v, first, lse, q_grad, k_grad, v_grad, q.shape[-1] ** -0.5, **sizes)
    return q_grad, k_grad, v_grad


def _sizes(q: torch.Tensor, k: torch.Tensor) -> tuple[dict, tuple[int, int]]:
    """Return the sizes that both kernels take, and their grid."""
    B, P, N, H, K = q.shape
    n_pad, k_pad = padded(N), padded(K)
    sizes = dict(S=k.shape[1], P=P, H=H, N=N, K=K, T=_T, N_PAD=n_pad, K_PAD=k_pad, SUM=sum_type(q))
    return sizes | dict(num_warps=warps_of(_T * n_pad * k_pad)), (P * H, B)

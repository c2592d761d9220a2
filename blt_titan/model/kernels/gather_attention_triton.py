"""Triton kernels of the decoder's cross-attention; what they compute is said by the twin in `gather_attention.py`.

Forward, a program takes T bytes and a head and reads the slots of each byte's patch: neighbours read the same ones, out
of the cache. Backward, a program takes a patch and a head and walks over the bytes that read it: its keys and values
stay in registers, and their gradients are sums of one program in a fixed order.

Letters: B rows, S byte slots, P patch slots, N slots of a patch (k), H heads, K head size, T bytes of a step.
"""

import torch
import triton
import triton.language as tl

from blt_titan.model.kernels.checks import summing_dtype
from blt_titan.model.kernels.tiles import padded, sum_type, warps_of

_T_FORWARD, _T_BACKWARD = 16, 8


@triton.jit
def _forward(
    q,
    k,
    v,
    source,
    out,
    weight,
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
    """Write outputs [B, S, H, K] and weights [B, S, H, N] of T bytes and one head."""
    h, b = tl.program_id(0) % H, tl.program_id(1).to(tl.int64)
    s = tl.program_id(0) // H * T + tl.arange(0, T)
    n, d = tl.arange(0, N_PAD), tl.arange(0, K_PAD)
    p_T = tl.load(source + b * S + s, mask=s < S, other=-1)
    reads_T = p_T >= 0
    byte_T = (b * S + s) * H + h
    at_TK = byte_T[:, None] * K + d[None, :]
    is_byte_TK = (s < S)[:, None] & (d < K)[None, :]
    q_TK = tl.load(q + at_TK, mask=is_byte_TK & reads_T[:, None], other=0.0).to(SUM) * scale
    slot_TN = ((b * P + p_T)[:, None] * N + n[None, :]) * H + h
    at_TNK = slot_TN[:, :, None] * K + d[None, None, :]
    is_slot_TN = reads_T[:, None] & (n < N)[None, :]
    is_slot_TNK = is_slot_TN[:, :, None] & (d < K)[None, None, :]
    k_TNK = tl.load(k + at_TNK, mask=is_slot_TNK, other=0.0).to(SUM)
    score_TN = tl.where((n < N)[None, :], tl.sum(q_TK[:, None, :] * k_TNK, axis=2), -float("inf"))
    weight_TN = tl.exp(score_TN - tl.max(score_TN, axis=1)[:, None])
    weight_TN = tl.where(is_slot_TN, weight_TN / tl.sum(weight_TN, axis=1)[:, None], 0.0)
    v_TNK = tl.load(v + at_TNK, mask=is_slot_TNK, other=0.0).to(SUM)
    out_TK = tl.sum(weight_TN[:, :, None] * v_TNK, axis=1)
    tl.store(out + at_TK, out_TK.to(out.dtype.element_ty), mask=is_byte_TK)
    tl.store(weight + byte_T[:, None] * N + n[None, :], weight_TN, mask=(s < S)[:, None] & (n < N)[None, :])


@triton.jit
def _backward(
    grad,
    q,
    k,
    v,
    first,
    weight,
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
    """Write the gradients of one patch's keys and values and of its readers' queries, of one head."""
    h, p, b = tl.program_id(0) % H, tl.program_id(0) // H, tl.program_id(1).to(tl.int64)
    begin, end = tl.load(first + b * (P + 1) + p), tl.load(first + b * (P + 1) + p + 1)
    n, d, t = tl.arange(0, N_PAD), tl.arange(0, K_PAD), tl.arange(0, T)
    at_NK = (((b * P + p) * N + n) * H + h)[:, None] * K + d[None, :]
    is_slot_NK = (n < N)[:, None] & (d < K)[None, :]
    k_NK = tl.load(k + at_NK, mask=is_slot_NK, other=0.0).to(SUM) * scale
    v_NK = tl.load(v + at_NK, mask=is_slot_NK, other=0.0).to(SUM)
    k_grad_NK = tl.zeros([N_PAD, K_PAD], SUM)
    v_grad_NK = tl.zeros([N_PAD, K_PAD], SUM)
    for step in range(begin, end, T):
        s = step + t
        byte_T = (b * S + s) * H + h
        at_TK = byte_T[:, None] * K + d[None, :]
        is_byte_TK = (s < end)[:, None] & (d < K)[None, :]
        q_TK = tl.load(q + at_TK, mask=is_byte_TK, other=0.0).to(SUM)
        grad_TK = tl.load(grad + at_TK, mask=is_byte_TK, other=0.0).to(SUM)
        is_pair_TN = (s < end)[:, None] & (n < N)[None, :]
        weight_TN = tl.load(weight + byte_T[:, None] * N + n[None, :], mask=is_pair_TN, other=0.0)
        weight_grad_TN = tl.sum(grad_TK[:, None, :] * v_NK[None, :, :], axis=2)
        mean_T = tl.sum(weight_TN * weight_grad_TN, axis=1)
        score_grad_TN = weight_TN * (weight_grad_TN - mean_T[:, None])
        # The keys carry the scale already.
        q_grad_TK = tl.sum(score_grad_TN[:, :, None] * k_NK[None, :, :], axis=1)
        tl.store(q_grad + at_TK, q_grad_TK.to(q_grad.dtype.element_ty), mask=is_byte_TK)
        k_grad_NK += tl.sum(score_grad_TN[:, :, None] * q_TK[:, None, :], axis=0) * scale
        v_grad_NK += tl.sum(weight_TN[:, :, None] * grad_TK[:, None, :], axis=0)
    tl.store(k_grad + at_NK, k_grad_NK.to(k_grad.dtype.element_ty), mask=is_slot_NK)
    tl.store(v_grad + at_NK, v_grad_NK.to(v_grad.dtype.element_ty), mask=is_slot_NK)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, source: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `_forward`: what `blt::gather_attention` returns."""
    q, k, v, source = (x.contiguous() for x in (q, k, v, source))
    (B, S, H, _), N = q.shape, k.shape[2]
    out, weight = torch.empty_like(q), q.new_empty((B, S, H, N), dtype=summing_dtype(q))
    grid = (-(-S // _T_FORWARD) * H, B)
    _forward[grid](q, k, v, source, out, weight, q.shape[-1] ** -0.5, **_sizes(q, k, _T_FORWARD))
    return out, weight


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: torch.Tensor,
    weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch `_backward`: what `blt::gather_attention_backward` returns."""
    grad, q, k, v, first = (x.contiguous() for x in (grad, q, k, v, first))
    # No program has the bytes that read nothing.
    q_grad, k_grad, v_grad = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
    grid, scale = (k.shape[1] * k.shape[3], k.shape[0]), q.shape[-1] ** -0.5
    sizes = _sizes(q, k, _T_BACKWARD)
    _backward[grid](grad, q, k, v, first, weight, q_grad, k_grad, v_grad, scale, **sizes)
    return q_grad, k_grad, v_grad


def _sizes(q: torch.Tensor, k: torch.Tensor, T: int) -> dict:
    """Return the sizes that both kernels take."""
    P, N, H, K = k.shape[1:]
    n_pad, k_pad = padded(N), padded(K)
    sizes = dict(S=q.shape[1], P=P, H=H, N=N, K=K, T=T, N_PAD=n_pad, K_PAD=k_pad, SUM=sum_type(q))
    return sizes | dict(num_warps=warps_of(T * n_pad * k_pad))

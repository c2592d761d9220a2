"""The encoder's cross-attention: the k slots of a patch attend over the bytes of that patch, a run of byte slots.

Kept for backward are the inputs and a log-sum-exp per query; weights are computed again from it. The gradient of a
score is taken against the weighted mean of its patch in fp32, not against the rounded output: a patch of one byte gives
its queries exactly 0.

Letters: B rows, S byte slots, P patch slots, N slots of a patch (k), H heads, K head size.
"""

import torch

from blt_titan.model.kernels.checks import check_shapes, summing_dtype
from blt_titan.model.kernels.offsets import patch_of_bytes
from blt_titan.model.kernels.pairs import Pairs


def segment_attention(
    q_BPNHK: torch.Tensor, k_BSHK: torch.Tensor, v_BSHK: torch.Tensor, first_BP1: torch.Tensor
) -> torch.Tensor:
    """Attend over the bytes of each patch, scores scaled by K^-0.5.

    Args:
        q_BPNHK: queries of slots, in any floating dtype; sums are made in fp32 at least.
        k_BSHK: keys of bytes, in the same dtype.
        v_BSHK: values of bytes, in the same dtype.
        first_BP1: bytes of patch p are slots first[b, p] to first[b, p + 1] - 1, int32 [B, P + 1]; see
            `first_of_patches`.

    Returns:
        [B, P, N, H, K] in the dtype of the queries; exactly 0 for empty patches.

    Raises:
        ValueError: shapes or dtypes do not fit each other.
    """
    check_shapes("segment_attention", q_BPNHK, k_BSHK, v_BSHK, first_BP1=first_BP1)
    return _segment_attention(q_BPNHK, k_BSHK, v_BSHK, first_BP1)[0]


@torch.library.custom_op("blt::segment_attention", mutates_args=(), device_types="cpu")
def _segment_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `segment_attention` does, and log-sum-exp [B, P, N, H] in the dtype of sums, 0 for empty patches."""
    scale, dtype = q.shape[-1] ** -0.5, summing_dtype(q)
    pairs = _pairs(q, k, first)
    score = pairs.dots(k.to(dtype), q.to(dtype)).mul_(scale).masked_fill_(~pairs.is_real_BS11, -torch.inf)
    slot = pairs.slot_row_BSHN.flatten().long()
    nothing = score.new_zeros(q.shape[:4].numel())
    peak = nothing.scatter_reduce(0, slot, score.flatten(), "amax", include_self=False)
    # Of patches without bytes and of bytes without a patch; -inf - -inf would not be 0.
    peak = peak.masked_fill_(peak == -torch.inf, 0)
    weight = (score - peak[slot].view_as(score)).exp_()
    total = nothing.index_add(0, slot, weight.flatten())
    lse = torch.where(total > 0, peak + total.log(), 0)
    weight /= torch.where(total > 0, total, 1)[slot].view_as(weight)
    return pairs.sum_to_slots(weight, v.to(dtype), first).to(q.dtype), lse.view(q.shape[:4])


@torch.library.custom_op("blt::segment_attention_backward", mutates_args=(), device_types="cpu")
def _segment_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of queries, keys and values."""
    scale, dtype, given = q.shape[-1] ** -0.5, summing_dtype(q), q.dtype
    pairs = _pairs(q, k, first)
    grad, q, k, v = (x.to(dtype) for x in (grad, q, k, v))
    slot = pairs.slot_row_BSHN.flatten().long()
    score = pairs.dots(k, q).mul_(scale).masked_fill_(~pairs.is_real_BS11, -torch.inf)
    weight = (score - lse.flatten()[slot].view_as(score)).exp_()
    score_grad = pairs.dots(v, grad)
    mean = score_grad.new_zeros(lse.numel()).index_add_(0, slot, (weight * score_grad).flatten())
    score_grad -= mean[slot].view_as(score)
    score_grad *= weight * scale
    q_grad = pairs.sum_to_slots(score_grad, k, first)
    k_grad, v_grad = (pairs.sum_to_bytes(w, x) for w, x in ((score_grad, q), (weight, grad)))
    return q_grad.to(given), k_grad.to(given), v_grad.to(given)


def _pairs(q: torch.Tensor, k: torch.Tensor, first: torch.Tensor) -> Pairs:
    return Pairs.of_bytes(*patch_of_bytes(first, k.shape[1]), *q.shape[1:4])


@_segment_attention.register_kernel("cuda")
def _(q, k, v, first):
    from blt_titan.model.kernels import segment_attention_triton

    return segment_attention_triton.forward(q, k, v, first)


@_segment_attention_backward.register_kernel("cuda")
def _(grad, q, k, v, first, lse):
    from blt_titan.model.kernels import segment_attention_triton

    return segment_attention_triton.backward(grad, q, k, v, first, lse)


@_segment_attention.register_fake
def _(q, k, v, first):
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:4], dtype=summing_dtype(q))


@_segment_attention_backward.register_fake
def _(grad, q, k, v, first, lse):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx, grad, _):
    return *_segment_attention_backward(grad, *ctx.saved_tensors), None


_segment_attention.register_autograd(_backward, setup_context=_save)

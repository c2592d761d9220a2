"""The decoder's cross-attention by index: a byte attends over the k slots of the one patch that it reads.

The k slots are read where they lie, forward and backward; what is kept for backward beside queries, keys and values is
k weights per byte and head. The bytes that read a patch lie side by side, so its gradient is a sum over a run of them.

Letters: B rows, S byte slots, P patch slots, N slots of a patch (k), H heads, K head size.
"""

import torch

from blt_titan.model.kernels.checks import check_shapes, summing_dtype
from blt_titan.model.kernels.pairs import Pairs


def gather_attention(
    q_BSHK: torch.Tensor,
    k_BPNHK: torch.Tensor,
    v_BPNHK: torch.Tensor,
    source_BS: torch.Tensor,
    first_reader_BP1: torch.Tensor,
) -> torch.Tensor:
    """Attend over the slots of each byte's source patch, scores scaled by K^-0.5.

    Args:
        q_BSHK: queries of bytes, in any floating dtype; sums are made in fp32 at least.
        k_BPNHK: keys of slots, in the same dtype.
        v_BPNHK: values of slots, in the same dtype.
        source_BS: the patch that the byte reads, int32 [B, S], negative for none. It does not decrease along a row,
            except that bytes which read nothing may lie before the first and after the last that does.
        first_reader_BP1: `first_of_patches(source_BS, P)`.

    Returns:
        [B, S, H, K] in the dtype of the queries; exactly 0 for bytes that read nothing.

    Raises:
        ValueError: shapes or dtypes do not fit each other.
    """
    check_shapes("gather_attention", q_BSHK, k_BPNHK, v_BPNHK, source_BS=source_BS, first_reader_BP1=first_reader_BP1)
    return _gather_attention(q_BSHK, k_BPNHK, v_BPNHK, source_BS, first_reader_BP1)[0]


@torch.library.custom_op("blt::gather_attention", mutates_args=(), device_types="cpu")
def _gather_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, source: torch.Tensor, first_reader: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `gather_attention` does, and the weights [B, S, H, N] in the dtype of sums."""
    scale, dtype = q.shape[-1] ** -0.5, summing_dtype(q)
    pairs = _pairs(source, k)
    score = pairs.dots(q.to(dtype), k.to(dtype)).mul_(scale)
    # A softmax over two or four neighbours is slow, one over as many blocks is not.
    weight = score.movedim(-1, 0).contiguous().softmax(0).movedim(0, -1).mul(pairs.is_real_BS11).contiguous()
    return pairs.sum_to_bytes(weight, v.to(dtype)).to(q.dtype), weight


@torch.library.custom_op("blt::gather_attention_backward", mutates_args=(), device_types="cpu")
def _gather_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    source: torch.Tensor,
    first_reader: torch.Tensor,
    weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of queries, keys and values."""
    scale, dtype, given = q.shape[-1] ** -0.5, summing_dtype(q), q.dtype
    pairs = _pairs(source, k)
    grad, q, k, v = (x.to(dtype) for x in (grad, q, k, v))
    score_grad = pairs.dots(grad, v)
    score_grad -= (weight * score_grad).sum(-1, keepdim=True)
    score_grad *= weight * scale
    q_grad = pairs.sum_to_bytes(score_grad, k)
    k_grad, v_grad = (pairs.sum_to_slots(w, x, first_reader) for w, x in ((score_grad, q), (weight, grad)))
    return q_grad.to(given), k_grad.to(given), v_grad.to(given)


def _pairs(source: torch.Tensor, k: torch.Tensor) -> Pairs:
    return Pairs.of_bytes(source.clamp(min=0), source >= 0, *k.shape[1:4])


@_gather_attention.register_kernel("cuda")
def _(q, k, v, source, first_reader):
    from blt_titan.model.kernels import gather_attention_triton

    return gather_attention_triton.forward(q, k, v, source)


@_gather_attention_backward.register_kernel("cuda")
def _(grad, q, k, v, source, first_reader, weight):
    from blt_titan.model.kernels import gather_attention_triton

    return gather_attention_triton.backward(grad, q, k, v, first_reader, weight)


@_gather_attention.register_fake
def _(q, k, v, source, first_reader):
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        (*q.shape[:3], k.shape[2]), dtype=summing_dtype(q)
    )


@_gather_attention_backward.register_fake
def _(grad, q, k, v, source, first_reader, weight):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx, grad, _):
    return *_gather_attention_backward(grad, *ctx.saved_tensors), None, None


_gather_attention.register_autograd(_backward, setup_context=_save)

"""Windowed attention on a CPU: a triangle, then blocks of queries, each with the keys that its window reaches.

    W = 4, blocks of C = 2 queries, R = W + C keys for each        keys  0 1 2 3 4 5 6 7
    head: the first W queries, which see all before them                 x x x x
    block 0, queries 4 5                                                 x x x x x x
    block 1, queries 6 7                                                     x x x x x x

The blocks' keys overlap, so they are views of one tensor, made by strides: nothing is written R / C times. Each key is
masked again by causality, window and document. R / W is the work that is done over the work that is needed: 1.25 for a
window of 512 in blocks of 128.

Letters: B rows, S slots, T slots of keys, H heads, K head size, W window, Q queries of the head, C queries of a block,
N blocks, R keys of a block.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

MOST_QUERIES = 128
"""Queries of a block. Half as many do a tenth less work in smaller matrices, twice as many a fifth more; in CPU seconds
both lost."""

_OUTSIDE = -2
"""Document of slots outside the row: no query has it, so they are never seen."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class BlockBias(NamedTuple):
    """What is added to scores: 0 where a key is seen, else -inf, fp32."""

    blocks_BN1CR: torch.Tensor
    """For the blocks."""
    head_B1QQ: torch.Tensor | None
    """For the head, causality left out; None where keys precede the first slot, which then is in a block."""


def block_bias(doc_BS: torch.Tensor, *, window: int, before_doc_BW: torch.Tensor | None = None) -> BlockBias:
    """Build the mask of a window.

    Args:
        doc_BS: document of each slot, integer [B, S].
        window: W.
        before_doc_BW: documents of the slots before the first, at most W, whose keys precede the slots' own.
    """
    S = doc_BS.shape[1]
    C = min(window, S, MOST_QUERIES)
    head_B1QQ = None
    if before_doc_BW is None:
        Q = min(S, window // C * C)
        before_doc_BW, doc_BS = doc_BS[:, :Q], doc_BS[:, Q:]
        head_B1QQ = _bias(before_doc_BW[:, :, None] == before_doc_BW[:, None])[:, None]
    before, N = before_doc_BW.shape[1], -(-doc_BS.shape[1] // C)
    if not N:
        return BlockBias(torch.zeros(len(doc_BS), 0, 1, C, C + window, device=doc_BS.device), head_B1QQ)
    doc_BT = torch.cat([before_doc_BW, F.pad(doc_BS, (0, N * C - doc_BS.shape[1]), value=_OUTSIDE)], dim=1)
    doc_BT = F.pad(doc_BT, (window - before, 0), value=_OUTSIDE)
    query_doc_BNC1 = doc_BT[:, window:].unflatten(1, (N, C))[..., None]
    key_doc_BN1R = doc_BT.unfold(1, C + window, C)[:, :, None]
    back_CR = torch.arange(C, device=doc_BS.device)[:, None] + window - torch.arange(C + window, device=doc_BS.device)
    seen_BNCR = (back_CR >= 0) & (back_CR < window) & (query_doc_BNC1 == key_doc_BN1R)
    return BlockBias(_bias(seen_BNCR)[:, :, None], head_B1QQ)


def attend_in_blocks(q_BSHK: torch.Tensor, k_BTHK: torch.Tensor, v_BTHK: torch.Tensor, bias: BlockBias) -> torch.Tensor:
    """Attend under a `block_bias`: [B, S, H, K] in and out, scale K^-0.5; T - S keys precede the queries' own."""
    if _runs_on_cpu(q_BSHK):
        dtype = _bias_dtype(q_BSHK)
        head = None if bias.head_B1QQ is None else bias.head_B1QQ.to(dtype)
        return window_attention(q_BSHK, k_BTHK, v_BTHK, bias.blocks_BN1CR.to(dtype), head)[0]
    return _attend_anywhere(q_BSHK, k_BTHK, v_BTHK, bias)


@torch.library.custom_op("blt::window_attention", mutates_args=(), device_types="cpu")
def window_attention(
    q_BSHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHK: torch.Tensor,
    bias_BN1CR: torch.Tensor,
    head_B1QQ: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend on a CPU; also return the logarithms of the sums of exponentials, [B, N, C, H] and [B, H, Q].

    An operation of its own, because what autograd would keep of its parts is several times what it needs, and a
    compiler would write out the overlapping views.
    """
    (B, S, H, _), (N, C, R) = q_BSHK.shape, _blocks(bias_BN1CR)
    Q = 0 if head_B1QQ is None else head_B1QQ.shape[-1]
    out_BSHK = torch.empty_like(q_BSHK, memory_format=torch.contiguous_format)
    sums_BNCH = bias_BN1CR.new_empty(B, N, C, H)
    head_sums_BHQ = bias_BN1CR.new_empty(B, H, Q)
    if Q:
        head_BHQK = [x[:, :Q].transpose(1, 2) for x in (q_BSHK, k_BTHK, v_BTHK)]
        out_BHQK, head_sums = _flash(*head_BHQK, 0.0, True, attn_mask=head_B1QQ)
        out_BSHK[:, :Q] = out_BHQK.transpose(1, 2)
        head_sums_BHQ.copy_(head_sums)
    if N:
        q_BTHK = _padded_end(q_BSHK[:, Q:], N * C - (S - Q))
        k_BTHK, v_BTHK = _padded(k_BTHK, S - Q, N, C, R), _padded(v_BTHK, S - Q, N, C, R)
        for row in range(B):
            out_NHCK, sums_NHC = _flash(
                _overlapping(q_BTHK[row], N, C, C),
                _overlapping(k_BTHK[row], N, C, R),
                _overlapping(v_BTHK[row], N, C, R),
                attn_mask=bias_BN1CR[row],
            )
            out_BSHK[row, Q:] = out_NHCK.transpose(1, 2).flatten(0, 1)[: S - Q]
            sums_BNCH[row] = sums_NHC.transpose(1, 2)
    return out_BSHK, sums_BNCH, head_sums_BHQ


@window_attention.register_fake
def _(q_BSHK, k_BTHK, v_BTHK, bias_BN1CR, head_B1QQ):
    (B, _, H, _), (N, C, _) = q_BSHK.shape, _blocks(bias_BN1CR)
    Q = 0 if head_B1QQ is None else head_B1QQ.shape[-1]
    out_BSHK = torch.empty_like(q_BSHK, memory_format=torch.contiguous_format)
    return out_BSHK, bias_BN1CR.new_empty(B, N, C, H), bias_BN1CR.new_empty(B, H, Q)


@torch.library.custom_op("blt::window_attention_backward", mutates_args=(), device_types="cpu")
def window_attention_backward(
    grad_BSHK: torch.Tensor,
    q_BSHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHK: torch.Tensor,
    bias_BN1CR: torch.Tensor,
    head_B1QQ: torch.Tensor | None,
    out_BSHK: torch.Tensor,
    sums_BNCH: torch.Tensor,
    head_sums_BHQ: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of queries, keys and values, from what `window_attention` took and gave."""
    (B, S), (N, C, R), Q = q_BSHK.shape[:2], _blocks(bias_BN1CR), head_sums_BHQ.shape[-1]
    dq_BSHK, dk_BTHK, dv_BTHK = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_BSHK, k_BTHK, v_BTHK)
    )
    if N:
        grad_BTHK, q_BTHK, out_BTHK = (_padded_end(x[:, Q:], N * C - (S - Q)) for x in (grad_BSHK, q_BSHK, out_BSHK))
        keys_BTHK, values_BTHK = _padded(k_BTHK, S - Q, N, C, R), _padded(v_BTHK, S - Q, N, C, R)
        first = R - C - (k_BTHK.shape[1] - (S - Q))
        for row in range(B):
            dq_NHCK, dk_NHRK, dv_NHRK = _flash_backward(
                _overlapping(grad_BTHK[row], N, C, C),
                _overlapping(q_BTHK[row], N, C, C),
                _overlapping(keys_BTHK[row], N, C, R),
                _overlapping(values_BTHK[row], N, C, R),
                _overlapping(out_BTHK[row], N, C, C),
                sums_BNCH[row].transpose(1, 2),
                0.0,
                False,
                attn_mask=bias_BN1CR[row],
            )
            dq_BSHK[row, Q:] = dq_NHCK.transpose(1, 2).flatten(0, 1)[: S - Q]
            for gradient_THK, overlapping_NHRK in ((dk_BTHK[row], dk_NHRK), (dv_BTHK[row], dv_NHRK)):
                gradient_THK.copy_(_folded(overlapping_NHRK, C)[first : first + len(gradient_THK)])
    else:
        dk_BTHK.zero_()
        dv_BTHK.zero_()
    if Q:
        head_BHQK = [x[:, :Q].transpose(1, 2) for x in (grad_BSHK, q_BSHK, k_BTHK, v_BTHK, out_BSHK)]
        head = _flash_backward(*head_BHQK, head_sums_BHQ, 0.0, True, attn_mask=head_B1QQ)
        dq_BSHK[:, :Q], dk, dv = (x.transpose(1, 2) for x in head)
        dk_BTHK[:, :Q] += dk
        dv_BTHK[:, :Q] += dv
    return dq_BSHK, dk_BTHK, dv_BTHK


@window_attention_backward.register_fake
def _(grad_BSHK, q_BSHK, k_BTHK, v_BTHK, *_):
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_BSHK, k_BTHK, v_BTHK))
    return dq, dk, dv


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, grad_BSHK, *_):
    return *window_attention_backward(grad_BSHK, *ctx.saved_tensors), None, None


window_attention.register_autograd(_differentiate, setup_context=_keep)


def _attend_anywhere(q_BSHK, k_BTHK, v_BTHK, bias: BlockBias) -> torch.Tensor:
    """Attend in the same blocks by PyTorch's public function, on any device."""
    (B, S, H, K), (N, C, R) = q_BSHK.shape, _blocks(bias.blocks_BN1CR)
    outs, Q = [], 0
    if (head := bias.head_B1QQ) is not None:
        Q = head.shape[-1]
        causal_B1QQ = head.masked_fill(head.new_ones(Q, Q, dtype=torch.bool).triu(1), -torch.inf).to(q_BSHK.dtype)
        q, k, v = (x[:, :Q].transpose(1, 2) for x in (q_BSHK, k_BTHK, v_BTHK))
        outs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=causal_B1QQ).transpose(1, 2))
    if N:
        q_XHCK = _padded_end(q_BSHK[:, Q:], N * C - (S - Q)).unflatten(1, (N, C)).flatten(0, 1).transpose(1, 2)
        k_XHRK, v_XHRK = (
            _padded(x, S - Q, N, C, R).unfold(1, R, C).flatten(0, 1).transpose(2, 3) for x in (k_BTHK, v_BTHK)
        )
        bias_X1CR = bias.blocks_BN1CR.flatten(0, 1).to(q_BSHK.dtype)
        out_XHCK = F.scaled_dot_product_attention(q_XHCK, k_XHRK, v_XHRK, attn_mask=bias_X1CR)
        outs.append(out_XHCK.transpose(1, 2).reshape(B, N * C, H, K)[:, : S - Q])
    return torch.cat(outs, dim=1)


def _bias(seen: torch.Tensor) -> torch.Tensor:
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)


def _runs_on_cpu(x: torch.Tensor) -> bool:
    return x.device.type == "cpu"


def _bias_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _blocks(bias_BN1CR: torch.Tensor) -> tuple[int, int, int]:
    return bias_BN1CR.shape[1], bias_BN1CR.shape[3], bias_BN1CR.shape[4]


def _padded_end(x_BSHK: torch.Tensor, slots: int) -> torch.Tensor:
    return (F.pad(x_BSHK, (0, 0, 0, 0, 0, slots)) if slots else x_BSHK).contiguous()


def _padded(x_BTHK: torch.Tensor, S: int, N: int, C: int, R: int) -> torch.Tensor:
    """Put R - C keys before the S of the queries, and fill the last block: [B, T, H, K] -> [B, R - C + N C, H, K]."""
    in_front, behind = R - C - (x_BTHK.shape[1] - S), N * C - S
    return (F.pad(x_BTHK, (0, 0, 0, 0, in_front, behind)) if in_front or behind else x_BTHK).contiguous()


def _overlapping(x_THK: torch.Tensor, N: int, C: int, R: int) -> torch.Tensor:
    """View N runs of R slots, each C after the one before: contiguous [T, H, K] -> [N, H, R, K]."""
    H, K = x_THK.shape[1:]
    return x_THK.as_strided((N, H, R, K), (C * H * K, K, H * K, 1), x_THK.storage_offset())


def _folded(x_NHRK: torch.Tensor, C: int) -> torch.Tensor:
    """Add up what `_overlapping` views more than once: [N, H, R, K] -> [R - C + N C or more, H, K]."""
    N, H, _, K = x_NHRK.shape
    parts = x_NHRK.transpose(1, 2).split(C, dim=1)
    total_MCHK = x_NHRK.new_zeros(N + len(parts) - 1, C, H, K)
    for i, part_NCHK in enumerate(parts):
        total_MCHK[i : i + N, : part_NCHK.shape[1]] += part_NCHK
    return total_MCHK.flatten(0, 1)

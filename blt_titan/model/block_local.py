"""Windowed attention on a CPU: blocks of queries, each with the keys that its window reaches.

    W = 4, blocks of C = 2 queries, R = W + C keys for each        keys  . . . . 0 1 2 3 4 5
    block 0, queries 0 1                                                 x x x x x x
    block 1, queries 2 3                                                     x x x x x x
    block 2, queries 4 5                                                         x x x x x x

The blocks' keys overlap, so they are views of one tensor, made by strides: nothing is written R / C times. Each key is
masked again by causality, window and document. R / W is the work that is done over the work that is needed: 1.25 for a
window of 512 in blocks of 128.

Letters: B rows, S slots, T slots of keys, H heads, K head size, W window, C queries of a block, N blocks, R keys of a
block.
"""

import torch
import torch.nn.functional as F

MOST_QUERIES = 128
"""Queries of a block. Half as many do a tenth less work in smaller matrices, twice as many a fifth more; in CPU seconds
both lost."""

_OUTSIDE = -2
"""Document of slots outside the row: no query has it, so they are never seen."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def block_bias(doc_BS: torch.Tensor, *, window: int, before_doc_BW: torch.Tensor | None = None) -> torch.Tensor:
    """Return what is added to the scores of each block: 0 where a key is seen, else -inf, fp32 [B, N, 1, C, R].

    Args:
        doc_BS: document of each slot, integer [B, S].
        window: W.
        before_doc_BW: documents of the slots before the first, at most W, whose keys precede the slots' own.
    """
    S = doc_BS.shape[1]
    C = min(window, S, MOST_QUERIES)
    N = -(-S // C)
    before = 0 if before_doc_BW is None else before_doc_BW.shape[1]
    reach = window if N > 1 or before else 0
    doc_BT = F.pad(doc_BS, (0, N * C - S), value=_OUTSIDE)
    if before_doc_BW is not None:
        doc_BT = torch.cat([before_doc_BW, doc_BT], dim=1)
    doc_BT = F.pad(doc_BT, (reach - before, 0), value=_OUTSIDE)
    query_doc_BNC1 = doc_BT[:, reach:].unflatten(1, (N, C))[..., None]
    key_doc_BN1R = doc_BT.unfold(1, C + reach, C)[:, :, None]
    back_CR = torch.arange(C, device=doc_BS.device)[:, None] + reach - torch.arange(C + reach, device=doc_BS.device)
    seen_BNCR = (back_CR >= 0) & (back_CR < window) & (query_doc_BNC1 == key_doc_BN1R)
    return torch.zeros(seen_BNCR.shape, device=doc_BS.device).masked_fill_(~seen_BNCR, -torch.inf)[:, :, None]


def attend_in_blocks(
    q_BSHK: torch.Tensor, k_BTHK: torch.Tensor, v_BTHK: torch.Tensor, bias_BN1CR: torch.Tensor
) -> torch.Tensor:
    """Attend under a `block_bias`: [B, S, H, K] in and out, scale K^-0.5; T - S keys precede the queries' own."""
    if _runs_on_cpu(q_BSHK):
        return window_attention(q_BSHK, k_BTHK, v_BTHK, bias_BN1CR.to(_bias_dtype(q_BSHK)))[0]
    (B, S, H, K), (N, C, R) = q_BSHK.shape, _blocks(bias_BN1CR)
    q_XHCK = F.pad(q_BSHK, (0, 0, 0, 0, 0, N * C - S)).unflatten(1, (N, C)).flatten(0, 1).transpose(1, 2)
    k_XHRK, v_XHRK = (
        _padded(x_BTHK, S, N, C, R).unfold(1, R, C).flatten(0, 1).transpose(2, 3) for x_BTHK in (k_BTHK, v_BTHK)
    )
    bias_X1CR = bias_BN1CR.flatten(0, 1).to(q_BSHK.dtype)
    out_XHCK = F.scaled_dot_product_attention(q_XHCK, k_XHRK, v_XHRK, attn_mask=bias_X1CR)
    return out_XHCK.transpose(1, 2).reshape(B, N * C, H, K)[:, :S]


@torch.library.custom_op("blt::window_attention", mutates_args=(), device_types="cpu")
def window_attention(
    q_BSHK: torch.Tensor, k_BTHK: torch.Tensor, v_BTHK: torch.Tensor, bias_BN1CR: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend on a CPU; also return the logarithms of the sums of exponentials, fp32 (fp64 for fp64) [B, N, C, H].

    An operation of its own, because what autograd would keep of its parts is several times what it needs, and a
    compiler would write out the overlapping views.
    """
    (B, S), (N, C, R) = q_BSHK.shape[:2], _blocks(bias_BN1CR)
    q_BTHK = _padded_end(q_BSHK, N * C - S)
    k_BTHK, v_BTHK = _padded(k_BTHK, S, N, C, R), _padded(v_BTHK, S, N, C, R)
    outs, sums = [], []
    for row in range(B):
        out_NHCK, sums_NHC = _flash(
            _overlapping(q_BTHK[row], N, C, C),
            _overlapping(k_BTHK[row], N, C, R),
            _overlapping(v_BTHK[row], N, C, R),
            attn_mask=bias_BN1CR[row],
        )
        outs.append(out_NHCK.transpose(1, 2).flatten(0, 1)[:S])
        sums.append(sums_NHC.transpose(1, 2))
    return torch.stack(outs), torch.stack(sums)


@window_attention.register_fake
def _(q_BSHK, k_BTHK, v_BTHK, bias_BN1CR):
    (B, _, H, _), (N, C, _) = q_BSHK.shape, _blocks(bias_BN1CR)
    return torch.empty_like(q_BSHK, memory_format=torch.contiguous_format), q_BSHK.new_empty(
        (B, N, C, H), dtype=_bias_dtype(q_BSHK)
    )


@torch.library.custom_op("blt::window_attention_backward", mutates_args=(), device_types="cpu")
def window_attention_backward(
    grad_BSHK: torch.Tensor,
    q_BSHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHK: torch.Tensor,
    bias_BN1CR: torch.Tensor,
    out_BSHK: torch.Tensor,
    sums_BNCH: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of queries, keys and values, from what `window_attention` took and gave."""
    (B, S), (N, C, R) = q_BSHK.shape[:2], _blocks(bias_BN1CR)
    grad_BTHK, q_BTHK, out_BTHK = (_padded_end(x, N * C - S) for x in (grad_BSHK, q_BSHK, out_BSHK))
    keys_BTHK, values_BTHK = _padded(k_BTHK, S, N, C, R), _padded(v_BTHK, S, N, C, R)
    first = R - C - (k_BTHK.shape[1] - S)
    rows = []
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
        dq_SHK = dq_NHCK.transpose(1, 2).flatten(0, 1)[:S]
        dk_THK, dv_THK = (_folded(x, C)[first : first + k_BTHK.shape[1]] for x in (dk_NHRK, dv_NHRK))
        rows.append((dq_SHK, dk_THK, dv_THK))
    dq, dk, dv = (torch.stack(gradients) for gradients in zip(*rows, strict=True))
    return dq, dk, dv


@window_attention_backward.register_fake
def _(grad_BSHK, q_BSHK, k_BTHK, v_BTHK, bias_BN1CR, out_BSHK, sums_BNCH):
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_BSHK, k_BTHK, v_BTHK))
    return dq, dk, dv


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad_BSHK, _):
    return *window_attention_backward(grad_BSHK, *ctx.saved_tensors), None


window_attention.register_autograd(_differentiate, setup_context=_keep)


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

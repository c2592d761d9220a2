"""Self-attention inside one row: a causal window over bytes, or full causal over patches, within a document.

Enters: queries, keys, values [B, S, H, K] and a mask made once per forward; leaves: [B, S, H, K]. The choice that
is not obvious: nothing local ever has S x S entries. On CPU a window of W is computed in blocks of W queries
that see their own block and the one before:

    W = 3      keys  0 1 2 | 3 4 5 | 6 7 8
    queries 0 1 2    x x x
    queries 3 4 5    x x x   x x x              each x is masked again by causality, window, document
    queries 6 7 8            x x x   x x x

so 2 * S * W scores exist. On CUDA the same rule is a FlexAttention block mask whose block list is built by
arithmetic, without looking at S x S and without a host read. Both rely on the batch contract that real bytes lie
side by side (padding only at the end), so that the distance of two slots is the distance of two bytes.

Letters: B rows, S slots (bytes or patches), H heads, K head size, W window, C block, N blocks.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

AttentionBackend = Literal["auto", "sdpa", "flex"]

FLEX_BLOCK = 128
"""Rows and columns of one tile of a FlexAttention block mask."""


@dataclass(frozen=True)
class BlockLocalMask:
    """Visibility inside pairs of neighbouring blocks: bool [B, N, 1, C, 2C], True where a key is seen."""

    visible: torch.Tensor

    @property
    def block(self) -> int:
        """Return C, the number of queries in a block."""
        return self.visible.shape[-2]


@dataclass(frozen=True)
class DenseMask:
    """Visibility among all slots: bool [B, 1, S, S]; for the short sequence of patches only."""

    visible: torch.Tensor


AttentionMask = BlockLocalMask | DenseMask | BlockMask


def window_mask(doc_BS: torch.Tensor, *, window: int, backend: AttentionBackend = "auto") -> AttentionMask:
    """Build the mask of a local stack: j is seen from i iff i - window < j <= i and both lie in one document.

    Args:
        doc_BS: document of each byte slot, integer [B, S], PADDING (-1) where padded. Padding sees padding only.
        window: W, in bytes.
        backend: "auto" takes FlexAttention on CUDA and SDPA elsewhere.
    """
    match _resolve(backend, doc_BS.device):
        case "sdpa":
            return _block_local_mask(doc_BS, window)
        case "flex":
            S = doc_BS.shape[1]
            n_blocks = -(-S // FLEX_BLOCK)
            # A query block reaches back over the tiles that hold its W - 1 predecessors.
            reach = -(-(window - 1) // FLEX_BLOCK)
            last = torch.arange(n_blocks, dtype=torch.int32, device=doc_BS.device)
            first = (last - reach).clamp(min=0)

            def visible(b, h, q, kv):
                return (kv <= q) & (q - kv < window) & (doc_BS[b, q] == doc_BS[b, kv])

            return _banded_block_mask(first.expand(doc_BS.shape[0], -1), last, S, visible)
        case other:
            raise ValueError(f"unknown attention backend {other!r}")


def causal_mask(doc_BS: torch.Tensor, *, backend: AttentionBackend = "auto") -> AttentionMask:
    """Build the mask of the global stack: j is seen from i iff j <= i and both lie in one document.

    Args:
        doc_BS: document of each patch slot, integer [B, S], PADDING (-1) where padded.
        backend: "auto" takes FlexAttention on CUDA and SDPA elsewhere.
    """
    S = doc_BS.shape[1]
    match _resolve(backend, doc_BS.device):
        case "sdpa":
            slot_S = torch.arange(S, device=doc_BS.device)
            causal_SS = slot_S[:, None] >= slot_S
            return DenseMask((causal_SS & (doc_BS[:, :, None] == doc_BS[:, None, :]))[:, None])
        case "flex":
            n_blocks = -(-S // FLEX_BLOCK)
            last = torch.arange(n_blocks, dtype=torch.int32, device=doc_BS.device)
            first = _first_slot_of_document(doc_BS)[:, ::FLEX_BLOCK] // FLEX_BLOCK

            def visible(b, h, q, kv):
                return (kv <= q) & (doc_BS[b, q] == doc_BS[b, kv])

            return _banded_block_mask(first.to(torch.int32), last, S, visible)
        case other:
            raise ValueError(f"unknown attention backend {other!r}")


def attend(q_BSHK: torch.Tensor, k_BSHK: torch.Tensor, v_BSHK: torch.Tensor, mask: AttentionMask) -> torch.Tensor:
    """Apply scaled dot-product attention under `mask`: [B, S, H, K] in, [B, S, H, K] out, scale K^-0.5."""
    match mask:
        case BlockLocalMask():
            return _attend_block_local(q_BSHK, k_BSHK, v_BSHK, mask)
        case DenseMask():
            q, k, v = (x.transpose(1, 2) for x in (q_BSHK, k_BSHK, v_BSHK))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.visible).transpose(1, 2)
        case BlockMask():
            q, k, v = (x.transpose(1, 2).contiguous() for x in (q_BSHK, k_BSHK, v_BSHK))
            attention = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
            return attention(q, k, v, block_mask=mask).transpose(1, 2)  # pyright: ignore[reportAttributeAccessIssue]
        case other:
            raise TypeError(f"attend() knows no mask of type {type(other).__name__}")


def _resolve(backend: AttentionBackend, device: torch.device) -> str:
    if backend == "auto":
        return "flex" if device.type == "cuda" else "sdpa"
    return backend


@cache
def _compiled_flex_attention():
    # Uncompiled FlexAttention computes S x S scores, so it is never called outside a compiled region.
    return torch.compile(flex_attention, dynamic=False)


def _block_local_mask(doc_BS: torch.Tensor, window: int) -> BlockLocalMask:
    B, S = doc_BS.shape
    C = min(window, S)
    N = -(-S // C)
    # -2 marks slots outside the row: no query has it, so they are never seen (nor is anything from them read).
    doc_BT = F.pad(doc_BS, (C, N * C - S), value=-2)
    query_doc_BNC = doc_BT[:, C:].view(B, N, C)
    key_doc_BNK = torch.cat([doc_BT[:, :-C].view(B, N, C), query_doc_BNC], dim=2)
    query_C1 = torch.arange(C, 2 * C, device=doc_BS.device)[:, None]
    key_K = torch.arange(2 * C, device=doc_BS.device)
    near_CK = (key_K <= query_C1) & (query_C1 - key_K < window)
    return BlockLocalMask((near_CK & (query_doc_BNC[..., None] == key_doc_BNK[:, :, None]))[:, :, None])


def _attend_block_local(q_BSHK, k_BSHK, v_BSHK, mask: BlockLocalMask) -> torch.Tensor:
    B, S, H, K = q_BSHK.shape
    C, N = mask.block, mask.visible.shape[1]
    pad = (0, 0, 0, 0, 0, N * C - S)
    q, k, v = (F.pad(x, pad).view(B, N, C, H, K) for x in (q_BSHK, k_BSHK, v_BSHK))

    def with_previous_block(x_BNCHK):
        previous = F.pad(x_BNCHK, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
        return torch.cat([previous, x_BNCHK], dim=2).flatten(0, 1).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        q.flatten(0, 1).transpose(1, 2),
        with_previous_block(k),
        with_previous_block(v),
        attn_mask=mask.visible.flatten(0, 1),
    )
    return out.transpose(1, 2).reshape(B, N * C, H, K)[:, :S]


def _first_slot_of_document(doc_BS: torch.Tensor) -> torch.Tensor:
    """Return the slot where the run of equal documents around each slot begins, [B, S]."""
    slot_S = torch.arange(doc_BS.shape[1], device=doc_BS.device)
    begins_BS = F.pad(doc_BS[:, 1:] != doc_BS[:, :-1], (1, 0), value=True)
    return torch.where(begins_BS, slot_S, 0).cummax(1).values


def _banded_block_mask(first_BQ, last_Q, S: int, visible) -> BlockMask:
    """Make a block mask in which the query tile i reads the key tiles first[i]..last[i], each masked inside."""
    n_blocks = last_Q.shape[0]
    offset = torch.arange(n_blocks, dtype=torch.int32, device=first_BQ.device)
    kv_indices = (first_BQ[..., None] + offset).clamp(max=n_blocks - 1).to(torch.int32)
    return BlockMask.from_kv_blocks(
        kv_num_blocks=(last_Q - first_BQ + 1).to(torch.int32)[:, None].contiguous(),
        kv_indices=kv_indices[:, None].contiguous(),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=visible,
        seq_lengths=(S, S),
    )

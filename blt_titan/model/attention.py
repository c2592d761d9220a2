"""Self-attention inside one row: a causal window over bytes, or full causal over patches, within a document.

Enters: queries, keys, values [B, S, H, K] and a mask made once per forward; leaves: [B, S, H, K]. The choice that
is not obvious: nothing local ever has S x S entries. On a CPU a window is computed in blocks of queries, each with the
keys that it reaches (`block_local.py`); on CUDA the same rule is a FlexAttention block mask (`flex.py`), or documents
are runs of slots without a mask (`varlen.py`). All rely on the batch contract that real bytes lie side by side (padding
only at the end), so that the distance of two slots is the distance of two bytes.

A slice of a row sees more keys than it has queries: over bytes the W that precede it, put before its own (the oldest
lies outside of every window, but W keys are aligned in memory and W - 1 are not); over patches those of the whole row.
`SlicedMask` says so, and where the other keys come from; `attend` is given all of them.

Letters: B rows, S slots (bytes or patches), T slots of keys, Q queries, H heads, K head size, W window, C queries of a
block, N blocks, R keys of a block.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask

from blt_titan.model.block_local import BlockBias, attend_in_blocks, block_bias
from blt_titan.model.flex import attend_flex, causal_block_mask, window_block_mask
from blt_titan.model.varlen import DOCUMENTS, VarlenMask, attend_varlen, varlen_mask

AttentionBackend = Literal["auto", "sdpa", "flex", "varlen"]


@dataclass(frozen=True)
class BlockLocalMask:
    """Visibility of a window, block of queries by block."""

    bias: BlockBias


@dataclass(frozen=True)
class DenseMask:
    """Visibility among all slots, for the short sequence of patches and for steps of generation only."""

    bias: torch.Tensor
    """0 where a key is seen, else -inf, fp32 [B, 1, Q, T]."""
    is_causal: bool = False
    """Query i sees none of the keys after i: they are then not even computed."""


@dataclass(frozen=True)
class SlicedMask:
    """The mask of a slice whose attention must first bring keys from other devices (see `Placement.attend_bytes`)."""

    inner: BlockLocalMask | DenseMask | BlockMask | VarlenMask
    """Over the slice's queries and all keys that they may see."""
    tail_BT: torch.Tensor
    """As in `batch.SliceLayout`."""
    halo_BW: torch.Tensor
    """As in `batch.SliceLayout`, after one that is always PADDING, integer [B, W]."""


AttentionMask = BlockLocalMask | DenseMask | BlockMask | VarlenMask | SlicedMask


def window_mask(
    doc_BS: torch.Tensor,
    *,
    window: int,
    backend: AttentionBackend = "auto",
    before_doc_BW: torch.Tensor | None = None,
    documents: int = DOCUMENTS,
) -> BlockLocalMask | BlockMask | VarlenMask:
    """Build the mask of a local stack: j is seen from i iff i - window < j <= i and both lie in one document.

    Args:
        doc_BS: document of each byte slot, integer [B, S], PADDING (-1) where padded. Padding sees padding only.
        window: W, in bytes.
        backend: "auto" takes FlexAttention on CUDA and SDPA elsewhere.
        before_doc_BW: documents of up to W bytes before the first slot, whose keys then precede the slots' own.
        documents: of a row, at most; only "varlen" asks.
    """
    match resolve_backend(backend, doc_BS.device):
        case "sdpa":
            return BlockLocalMask(block_bias(doc_BS, window=window, before_doc_BW=before_doc_BW))
        case "flex":
            return window_block_mask(doc_BS, window=window, before_doc_BW=before_doc_BW)
        case "varlen":
            _require_whole_rows(before_doc_BW is None)
            return varlen_mask(doc_BS, window=window, documents=documents)
        case other:
            raise ValueError(f"unknown attention backend {other!r}")


def causal_mask(
    doc_BS: torch.Tensor,
    *,
    backend: AttentionBackend = "auto",
    queries: range | None = None,
    documents: int = DOCUMENTS,
) -> DenseMask | BlockMask | VarlenMask:
    """Build the mask of the global stack: j is seen from i iff j <= i and both lie in one document.

    Args:
        doc_BS: document of each patch slot, integer [B, S], PADDING (-1) where padded: at the end of each slice of the
            row. Padding sees padding only.
        backend: "auto" takes FlexAttention on CUDA and SDPA elsewhere.
        queries: the slots that ask; None for all. All are keys.
        documents: of a row, at most; only "varlen" asks.
    """
    asking = queries or range(doc_BS.shape[1])
    match resolve_backend(backend, doc_BS.device):
        case "sdpa":
            slot_S = torch.arange(doc_BS.shape[1], device=doc_BS.device)
            causal_QS = slot_S[asking.start : asking.stop, None] >= slot_S
            query_doc_BQ1 = doc_BS[:, asking.start : asking.stop, None]
            mask = dense_mask((causal_QS & (query_doc_BQ1 == doc_BS[:, None, :]))[:, None])
            return DenseMask(mask.bias, is_causal=not asking.start)
        case "flex":
            return causal_block_mask(doc_BS, asking)
        case "varlen":
            _require_whole_rows(len(asking) == doc_BS.shape[1])
            return varlen_mask(doc_BS, window=None, documents=documents)
        case other:
            raise ValueError(f"unknown attention backend {other!r}")


def dense_mask(visible_B1QT: torch.Tensor) -> DenseMask:
    """Build a mask from who sees whom, bool [B or 1, 1, Q, T]."""
    bias = torch.zeros(visible_B1QT.shape, device=visible_B1QT.device)
    return DenseMask(bias.masked_fill_(~visible_B1QT, -torch.inf))


def attend(q_BSHK: torch.Tensor, k_BTHK: torch.Tensor, v_BTHK: torch.Tensor, mask: AttentionMask) -> torch.Tensor:
    """Apply scaled dot-product attention under `mask`: [B, S, H, K] in, [B, S, H, K] out, scale K^-0.5.

    Keys and values may be longer than the queries, as the mask says.

    Raises:
        FlexVariantsError: the mask is FlexAttention's, outside a compiled region, and of one shape too many.
        TypeError: the mask is of documents as runs, and the numbers are of 32 bits.
    """
    match mask:
        case BlockLocalMask():
            return attend_in_blocks(q_BSHK, k_BTHK, v_BTHK, mask.bias)
        case DenseMask():
            return _attend_dense(q_BSHK, k_BTHK, v_BTHK, mask)
        case BlockMask():
            return attend_flex(q_BSHK, k_BTHK, v_BTHK, mask)
        case VarlenMask():
            return attend_varlen(q_BSHK, k_BTHK, v_BTHK, mask)
        case other:
            raise TypeError(f"attend() knows no mask of type {type(other).__name__}")


def resolve_backend(backend: AttentionBackend, device: torch.device) -> str:
    """Return the backend that "auto" stands for on a device; others as they are."""
    if backend == "auto":
        return "flex" if device.type == "cuda" else "sdpa"
    return backend


def _require_whole_rows(whole: bool) -> None:
    if not whole:
        raise ValueError("attention_backend = 'varlen' is for whole rows: a slice has padding amid its documents")


def _attend_dense(q_BSHK, k_BTHK, v_BTHK, mask: DenseMask) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BSHK, k_BTHK, v_BTHK))
    if q.device.type != "cpu" or not mask.is_causal:
        bias = mask.bias.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)
    # The public function takes a mask or leaves out what is after the query, this one does both.
    bias = mask.bias.to(torch.promote_types(q.dtype, torch.float32))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(q, k, v, 0.0, True, attn_mask=bias)[0].transpose(1, 2)

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

A slice of a row sees more keys than it has queries: over bytes the W - 1 that precede it, put before its own; over
patches those of the whole row. `SlicedMask` says so, and where the other keys come from; `attend` is given
all of them.

Letters: B rows, S slots (bytes or patches), T slots of keys, H heads, K head size, W window, C block, N blocks.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

AttentionBackend = Literal["auto", "sdpa", "flex"]

FLEX_BLOCK = 128
"""Rows and columns of one tile of a FlexAttention block mask."""

FLEX_VARIANTS = 16
"""How many kernels of FlexAttention a process may compile, one for each combination of shapes and of with or without
gradient. A run whose blocks are not compiled needs five: windowed and causal attention, in training and in validation,
and the entropy scorer's. The rest is for programs that call models themselves; what has rows of any length takes SDPA.
"""


class FlexVariantsError(RuntimeError):
    """FlexAttention was asked for more kernels than `FLEX_VARIANTS`."""


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


@dataclass(frozen=True)
class SlicedMask:
    """The mask of a slice whose attention must first bring keys from other devices (see `Placement.attend_bytes`)."""

    inner: BlockLocalMask | DenseMask | BlockMask
    """Over the slice's queries and all keys that they may see."""
    tail_BT: torch.Tensor
    """As in `batch.SliceLayout`."""
    halo_BW: torch.Tensor
    """As in `batch.SliceLayout`."""


AttentionMask = BlockLocalMask | DenseMask | BlockMask | SlicedMask


def window_mask(
    doc_BS: torch.Tensor,
    *,
    window: int,
    backend: AttentionBackend = "auto",
    before_doc_BW: torch.Tensor | None = None,
) -> BlockLocalMask | BlockMask:
    """Build the mask of a local stack: j is seen from i iff i - window < j <= i and both lie in one document.

    Args:
        doc_BS: document of each byte slot, integer [B, S], PADDING (-1) where padded. Padding sees padding only.
        window: W, in bytes.
        backend: "auto" takes FlexAttention on CUDA and SDPA elsewhere.
        before_doc_BW: documents of the W - 1 bytes before the first slot, whose keys then precede the slots' own.
    """
    match resolve_backend(backend, doc_BS.device):
        case "sdpa":
            return _block_local_mask(doc_BS, window, before_doc_BW)
        case "flex":
            S = doc_BS.shape[1]
            before = 0 if before_doc_BW is None else before_doc_BW.shape[1]
            key_doc_BT = doc_BS if before_doc_BW is None else torch.cat([before_doc_BW, doc_BS], dim=1)
            tile = torch.arange(-(-S // FLEX_BLOCK), dtype=torch.int32, device=doc_BS.device)
            # A query tile reads from the oldest key of its first query to its last query's own.
            first = (tile * FLEX_BLOCK + (before - (window - 1))).clamp(min=0) // FLEX_BLOCK
            last = ((tile + 1) * FLEX_BLOCK - 1 + before).clamp(max=before + S - 1) // FLEX_BLOCK

            def visible(b, h, q, kv):
                near = (kv - before <= q) & (q - (kv - before) < window)
                return near & (doc_BS[b, q] == key_doc_BT[b, kv])

            return _banded_block_mask(first.expand(doc_BS.shape[0], -1), last, (S, before + S), visible)
        case other:
            raise ValueError(f"unknown attention backend {other!r}")


def causal_mask(
    doc_BS: torch.Tensor, *, backend: AttentionBackend = "auto", queries: range | None = None
) -> DenseMask | BlockMask:
    """Build the mask of the global stack: j is seen from i iff j <= i and both lie in one document.

    Args:
        doc_BS: document of each patch slot, integer [B, S], PADDING (-1) where padded: at the end of each slice of the
            row. Padding sees padding only.
        backend: "auto" takes FlexAttention on CUDA and SDPA elsewhere.
        queries: the slots that ask; None for all. All are keys.
    """
    S = doc_BS.shape[1]
    asking = queries or range(S)
    query_doc_BQ = doc_BS[:, asking.start : asking.stop]
    match resolve_backend(backend, doc_BS.device):
        case "sdpa":
            slot_S = torch.arange(S, device=doc_BS.device)
            causal_QS = slot_S[asking.start : asking.stop, None] >= slot_S
            return DenseMask((causal_QS & (query_doc_BQ[:, :, None] == doc_BS[:, None, :]))[:, None])
        case "flex":
            tile = torch.arange(-(-len(asking) // FLEX_BLOCK), dtype=torch.int32, device=doc_BS.device)
            last = (asking.start + (tile + 1) * FLEX_BLOCK - 1).clamp(max=asking.stop - 1) // FLEX_BLOCK
            first = _first_key_slot(doc_BS, asking) // FLEX_BLOCK
            begin = asking.start

            def visible(b, h, q, kv):
                return (kv <= q + begin) & (query_doc_BQ[b, q] == doc_BS[b, kv])

            return _banded_block_mask(first.to(torch.int32), last, (len(asking), S), visible)
        case other:
            raise ValueError(f"unknown attention backend {other!r}")


def attend(q_BSHK: torch.Tensor, k_BTHK: torch.Tensor, v_BTHK: torch.Tensor, mask: AttentionMask) -> torch.Tensor:
    """Apply scaled dot-product attention under `mask`: [B, S, H, K] in, [B, S, H, K] out, scale K^-0.5.

    Keys and values may be longer than the queries, as the mask says.

    Raises:
        FlexVariantsError: the mask is FlexAttention's, outside a compiled region, and of one shape too many.
    """
    match mask:
        case BlockLocalMask():
            return _attend_block_local(q_BSHK, k_BTHK, v_BTHK, mask)
        case DenseMask():
            q, k, v = (x.transpose(1, 2) for x in (q_BSHK, k_BTHK, v_BTHK))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.visible).transpose(1, 2)
        case BlockMask():
            q, k, v = (x.transpose(1, 2).contiguous() for x in (q_BSHK, k_BTHK, v_BTHK))
            attention = flex_attention if torch.compiler.is_compiling() else _attend_fused
            return attention(q, k, v, block_mask=mask).transpose(1, 2)  # pyright: ignore[reportAttributeAccessIssue]
        case other:
            raise TypeError(f"attend() knows no mask of type {type(other).__name__}")


def resolve_backend(backend: AttentionBackend, device: torch.device) -> str:
    """Return the backend that "auto" stands for on a device; others as they are."""
    if backend == "auto":
        return "flex" if device.type == "cuda" else "sdpa"
    return backend


@cache
def _compiled_flex_attention() -> Any:
    # Without fullgraph, one variant too many would run uncompiled, with S x S scores, after no more than a warning.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _attend_fused(q_BHSK: torch.Tensor, k_BHTK: torch.Tensor, v_BHTK: torch.Tensor, block_mask: BlockMask):
    """Call FlexAttention as a compiled region of its own; `FlexVariantsError` if it has too many shapes."""
    # Here, because importing it takes a second and a half.
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit

    try:
        with config.patch(recompile_limit=FLEX_VARIANTS):
            return _compiled_flex_attention()(q_BHSK, k_BHTK, v_BHTK, block_mask=block_mask)
    except FailOnRecompileLimitHit as error:
        raise FlexVariantsError(
            f"FlexAttention was compiled for {FLEX_VARIANTS} combinations of shapes in this process and is asked for "
            f"one more, queries {list(q_BHSK.shape)} and keys {list(k_BHTK.shape)}: pad rows to few lengths, or set "
            "attention_backend = 'sdpa' in the model's arguments"
        ) from error


def _block_local_mask(doc_BS: torch.Tensor, window: int, before_doc_BW: torch.Tensor | None) -> BlockLocalMask:
    B, S = doc_BS.shape
    C = min(window, S) if before_doc_BW is None else window
    N = -(-S // C)
    # -2 marks slots outside the row: no query has it, so they are never seen (nor is anything from them read).
    if before_doc_BW is None:
        before_doc_BW = doc_BS[:, :0]
    doc_BT = torch.cat([before_doc_BW, F.pad(doc_BS, (0, N * C - S), value=-2)], dim=1)
    doc_BT = F.pad(doc_BT, (C - before_doc_BW.shape[1], 0), value=-2)
    query_doc_BNC = doc_BT[:, C:].view(B, N, C)
    key_doc_BNK = torch.cat([doc_BT[:, :-C].view(B, N, C), query_doc_BNC], dim=2)
    query_C1 = torch.arange(C, 2 * C, device=doc_BS.device)[:, None]
    key_K = torch.arange(2 * C, device=doc_BS.device)
    near_CK = (key_K <= query_C1) & (query_C1 - key_K < window)
    return BlockLocalMask((near_CK & (query_doc_BNC[..., None] == key_doc_BNK[:, :, None]))[:, :, None])


def _attend_block_local(q_BSHK, k_BTHK, v_BTHK, mask: BlockLocalMask) -> torch.Tensor:
    B, S, H, K = q_BSHK.shape
    C, N = mask.block, mask.visible.shape[1]
    q_BNCHK = F.pad(q_BSHK, (0, 0, 0, 0, 0, N * C - S)).view(B, N, C, H, K)

    def with_previous_block(x_BTHK):
        # What precedes the first slot is the end of the block before the first.
        pad = (0, 0, 0, 0, C - (x_BTHK.shape[1] - S), N * C - S)
        blocks = F.pad(x_BTHK, pad).view(B, N + 1, C, H, K)
        return torch.cat([blocks[:, :-1], blocks[:, 1:]], dim=2).flatten(0, 1).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        q_BNCHK.flatten(0, 1).transpose(1, 2),
        with_previous_block(k_BTHK),
        with_previous_block(v_BTHK),
        attn_mask=mask.visible.flatten(0, 1),
    )
    return out.transpose(1, 2).reshape(B, N * C, H, K)[:, :S]


def _first_key_slot(doc_BS: torch.Tensor, asking: range) -> torch.Tensor:
    """Return for each query tile a slot at or before the first key that one of its real queries may see, [B, tiles].

    Documents are numbered in order, so padding inside a row (at the end of a slice) can be taken for the document
    before it. A tile of nothing but padding reads that padding alone.
    """
    query_doc_BQ = doc_BS[:, asking.start : asking.stop]
    tiles_BNC = F.pad(query_doc_BQ, (0, -len(asking) % FLEX_BLOCK), value=-1).unflatten(1, (-1, FLEX_BLOCK))
    of_query = slice(asking.start, asking.stop, FLEX_BLOCK)
    of_document, of_padding = _first_slot_of_run(doc_BS.cummax(1).values), _first_slot_of_run(doc_BS)
    return torch.where(tiles_BNC.amax(2) >= 0, of_document[:, of_query], of_padding[:, of_query])


def _first_slot_of_run(doc_BS: torch.Tensor) -> torch.Tensor:
    """Return the slot where the run of equal documents around each slot begins, [B, S]."""
    slot_S = torch.arange(doc_BS.shape[1], device=doc_BS.device)
    begins_BS = F.pad(doc_BS[:, 1:] != doc_BS[:, :-1], (1, 0), value=True)
    return torch.where(begins_BS, slot_S, 0).cummax(1).values


def _banded_block_mask(first_BQ, last_Q, seq_lengths: tuple[int, int], visible) -> BlockMask:
    """Make a block mask in which the query tile i reads the key tiles first[i]..last[i], each masked inside."""
    n_key_tiles = -(-seq_lengths[1] // FLEX_BLOCK)
    offset = torch.arange(n_key_tiles, dtype=torch.int32, device=first_BQ.device)
    kv_indices = (first_BQ[..., None] + offset).clamp(max=n_key_tiles - 1).to(torch.int32)
    return BlockMask.from_kv_blocks(
        kv_num_blocks=(last_Q - first_BQ + 1).to(torch.int32)[:, None].contiguous(),
        kv_indices=kv_indices[:, None].contiguous(),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=visible,
        seq_lengths=seq_lengths,
    )

"""FlexAttention: block lists made by arithmetic, and one compiled kernel for each combination of shapes.

A block mask lists for each tile of queries the tiles of keys that it reads, in two lists: those of which every pair is
visible, and those of which the mask function decides. Both come from the first and last key of a tile and from whether
a tile lies in one document: S x S entries are never looked at, and the host reads nothing.

Letters: B rows, S slots, Q queries, T keys, N query tiles, M key tiles.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

FLEX_BLOCK = 128
"""Rows and columns of one tile of a FlexAttention block mask."""

FLEX_VARIANTS = 16
"""How many kernels of FlexAttention a process may compile, one for each combination of shapes and of with or without
gradient. A run whose blocks are not compiled needs five: windowed and causal attention, in training and in validation,
and the entropy scorer's. The rest is for programs that call models themselves; what has rows of any length takes SDPA.
"""

NARROW_HEAD = 64
"""Heads up to this size take `NARROW_TILES`, wider ones `WIDE_TILES`."""

NARROW_TILES = {"fwd_BLOCK_M": FLEX_BLOCK, "fwd_BLOCK_N": 64}
"""With torch's own choice of 128 x 128 the forward kernel spills 184 bytes a thread on sm_90."""

WIDE_TILES = {"bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 128, "bwd_BLOCK_M2": 128, "bwd_BLOCK_N2": 32}
"""With torch's own choice of 64 x 128 the backward kernel spills 64 bytes a thread; 64 x 64 does not either, but leaves
one of two warp groups without rows."""

_OUTSIDE = -2
"""Document of slots outside the row, which real tiles never have."""


class FlexVariantsError(RuntimeError):
    """FlexAttention was asked for more kernels than `FLEX_VARIANTS`."""


def attend_flex(q_BSHK: torch.Tensor, k_BTHK: torch.Tensor, v_BTHK: torch.Tensor, mask: BlockMask) -> torch.Tensor:
    """Attend under a block mask: [B, S, H, K] in and out, scale K^-0.5.

    Raises:
        FlexVariantsError: outside a compiled region, and one shape too many.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BSHK, k_BTHK, v_BTHK))
    options: Any = None
    if q.is_cuda:
        options = NARROW_TILES if q.shape[-1] <= NARROW_HEAD else WIDE_TILES
    call: Any = flex_attention if torch.compiler.is_compiling() else _attend_fused
    return call(q, k, v, block_mask=mask, kernel_options=options).transpose(1, 2)


def window_block_mask(doc_BS: torch.Tensor, *, window: int, before_doc_BW: torch.Tensor | None) -> BlockMask:
    """Build the block mask of `attention.window_mask`."""
    S = doc_BS.shape[1]
    before = 0 if before_doc_BW is None else before_doc_BW.shape[1]
    key_doc_BT = doc_BS if before_doc_BW is None else torch.cat([before_doc_BW, doc_BS], dim=1)
    N, M = -(-S // FLEX_BLOCK), -(-(before + S) // FLEX_BLOCK)
    first_query_N1, first_key_M = _first_slots(N, doc_BS.device)[:, None] + before, _first_slots(M, doc_BS.device)
    last_query_N1, last_key_M = first_query_N1 + FLEX_BLOCK - 1, first_key_M + FLEX_BLOCK - 1
    # From the oldest key of a tile's first query to its last query's own; of a full tile, all pairs are as near.
    listed_NM = (last_key_M > first_query_N1 - window) & (first_key_M <= last_query_N1)
    full_NM = (last_key_M <= first_query_N1) & (first_key_M > last_query_N1 - window)

    def visible(b, h, q, kv):
        near = (kv - before <= q) & (q - (kv - before) < window)
        return near & (doc_BS[b, q] == key_doc_BT[b, kv])

    return _block_mask(listed_NM[None], full_NM & _in_one_document(doc_BS, key_doc_BT), (S, before + S), visible)


def causal_block_mask(doc_BS: torch.Tensor, asking: range) -> BlockMask:
    """Build the block mask of `attention.causal_mask`."""
    S, begin = doc_BS.shape[1], asking.start
    query_doc_BQ = doc_BS[:, asking.start : asking.stop]
    N, M = -(-len(asking) // FLEX_BLOCK), -(-S // FLEX_BLOCK)
    first_query_N1, first_key_M = _first_slots(N, doc_BS.device)[:, None] + begin, _first_slots(M, doc_BS.device)
    last_query_N1 = (first_query_N1 + FLEX_BLOCK - 1).clamp(max=asking.stop - 1)
    last_key_M = first_key_M + FLEX_BLOCK - 1
    oldest_BN1 = _first_key_slot(doc_BS, asking)[..., None]
    listed_BNM = (last_key_M >= oldest_BN1) & (first_key_M <= last_query_N1)
    full_NM = last_key_M <= first_query_N1

    def visible(b, h, q, kv):
        return (kv <= q + begin) & (query_doc_BQ[b, q] == doc_BS[b, kv])

    full_BNM = listed_BNM & full_NM & _in_one_document(query_doc_BQ, doc_BS)
    return _block_mask(listed_BNM, full_BNM, (len(asking), S), visible)


@cache
def _compiled_flex_attention() -> Any:
    # Without fullgraph, one variant too many would run uncompiled, with S x S scores, after no more than a warning.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _attend_fused(q_BHSK: torch.Tensor, k_BHTK: torch.Tensor, v_BHTK: torch.Tensor, **options: Any) -> Any:
    """Call FlexAttention as a compiled region of its own; `FlexVariantsError` if it has too many shapes."""
    # Here, because importing it takes a second and a half.
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit

    try:
        with config.patch(recompile_limit=FLEX_VARIANTS):
            return _compiled_flex_attention()(q_BHSK, k_BHTK, v_BHTK, **options)
    except FailOnRecompileLimitHit as error:
        raise FlexVariantsError(
            f"FlexAttention was compiled for {FLEX_VARIANTS} combinations of shapes in this process and is asked for "
            f"one more, queries {list(q_BHSK.shape)} and keys {list(k_BHTK.shape)}: pad rows to few lengths, or set "
            "attention_backend = 'sdpa' in the model's arguments"
        ) from error


def _block_mask(
    listed_BNM: torch.Tensor, full_BNM: torch.Tensor, seq_lengths: tuple[int, int], visible: Callable
) -> BlockMask:
    """Make a block mask that reads the listed tiles, of which the full ones are not masked inside, bool [B, N, M]."""
    partial_count, partial_tiles = _lists(listed_BNM & ~full_BNM)
    full_count, full_tiles = _lists(full_BNM)
    return BlockMask.from_kv_blocks(
        kv_num_blocks=partial_count,
        kv_indices=partial_tiles,
        full_kv_num_blocks=full_count,
        full_kv_indices=full_tiles,
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=visible,
        seq_lengths=seq_lengths,
    )


def _lists(wanted_BNM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many tiles are wanted, int32 [B, 1, N], and which, in order, int32 [B, 1, N, M]; others follow."""
    order_BNM = wanted_BNM.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return wanted_BNM.sum(-1, dtype=torch.int32)[:, None], order_BNM.to(torch.int32)[:, None].contiguous()


def _in_one_document(query_doc_BQ: torch.Tensor, key_doc_BT: torch.Tensor) -> torch.Tensor:
    """Tell for each pair of tiles whether all their slots, inside the row, have one document, bool [B, N, M]."""
    (low_BN, high_BN), (low_BM, high_BM) = (_lowest_and_highest(doc) for doc in (query_doc_BQ, key_doc_BT))
    one_BN, one_BM = low_BN == high_BN, low_BM == high_BM
    return one_BN[..., None] & one_BM[:, None] & (low_BN[..., None] == low_BM[:, None])


def _lowest_and_highest(doc_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tiles_BNC = _tiles(doc_BS, _OUTSIDE)
    return tiles_BNC.amin(-1), tiles_BNC.amax(-1)


def _tiles(doc_BS: torch.Tensor, outside: int) -> torch.Tensor:
    return F.pad(doc_BS, (0, -doc_BS.shape[1] % FLEX_BLOCK), value=outside).unflatten(1, (-1, FLEX_BLOCK))


def _first_slots(tiles: int, device: torch.device) -> torch.Tensor:
    return torch.arange(tiles, dtype=torch.int32, device=device) * FLEX_BLOCK


def _first_key_slot(doc_BS: torch.Tensor, asking: range) -> torch.Tensor:
    """Return for each query tile a slot at or before the first key that one of its real queries may see, [B, tiles].

    Documents are numbered in order, so padding inside a row (at the end of a slice) can be taken for the document
    before it. A tile of nothing but padding reads that padding alone.
    """
    tiles_BNC = _tiles(doc_BS[:, asking.start : asking.stop], -1)
    of_query = slice(asking.start, asking.stop, FLEX_BLOCK)
    of_document, of_padding = _first_slot_of_run(doc_BS.cummax(1).values), _first_slot_of_run(doc_BS)
    return torch.where(tiles_BNC.amax(2) >= 0, of_document[:, of_query], of_padding[:, of_query])


def _first_slot_of_run(doc_BS: torch.Tensor) -> torch.Tensor:
    """Return the slot where the run of equal documents around each slot begins, [B, S]."""
    slot_S = torch.arange(doc_BS.shape[1], device=doc_BS.device)
    begins_BS = F.pad(doc_BS[:, 1:] != doc_BS[:, :-1], (1, 0), value=True)
    return torch.where(begins_BS, slot_S, 0).cummax(1).values

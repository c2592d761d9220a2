"""Attention over documents as runs of slots: torch's own FlashAttention of sequences of unequal length.

Enters: the document of each slot; leaves: where runs of equal documents begin, one after the other over all rows, and
attention among the slots of each run. Slots that are padding make a run of their own, which sees itself. There is no
mask: causality and the window are the kernel's arguments.

The decision that is not obvious: how many runs there are is data, and data is not read by the host. Their starts
therefore have room for a fixed number of documents a row, and what is left over are runs of no slots. The kernel begins
a block for each run, tile of queries and head, and those without slots end at once: room for many documents is not
free. A row of more documents is refused on the host where rows come from (`data/rows/documents.py`); wherever they come
from, it ends the process on the device.

Worked example, one row of S = 8 with room for 3 documents, and the run of padding:

    doc_BS    0  0  0  1  1  -1  -1  -1
    starts    0  3  5  8  8               (5 - 3 = 2 slots of document 1, then 3 of padding, then a run of none)

Letters: B rows, S slots, H heads, K head size, R runs of a row.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

DOCUMENTS = 16
"""Documents of a row that there is room for, unless said otherwise."""

NUMBERS = (torch.bfloat16, torch.float16)
"""What FlashAttention computes with."""

HEAD_MULTIPLE, MOST_HEAD = 8, 256
"""FlashAttention's head sizes: multiples of the one, up to the other."""

_RUN_OF_PADDING = 1


@dataclass(frozen=True)
class VarlenMask:
    """Who sees whom: a slot those of its run up to itself, within the window."""

    starts: torch.Tensor
    """First slot of each run, counted over all rows, and the end of the last, int32 [B * R + 1]."""
    most_slots: int
    """No run is longer."""
    window: int | None
    """Slots that a slot sees at most, itself included; None for all."""


def varlen_mask(doc_BS: torch.Tensor, *, window: int | None, documents: int) -> VarlenMask:
    """Build the mask of `attention.window_mask`, or without a window that of `attention.causal_mask`.

    Args:
        doc_BS: document of each slot, integer [B, S]; the slots of a document lie side by side.
        window: W.
        documents: of a row, at most; padding is none. A row of more ends in an assertion of the device.
    """
    B, S = doc_BS.shape
    runs = documents + _RUN_OF_PADDING
    begins_BS = F.pad(doc_BS[:, 1:] != doc_BS[:, :-1], (1, 0), value=True)
    run_BS = begins_BS.cumsum(1, dtype=torch.int32)
    torch.ops.aten._assert_async.msg(
        (run_BS[:, -1] <= runs).all(), f"a row has more than {documents} documents: varlen_documents"
    )
    # The first slot of run r or of a later one: S, the end of the row, where there is none.
    wanted_BR = torch.arange(1, runs + 1, dtype=torch.int32, device=doc_BS.device).expand(B, runs).contiguous()
    start_BR = torch.searchsorted(run_BS, wanted_BR, out_int32=True)
    row_B1 = torch.arange(0, B * S, S, dtype=torch.int32, device=doc_BS.device)[:, None]
    return VarlenMask(F.pad((start_BR + row_B1).flatten(), (0, 1), value=B * S), S, window)


def attend_varlen(q_BSHK: torch.Tensor, k_BSHK: torch.Tensor, v_BSHK: torch.Tensor, mask: VarlenMask) -> torch.Tensor:
    """Attend within runs: [B, S, H, K] in and out, scale K^-0.5.

    Raises:
        TypeError: numbers of more than 16 bits, which FlashAttention does not take.
    """
    # Here: the import alone takes a second, and only this backend needs it.
    from torch.nn.attention.varlen import varlen_attn

    if q_BSHK.dtype not in NUMBERS:
        raise TypeError(f"attention_backend = 'varlen' computes in bfloat16 or float16, and was given {q_BSHK.dtype}")
    window = (-1 if mask.window is None else mask.window - 1, 0)
    q, k, v = (x.flatten(0, 1) for x in (q_BSHK, k_BSHK, v_BSHK))
    out = varlen_attn(q, k, v, mask.starts, mask.starts, mask.most_slots, mask.most_slots, window_size=window)
    assert isinstance(out, torch.Tensor)
    return out.view_as(q_BSHK)

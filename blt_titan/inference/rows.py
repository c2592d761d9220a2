"""Rows of different lengths as one batch, for inference: ids, and the layout that the model's forward takes.

Each row is a document, or a stretch of one, that is whole in itself: nothing is attended across rows. Shapes are
rounded up, so that there are few.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from blt_titan.batch import PADDING, PatchLayout

BYTE_STEP, PATCH_STEP = 64, 16


class Row(NamedTuple):
    """Inputs and where patches begin among them."""

    ids: np.ndarray
    """Integers [N]."""
    starts: np.ndarray
    """bool [N + 1], with the position after the last; the first two are True."""


def pad_ids(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Put ids of rows below each other: int64 [B, S], 0 where padded; S is a multiple of BYTE_STEP."""
    ids_BS = np.zeros((len(rows), -(-max(map(len, rows)) // BYTE_STEP) * BYTE_STEP), np.int64)
    for number, ids in enumerate(rows):
        ids_BS[number, : len(ids)] = ids
    return ids_BS


def layout_rows(rows: Sequence[Row]) -> PatchLayout:
    """Lay out rows that `pad_ids` put below each other; on the CPU, P a multiple of PATCH_STEP."""
    B = len(rows)
    S = -(-max(len(row.ids) for row in rows) // BYTE_STEP) * BYTE_STEP
    P = -(-max(int(row.starts.sum()) for row in rows) // PATCH_STEP) * PATCH_STEP
    pos_BS = np.zeros((B, S), np.int64)
    doc_BS, patch_BS, source_BS = (np.full((B, S), PADDING, np.int64) for _ in range(3))
    patch_pos_BP, patch_doc_BP = np.zeros((B, P), np.int64), np.full((B, P), PADDING, np.int64)
    for number, (ids, starts) in enumerate(rows):
        n = len(ids)
        assert starts[0]
        assert starts[1], "the second position of a row begins a patch, or the first would read its own"
        patch = np.cumsum(starts) - 1
        n_patches = int(patch[n - 1]) + 1
        pos_BS[number, :n], doc_BS[number, :n] = np.arange(n), 0
        patch_BS[number, :n], source_BS[number, :n] = patch[:n], patch[1:] - 1
        patch_pos_BP[number, :n_patches], patch_doc_BP[number, :n_patches] = np.arange(n_patches), 0
    return PatchLayout(
        *(torch.from_numpy(x) for x in (pos_BS, doc_BS, patch_BS, source_BS, patch_pos_BP, patch_doc_BP)),
        slice=(),
    )

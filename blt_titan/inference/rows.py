"""Rows of different lengths as one batch, for inference: ids, and the layout that the model's forward takes.

Each row is a document, or a stretch of one, that is whole in itself: nothing is attended across rows. Shapes are
rounded up, so that there are few.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from blt_titan.batch import PatchLayout
from blt_titan.layout import lay_out

BYTE_STEP, PATCH_STEP = 64, 16


class MarkedIds(NamedTuple):
    """Inputs of a row, and where patches begin among them."""

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


def layout_rows(rows: Sequence[MarkedIds]) -> PatchLayout:
    """Lay out rows that `pad_ids` put below each other; on the CPU, P a multiple of PATCH_STEP."""
    S = -(-max(len(row.ids) for row in rows) // BYTE_STEP) * BYTE_STEP
    P = -(-max(int(row.starts.sum()) for row in rows) // PATCH_STEP) * PATCH_STEP
    patch_len_BP = np.zeros((len(rows), P), np.int64)
    last_is_open_B = np.zeros(len(rows), bool)
    for number, (ids, starts) in enumerate(rows):
        assert starts[0]
        assert starts[1], "the second position of a row begins a patch, or the first would read its own"
        begins = np.flatnonzero(starts[:-1])
        patch_len_BP[number, : len(begins)] = np.diff(begins, append=len(ids))
        last_is_open_B[number] = not starts[-1]
    return lay_out(patch_len_BP, np.zeros_like(patch_len_BP), S, last_is_open_B=last_is_open_B)

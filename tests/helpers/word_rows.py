"""Rows of random words, cut at spaces: text that repeats nothing, and needs no data on disk."""

import numpy as np

from blt_titan.byte_vocab import document_ids
from blt_titan.data.rows.packing import PatchedIds, Row, RowShape, pack_row
from blt_titan.patching import rule_patch_starts


def word_rows(count: int, shape: RowShape) -> list[Row]:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        words = [bytes(rng.integers(97, 123, size=n)) for n in rng.integers(1, 9, size=shape.n_bytes // 3)]
        ids = document_ids(b" ".join(words))
        starts = np.flatnonzero(rule_patch_starts(ids, rule="space", max_patch_bytes=64))
        rows.append(pack_row(PatchedIds(ids, np.append(starts, len(ids))), shape))
    return rows

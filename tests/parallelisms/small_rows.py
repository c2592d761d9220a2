"""A batch for the debug model, of text that repeats nothing exactly."""

import numpy as np
import torch

from blt_titan.byte_vocab import document_ids
from blt_titan.data.collate import Batch, collate_rows
from blt_titan.data.packing import PatchedIds, RowShape, pack_row
from blt_titan.patching import rule_patch_starts


def debug_batch(*, rows: int, seq_len: int) -> Batch:
    rng = np.random.default_rng(0)
    shape = RowShape(seq_len // 512, 512, 160)
    packed = []
    for _ in range(rows):
        words = [bytes(rng.integers(97, 123, size=n)) for n in rng.integers(1, 9, size=seq_len // 3)]
        ids = document_ids(b" ".join(words))
        starts = np.flatnonzero(rule_patch_starts(ids, rule="space", max_patch_bytes=64))
        packed.append(pack_row(PatchedIds(ids, np.append(starts, len(ids))), shape))
    inputs, labels = collate_rows(packed, shape)
    assert isinstance(labels, torch.Tensor)
    return inputs, labels

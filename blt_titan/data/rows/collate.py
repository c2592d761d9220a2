"""From packed rows to a `batch.Batch`: whole rows, or one context slice of each.

The ranks that share a row split it by segments: with C context slices, slice c is the c-th C-th of the segments,
compacted, so that its padding lies at its end and inside it slots are real positions. What a row holds does not depend
on C. The indices are `layout.lay_out`'s; what a slice needs of the bytes before it is made here.

This runs in the training process: a packed row is a sixth of its indices, and moving those between processes costs more
than making them.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from blt_titan.batch import (
    IGNORE_LABEL,
    PADDING,
    SLICE_FIELDS,
    WHOLE_ROW,
    Batch,
    ContextSlice,
    SliceLayout,
)
from blt_titan.byte_vocab import BOS_ID, BOUNDARY_ID, EOS_ID
from blt_titan.data.rows.packing import Row, RowShape
from blt_titan.layout import lay_out


def collate_rows(rows: Sequence[Row], shape: RowShape, context_slice: ContextSlice = WHOLE_ROW) -> Batch:
    """Make a batch of one slice of each row, int32.

    Args:
        rows: B packed rows.
        shape: their shape; `context_slice.count` divides its segments.
        context_slice: the slice; S is the byte slots of it, P the patch slots of the whole row.
    """
    B, C = len(rows), context_slice.count
    S, slots = shape.n_bytes // C, shape.n_patches // C
    ids_BS = np.full((B, S), BOUNDARY_ID, np.int32)
    labels_BS = np.full((B, S), IGNORE_LABEL, np.int32)
    patch_len_BP, patch_doc_BP = (np.zeros((B, shape.n_patches), np.int32) for _ in range(2))
    looked_back = _room_to_look_back(B, S, context_slice) if C > 1 else {}
    for i, row in enumerate(rows):
        ids, cuts, segment_ends = row
        first_patch = np.zeros(C + 1, np.int64)  # of each slice
        first_patch[1:] = segment_ends[shape.segments // C - 1 :: shape.segments // C]
        lengths = cuts[1:] - cuts[:-1]
        # A document begins a patch; where the row begins inside one, that is the first.
        begins_doc = ids[cuts[:-1]] == BOS_ID
        begins_doc[:1] = True
        docs = begins_doc.cumsum(dtype=np.int32) - 1
        for c, (first, last) in enumerate(pairwise(first_patch)):
            patch_len_BP[i, c * slots : c * slots + last - first] = lengths[first:last]
            patch_doc_BP[i, c * slots : c * slots + last - first] = docs[first:last]

        begin, end = cuts[first_patch[context_slice.index : context_slice.index + 2]]
        ids_BS[i, : end - begin] = ids[begin:end]
        labels_BS[i, : end - begin] = ids[begin + 1 : end + 1]
        labels_BS[i, np.flatnonzero(ids[begin:end] == EOS_ID)] = IGNORE_LABEL
        if C > 1:
            room = {name: field[i] for name, field in looked_back.items()}
            _look_back(room, row, first_patch, cuts[:-1][begins_doc], context_slice)
    layout = lay_out(patch_len_BP, patch_doc_BP, S, context_slice=context_slice)
    if C > 1:
        layout = layout._replace(slice=SliceLayout(*(torch.from_numpy(field) for field in looked_back.values())))
    return Batch(torch.from_numpy(ids_BS), layout, torch.from_numpy(labels_BS))


def _room_to_look_back(B: int, S: int, context_slice: ContextSlice) -> dict[str, np.ndarray]:
    """Return the fields of `SliceLayout`, int32, as they are where nothing lies before the slice."""
    reach, before = context_slice.reach_bytes, context_slice.window_bytes - 1
    sizes = dict(zip(SLICE_FIELDS, (reach, reach, min(before, S), before, 1), strict=True))
    return {
        name: np.full((B, size), BOUNDARY_ID if name == "before_ids_BR" else PADDING, np.int32)
        for name, size in sizes.items()
    }


def _look_back(
    room: dict[str, np.ndarray],
    row: Row,
    first_patch: np.ndarray,
    doc_begins: np.ndarray,
    context_slice: ContextSlice,
) -> None:
    """Fill what a slice needs of the bytes before it, right-aligned.

    Args:
        room: of `_room_to_look_back`, the row's part of each field.
        row: the whole row.
        first_patch: of each slice, and the number of patches: int64 [C + 1].
        doc_begins: where the row's documents begin, ascending; the first is 0.
        context_slice: the slice.
    """
    first_byte, index = row.cuts[first_patch], context_slice.index
    begin, end = (int(byte) for byte in first_byte[index : index + 2])
    room["last_patch_B1"][:] = max(first_patch[index + 1] - first_patch[index] - 1, 0)
    reach = np.arange(max(begin - context_slice.reach_bytes, 0), begin)
    _fill_right(room["before_ids_BR"], row.ids[reach])
    _fill_right(room["before_doc_BR"], np.searchsorted(doc_begins, reach, side="right") - 1)
    tail = len(room["tail_BT"])
    _fill_right(room["tail_BT"], np.arange(max(end - begin - tail, 0), end - begin))
    before = np.arange(max(begin - context_slice.window_bytes + 1, 0), begin)
    holder = np.searchsorted(first_byte, before, side="right") - 1
    first_sender = max(index - context_slice.halo_slices, 0)
    assert end == begin or not len(before) or holder[0] >= first_sender, "halo_slices is too small for these segments"
    place = (holder - first_sender) * tail + tail - (first_byte[holder + 1] - before)
    _fill_right(room["halo_BW"], place if end > begin else place[:0])


def _fill_right(field: np.ndarray, values: np.ndarray) -> None:
    field[len(field) - len(values) :] = values

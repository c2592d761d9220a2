"""From packed rows to a batch: every index the model needs, for whole rows or for one context slice of each.

The ranks that share a row split it by segments: with C context slices, slice c is the c-th C-th of the segments,
compacted, so that its padding lies at its end and inside it slots are real positions. What a row holds does not depend
on C. Worked example: two segments of 6 bytes and 3 patches that hold patches of 1 3 | 4 2 bytes, as one slice and as
two (`.` is padding, `<` the last patch before the slice, whose index is the number of a slice's patch slots):

                    one slice                         slice 0 of 2       slice 1 of 2
    byte_patch      0 1 1 1 2 2 2 2 3 3 . .           0 1 1 1 . .        0 0 0 0 1 1
    source_patch    0 0 0 1 1 1 1 2 2 3 . .           0 0 0 1 . .        < < < 0 0 1
    byte_pos        0 1 2 3 4 5 6 7 8 9 . .           0 1 2 3 . .        4 5 6 7 8 9
    patch_pos       0 1 2 3 . .                       0 1 . 2 3 .  (of the whole row, slice beside slice)

This runs in the training process: a packed row is a sixth of its indices, and moving those between processes costs more
than making them.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from blt_titan.batch import IGNORE_LABEL, LAYOUT_FIELDS, PADDING, SLICE_FIELDS, WHOLE_ROW, ContextSlice
from blt_titan.byte_vocab import BOS_ID, BOUNDARY_ID, EOS_ID
from blt_titan.data.rows.packing import Row, RowShape

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]
"""Inputs by name ("input" for the ids [B, S], then the fields of `batch.PatchLayout`, and those of `batch.SliceLayout`
where rows are split) and labels [B, S], int32."""

_PADDING_OF = {"input": BOUNDARY_ID, "labels": IGNORE_LABEL, "byte_pos_BS": 0, "patch_pos_BP": 0, "before_ids_BR": 0}
"""What a slot without content holds; PADDING where a field is not named here."""


def collate_rows(
    rows: Sequence[Row], shape: RowShape, part: ContextSlice = WHOLE_ROW, *, pin_memory: bool = False
) -> Batch:
    """Lay out one slice of each row as a batch of contiguous fields.

    Args:
        rows: B packed rows.
        shape: their shape; `part.count` divides its segments.
        part: the slice; S is the byte slots of it, P the patch slots of the whole row.
        pin_memory: page-locked tensors for faster copies to a GPU.
    """
    S, P, C = shape.n_bytes // part.count, shape.n_patches, part.count
    sizes = {"input": S, "labels": S, **{name: P if name.endswith("BP") else S for name in LAYOUT_FIELDS}}
    if C > 1:
        reach, before = part.reach_bytes, part.window_bytes - 1
        sizes |= dict(zip(SLICE_FIELDS, (reach, reach, min(before, S), before, 1), strict=True))
    tensors = {
        name: torch.empty(len(rows), size, dtype=torch.int32, pin_memory=pin_memory) for name, size in sizes.items()
    }
    fields = {name: tensor.numpy() for name, tensor in tensors.items()}
    for i, row in enumerate(rows):
        _lay_out({name: field[i] for name, field in fields.items()}, row, shape, part)
    labels = tensors.pop("labels")
    return tensors, labels


def _lay_out(out: dict[str, np.ndarray], row: Row, shape: RowShape, part: ContextSlice) -> None:
    ids, cuts, segment_ends = row
    C = part.count
    slots = shape.n_patches // C
    first_patch = np.zeros(C + 1, np.int64)  # of each slice
    first_patch[1:] = segment_ends[shape.segments // C - 1 :: shape.segments // C]
    first_byte = cuts[first_patch]
    doc_begins = np.flatnonzero(ids[: row.n_ids] == BOS_ID)
    if not len(doc_begins) or doc_begins[0]:
        doc_begins = np.concatenate([[0], doc_begins])  # the row begins inside a document

    begin, end = int(first_byte[part.index]), int(first_byte[part.index + 1])
    begin_patch, end_patch = first_patch[part.index : part.index + 2]
    n = end - begin
    _fill(out, "input", ids[begin:end])
    _fill(out, "labels", ids[begin + 1 : end + 1])
    out["labels"][:n][ids[begin:end] == EOS_ID] = IGNORE_LABEL
    _fill(out, "byte_pos_BS", np.arange(begin, end))
    _fill(out, "byte_doc_BS", _numbers(doc_begins, begin, end))
    patch = _numbers(cuts[begin_patch : end_patch + 1], begin, end)
    _fill(out, "byte_patch_BS", patch)
    # The byte at i reads the patch before the one that holds i + 1; what follows the slice starts a patch.
    source = out["source_patch_BS"]
    np.subtract(patch[1:], 1, out=source[: max(n - 1, 0)])
    source[max(n - 1, 0) : n] = end_patch - begin_patch - 1
    source[n:] = PADDING
    if part.index and n:
        # Only the bytes of the slice's first patch can read what lies before it.
        in_first = int(cuts[begin_patch + 1]) - begin
        source[:in_first][source[:in_first] < 0] = slots

    doc_of_patch = np.searchsorted(doc_begins, cuts[:-1], side="right") - 1
    for c, (first, last) in enumerate(pairwise(first_patch)):
        here = {name: out[name][c * slots : (c + 1) * slots] for name in ("patch_pos_BP", "patch_doc_BP")}
        _fill(here, "patch_pos_BP", np.arange(first, last))
        _fill(here, "patch_doc_BP", doc_of_patch[first:last])

    if C > 1:
        _look_back(out, row, first_byte, doc_begins, part)
        out["last_patch_B1"][:] = max(end_patch - begin_patch - 1, 0)


def _look_back(
    out: dict[str, np.ndarray], row: Row, first_byte: np.ndarray, doc_begins: np.ndarray, part: ContextSlice
) -> None:
    """Fill what a slice needs of the bytes before it."""
    begin, end = (int(byte) for byte in first_byte[part.index : part.index + 2])
    reach = min(part.reach_bytes, begin)
    _fill_right(out, "before_ids_BR", row.ids[begin - reach : begin])
    _fill_right(out, "before_doc_BR", _numbers(doc_begins, begin - reach, begin))
    tail = len(out["tail_BT"])
    _fill_right(out, "tail_BT", np.arange(max(end - begin - tail, 0), end - begin))
    before = np.arange(max(begin - part.window_bytes + 1, 0), begin)
    holder = np.searchsorted(first_byte, before, side="right") - 1
    first_sender = max(part.index - part.halo_slices, 0)
    assert end == begin or not len(before) or holder[0] >= first_sender, "halo_slices is too small for these segments"
    place = (holder - first_sender) * tail + tail - (first_byte[holder + 1] - before)
    _fill_right(out, "halo_BW", place if end > begin else place[:0])


def _fill_right(out: dict[str, np.ndarray], name: str, values: np.ndarray) -> None:
    padding = len(out[name]) - len(values)
    out[name][:padding] = _PADDING_OF.get(name, PADDING)
    out[name][padding:] = values


def _fill(out: dict[str, np.ndarray], name: str, values: np.ndarray) -> None:
    out[name][: len(values)] = values
    out[name][len(values) :] = _PADDING_OF.get(name, PADDING)


def _numbers(begins: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Number the positions begin..end by the stretch that holds each; begins 0 1 4 give 0 1 1 1 for 0..4."""
    first, last = np.searchsorted(begins, [begin, end - 1], side="right") - 1
    edges = np.concatenate([[begin], begins[first + 1 : last + 1], [end]])
    return np.repeat(np.arange(first, max(last, first) + 1, dtype=np.int32), edges[1:] - edges[:-1])

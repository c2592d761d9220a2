"""Fill rows of fixed shape with whole patches.

A row is a number of segments; a segment has a budget of bytes and one of patches. The packer fills a segment with
whole patches until either budget would overflow and goes on in the next one. What a row holds therefore depends on the
segments alone, and a row can later be split between them (`collate.py`). Worked example: two segments of 6 bytes and 3
patches, patch lengths 1 3 4 2 1 5 2 ...

    segment 0   [1][3 . .]            4 of 6 bytes, 2 of 3 patches; the patch of 4 would overflow the bytes
    segment 1   [4 . . .][2 .]        6 of 6 bytes, 2 of 3 patches
    row         1 3 4 2 | . .         10 of 12 bytes, 4 of 6 patches; the next row begins with the patch of 1

Positions 0 and 1 of every row start patches, so that every real byte has a source patch: a patch of L > 1 bytes that
comes first in a row becomes 1 + (L - 1).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from blt_titan.batch import IGNORE_LABEL
from blt_titan.byte_vocab import BOS_ID, BYTE_OFFSET, EOS_ID


@dataclass(frozen=True)
class RowShape:
    """Segments of a row and their budgets."""

    segments: int
    segment_bytes: int
    segment_patches: int

    @property
    def n_bytes(self) -> int:
        """Byte slots S of a row."""
        return self.segments * self.segment_bytes

    @property
    def n_patches(self) -> int:
        """Patch slots P of a row."""
        return self.segments * self.segment_patches


class PatchedIds(NamedTuple):
    """Ids and where their patches are cut."""

    ids: np.ndarray
    """int16 [N]."""
    cuts: np.ndarray
    """Where patches begin, and N at the end: int64 [patches + 1], cuts[0] = 0."""


def frame_documents(text: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Put BOS before each document and EOS after it: ids, int16 [M], and which of them are bytes, bool [M]."""
    n_documents = len(offsets) - 1
    before = 2 * np.arange(n_documents)
    ids = np.empty(len(text) + 2 * n_documents, dtype=np.int16)
    is_byte = np.ones(len(ids), dtype=bool)
    bos, eos = offsets[:-1] + before, offsets[1:] + before + 1
    ids[bos], ids[eos] = BOS_ID, EOS_ID
    is_byte[bos] = is_byte[eos] = False
    ids[is_byte] = text.astype(np.int16) + BYTE_OFFSET
    return ids, is_byte


class Row(NamedTuple):
    """What a row holds, whatever the layout: small, because it crosses the border of a worker process."""

    ids: np.ndarray
    """The ids that the row took and the one that follows, IGNORE_LABEL where nothing follows: int16 [n_ids + 1]."""
    cuts: np.ndarray
    """Where the patches begin, and n_ids at the end: int32 [patches + 1]."""
    segment_ends: np.ndarray
    """Patches in the segments up to each: int32 [segments]."""

    @property
    def n_ids(self) -> int:
        """Ids that the row took, its real bytes."""
        return len(self.ids) - 1


def pack_row(source: PatchedIds, shape: RowShape) -> Row:
    """Fill one row from the beginning of `source`.

    Args:
        source: at least one more id than the row can take, or all that is left; ends with whole documents.
        shape: the row's segments. A patch must fit a segment.
    """
    ids, cuts = source
    cuts = cuts[: shape.n_patches + 2].astype(np.int32)
    if cuts[1] > 1:
        cuts = np.concatenate([[0, 1], cuts[1:]], dtype=np.int32)
    n_patches = 0
    segment_ends = np.empty(shape.segments, np.int32)
    for segment in range(shape.segments):
        fits = int(cuts.searchsorted(cuts[n_patches] + shape.segment_bytes, side="right")) - 1
        n_patches = segment_ends[segment] = min(fits, n_patches + shape.segment_patches, len(cuts) - 1)
    n = int(cuts[n_patches])
    taken = ids[: n + 1]
    if len(taken) == n:
        taken = np.append(taken, np.int16(IGNORE_LABEL))
    return Row(taken, cuts[: n_patches + 1], segment_ends)


def empty_row(shape: RowShape) -> Row:
    """Return a row without bytes: all padding, no targets, so it weighs nothing."""
    return Row(np.full(1, IGNORE_LABEL, np.int16), np.zeros(1, np.int32), np.zeros(shape.segments, np.int32))

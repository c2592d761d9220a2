"""Fill rows of fixed shape with whole patches.

A row is a number of segments; a segment has a budget of bytes and one of patches. The packer fills a segment with
whole patches until either budget would overflow and goes on in the next one. What a row holds therefore depends on the
segments alone, and a row can later be split between them. Inside the row the segments lie side by side, all padding at
the end. Worked example: two segments of 6 bytes and 3 patches, patch lengths 1 3 4 2 1 5 2 ...

    segment 0   [1][3 . .]            4 of 6 bytes, 2 of 3 patches; the patch of 4 would overflow the bytes
    segment 1   [4 . . .][2 .]        6 of 6 bytes, 2 of 3 patches
    row         1 3 4 2 | . .         10 of 12 bytes, 4 of 6 patches; the next row begins with the patch of 1

Positions 0 and 1 of every row start patches, so that every real byte has a source patch: a patch of L > 1 bytes that
comes first in a row becomes 1 + (L - 1).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from blt_titan.batch import IGNORE_LABEL, PADDING
from blt_titan.byte_vocab import BOS_ID, BOUNDARY_ID, BYTE_OFFSET, EOS_ID

MarkPatchStarts = Callable[[np.ndarray], np.ndarray]
"""Patch starts, bool [N], of the ids [N] of any number of whole documents."""


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


def patch_documents(text: np.ndarray, offsets: np.ndarray, mark_starts: MarkPatchStarts) -> PatchedIds:
    """Turn the documents of a record batch into ids, BOS and EOS included, and patches.

    Args:
        text: concatenated bytes, uint8 [N].
        offsets: document d is text[offsets[d]:offsets[d + 1]], int64 [documents + 1], offsets[0] = 0.
        mark_starts: the patching rule.
    """
    n_documents = len(offsets) - 1
    before = 2 * np.arange(n_documents)
    ids = np.empty(len(text) + 2 * n_documents, dtype=np.int16)
    is_byte = np.ones(len(ids), dtype=bool)
    bos, eos = offsets[:-1] + before, offsets[1:] + before + 1
    ids[bos], ids[eos] = BOS_ID, EOS_ID
    is_byte[bos] = is_byte[eos] = False
    ids[is_byte] = text.astype(np.int16) + BYTE_OFFSET
    return PatchedIds(ids, np.append(np.flatnonzero(mark_starts(ids)), len(ids)))


class Row(NamedTuple):
    """One row in the terms of `batch.py`, int32, and how many ids it took."""

    token_ids: np.ndarray
    labels: np.ndarray
    byte_pos: np.ndarray
    byte_doc: np.ndarray
    byte_patch: np.ndarray
    source_patch: np.ndarray
    patch_pos: np.ndarray
    patch_doc: np.ndarray
    n_ids: int

    def flat(self, out: np.ndarray | None = None) -> np.ndarray:
        """Return all fields side by side, int32 [6 S + 2 P]: one array crosses the process border, not eight."""
        return np.concatenate(self[:-1], out=out)


def pack_row(source: PatchedIds, shape: RowShape) -> Row:
    """Fill one row from the beginning of `source`.

    Args:
        source: at least one more id than the row can take, or all that is left; ends with whole documents.
        shape: the row's segments. A patch must fit a segment.
    """
    ids, cuts = source
    cuts = cuts[: shape.n_patches + 2]
    if cuts[1] > 1:
        cuts = np.concatenate([[0, 1], cuts[1:]])
    n_patches = 0
    for _ in range(shape.segments):
        fits = int(cuts.searchsorted(cuts[n_patches] + shape.segment_bytes, side="right")) - 1
        n_patches = min(fits, n_patches + shape.segment_patches, len(cuts) - 1)
    n = int(cuts[n_patches])

    row = _padded_row(shape, n, n_patches)
    here, following = ids[:n], ids[1 : n + 1]
    row.token_ids[:n] = here
    row.labels[n - 1] = IGNORE_LABEL  # where nothing follows
    row.labels[: len(following)] = following
    row.labels[:n][here == EOS_ID] = IGNORE_LABEL
    row.byte_pos[:n] = np.arange(n)
    begins_doc = here == BOS_ID
    begins_doc[0] = True
    row.byte_doc[:n] = _numbered(np.append(np.flatnonzero(begins_doc), n))
    row.byte_patch[:n] = _numbered(cuts[: n_patches + 1])
    # The byte at i reads the patch before the one that holds i + 1; what follows the row starts a patch.
    np.subtract(row.byte_patch[1:n], 1, out=row.source_patch[: n - 1])
    row.source_patch[n - 1] = n_patches - 1
    row.patch_pos[:n_patches] = np.arange(n_patches)
    row.patch_doc[:n_patches] = row.byte_doc[cuts[:n_patches]]
    return row


def _numbered(cuts: np.ndarray) -> np.ndarray:
    """Number every position by the stretch that it is in: cuts 0 1 4 give 0 1 1 1."""
    return np.repeat(np.arange(len(cuts) - 1, dtype=np.int32), np.diff(cuts))


def empty_row(shape: RowShape) -> Row:
    """Return a row of padding: no targets, so it weighs nothing."""
    return _padded_row(shape, 0, 0)


def _padded_row(shape: RowShape, n: int, n_patches: int) -> Row:
    """Return a row that is padding from byte n and from patch `n_patches` on; what comes before holds anything."""
    S, P = shape.n_bytes, shape.n_patches
    row = Row(*np.empty((6, S), np.int32), *np.empty((2, P), np.int32), n_ids=n)
    row.token_ids[n:] = BOUNDARY_ID
    row.labels[n:] = IGNORE_LABEL
    row.byte_pos[n:] = 0
    row.byte_doc[n:] = row.byte_patch[n:] = row.source_patch[n:] = PADDING
    row.patch_pos[n_patches:] = 0
    row.patch_doc[n_patches:] = PADDING
    return row

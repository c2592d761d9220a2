"""Which patches each row of a generation has so far: those that have ended, and the one that is open.

bytes read     BOS |  t  h  e | _  q      lengths 1 3 2, closed 2, open_bytes 2, positions 6
the next byte  belongs to the open patch: it has not ended. Had it, open_bytes would be 0 and closed 3
"""

from collections.abc import Sequence

import numpy as np

from blt_titan.patching import starts_to_lengths


class PatchLedger:
    """Counts the bytes and patches of rows while bytes are added to all of them.

    Args:
        starts: where patches begin in each prompt, bool [S_b + 1], the position after the last included.
    """

    def __init__(self, starts: Sequence[np.ndarray]):
        self._lengths = [starts_to_lengths(row_starts).tolist() for row_starts in starts]
        for row_lengths in self._lengths:
            # The position after the prompt has no byte yet: it begins a patch or lengthens the open one.
            row_lengths[-1] -= 1
            if not row_lengths[-1]:
                row_lengths.pop()
        ended = np.array([bool(row_starts[-1]) for row_starts in starts])
        self.positions = np.array([len(row_starts) - 1 for row_starts in starts])
        """Bytes that were read, int64 [B]: the position of the next."""
        self.closed = np.array([len(row_lengths) for row_lengths in self._lengths]) - ~ended
        """Patches that have ended, int64 [B]."""
        self.open_bytes = np.where(ended, 0, [row_lengths[-1] for row_lengths in self._lengths])
        """Bytes of the open patch, int64 [B]; 0 where the next byte begins one."""

    def add_byte(self, ends: np.ndarray) -> np.ndarray:
        """Count the next byte of each row.

        Args:
            ends: whether its patch ends with it, bool [B].

        Returns:
            Bytes of its patch, itself included, int64 [B].
        """
        for row_lengths, open_bytes in zip(self._lengths, self.open_bytes, strict=True):
            if open_bytes:
                row_lengths[-1] += 1
            else:
                row_lengths.append(1)
        patch_bytes = self.open_bytes + 1
        self.open_bytes = np.where(ends, 0, patch_bytes)
        self.closed = self.closed + ends
        self.positions = self.positions + 1
        return patch_bytes

    def lengths(self, row: int = 0) -> list[int]:
        """Return the lengths of a row's patches, as `BLT.logits` takes them: the next position is counted."""
        lengths = list(self._lengths[row])
        if self.open_bytes[row]:
            lengths[-1] += 1
        else:
            lengths.append(1)
        return lengths

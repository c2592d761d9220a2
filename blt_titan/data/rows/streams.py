"""A stream: an endless walk over its record batches, cut into rows, whose position is four integers.

Documents run on from row to row. When a row begins inside a document, its position says where: the record batch, and
how many ids of it (BOS and EOS counted) earlier rows took. To resume, the stream reads that record batch again and
drops those ids; since patches depend on the document alone, the rest is bit-identical.

A record batch in quarantine has no ids and is passed over; the position counts how many were.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from blt_titan.data.rows.packing import PatchedIds, Row, RowShape, pack_row

POSITION_FIELDS = ("pick", "ids_taken", "rows", "quarantined")
"""What a stream's state holds, int64 [4]: the record batch of its walk that the next row begins in, the ids of it that
earlier rows took, the rows made so far, and the record batches that were passed over before. Where data sets are mixed,
the ids taken of each follow."""

ReadPick = Callable[[int], PatchedIds | None]
"""The stream's n-th record batch as ids and patches; None after the last, where there is a last."""

_NOTHING = PatchedIds(np.empty(0, np.int16), np.zeros(1, np.int64))

QUARANTINED = PatchedIds(np.empty(0, np.int16), np.zeros(1, np.int64))
"""What `ReadPick` returns for a record batch that cannot be used, and is to be passed over."""
_PASSED_OVER = -1


@dataclass
class RowStream:
    """Rows from consecutive record batches; half or more of what it holds is still to be delivered."""

    read_pick: ReadPick
    shape: RowShape
    datasets: int = 0
    """Data sets whose ids are counted apart."""
    dataset_of: Callable[[int], int] | None = None
    """The data set of the stream's n-th record batch; where they are counted."""

    def __post_init__(self):
        self._held = _NOTHING  # ids and patches, of which the first `_delivered` ids went into rows
        self._delivered = 0
        # Ids of each record batch in `_held`, or _PASSED_OVER; the first may be held in part.
        self._sizes: deque[int] = deque()
        self._pick = self._ids_taken = self._rows = self._quarantined = 0
        self._ids_of = np.zeros(self.datasets, np.int64)
        self._ended = False

    def position(self) -> np.ndarray:
        """Return where the next row begins: int64 [4 + datasets], see POSITION_FIELDS."""
        place = np.array([self._pick, self._ids_taken, self._rows, self._quarantined], dtype=np.int64)
        return np.concatenate([place, self._ids_of])

    def seek(self, position: np.ndarray) -> None:
        """Go to a position that `position` returned, of this or of an equal stream."""
        self._pick, taken, self._rows, self._quarantined = (int(x) for x in position[: len(POSITION_FIELDS)])
        self._ids_taken = self._delivered = 0
        self._held = _NOTHING
        self._sizes.clear()
        self._ended = False
        if taken:
            self._read_ahead()
            # Damaged since: what is left of it is passed over.
            self._take(taken if self._sizes[0] != _PASSED_OVER else 0)
        self._ids_of = position[len(POSITION_FIELDS) :].copy()

    def next_row(self) -> Row | None:
        """Return the next row; None if the record batches have ended and all their ids are delivered."""
        enough = self.shape.n_bytes + 1
        while len(self._held.ids) - self._delivered < enough and not self._ended:
            self._read_ahead()
        if len(self._held.ids) == self._delivered:
            return None
        row = pack_row(_between(self._held, self._delivered, self._delivered + enough), self.shape)
        self._take(row.n_ids)
        self._rows += 1
        return row

    def _read_ahead(self) -> None:
        more = self.read_pick(self._pick + len(self._sizes))
        if more is None:
            self._ended = True
            return
        if self._delivered == len(self._held.ids):
            self._held = more
        else:
            ids, cuts = _between(self._held, self._delivered, len(self._held.ids))
            self._held = PatchedIds(np.concatenate([ids, more.ids]), np.concatenate([cuts, more.cuts[1:] + len(ids)]))
        self._delivered = 0
        self._sizes.append(_PASSED_OVER if more is QUARANTINED else len(more.ids))

    def _take(self, n_ids: int) -> None:
        self._delivered += n_ids
        if 2 * self._delivered > len(self._held.ids):
            ids, cuts = _between(self._held, self._delivered, len(self._held.ids))
            self._held, self._delivered = PatchedIds(ids.copy(), cuts), 0
        while self._sizes:
            size = max(self._sizes[0], 0)
            here = min(n_ids, size - self._ids_taken)
            if self.dataset_of is not None:
                self._ids_of[self.dataset_of(self._pick)] += here
            self._ids_taken += here
            n_ids -= here
            if self._ids_taken < size:
                break
            self._quarantined += self._sizes.popleft() == _PASSED_OVER
            self._ids_taken = 0
            self._pick += 1


def _between(source: PatchedIds, begin: int, end: int) -> PatchedIds:
    """Return the ids from `begin` to `end`, or to their end; a patch that a border cuts keeps what is inside."""
    ids, cuts = source
    ids = ids[begin:end]
    first, last = np.searchsorted(cuts, [begin + 1, begin + len(ids)])
    # A row may end where it cut its own first patch; then the rest of that patch begins the next row.
    return PatchedIds(ids, np.concatenate([[0], cuts[first:last] - begin, [len(ids)]]))

"""Several data sets as one: which of them a stream reads next, and all their record batches under one numbering.

Picks are dealt to data sets by largest deficit: the g-th pick of the run goes to the data set that is furthest behind
its share. No chance is involved, and after any number of picks a data set is within two of its share. With shares 1/2,
1/3, 1/6:

    picks      0 1 2 3 4 5 6 7 8 ...
    data set   a b a c b a a b a ...          a's 0th, b's 0th, a's 1st, c's 0th, b's 1st, ...

The order repeats after a prime number of picks, so that it can be asked for any pick at once, and so that no number of
streams shows each stream one data set alone. A data set's k-th pick is the k-th record batch of its own endless order
(`order.py`); small ones come round more often.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from blt_titan.data.rows.order import permute
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.shards import RecordBatch, RecordBatchInfo, ShardSet

PERIOD = 10_007
"""Picks after which the order of data sets repeats: prime, and large against the smallest share."""
SMALLEST_SHARE = 0.0002


class ShardSets:
    """The record batches of several data sets, numbered one set after the other; reads as `ShardSet` does."""

    def __init__(self, sets: Sequence[ShardSet]):
        assert sets
        self.sets = tuple(sets)
        self._first = [0, *accumulate(len(shards) for shards in sets)]

    def __len__(self) -> int:
        return self._first[-1]

    def __iter__(self) -> Iterator[RecordBatch]:
        return map(self.read, range(len(self)))

    @property
    def documents(self) -> int:
        """Documents of all sets."""
        return sum(shards.documents for shards in self.sets)

    @property
    def text_bytes(self) -> int:
        """Bytes of all sets."""
        return sum(shards.text_bytes for shards in self.sets)

    @property
    def is_remote(self) -> bool:
        """Tell whether any of them is in an object store."""
        return any(shards.is_remote for shards in self.sets)

    @property
    def fingerprint(self) -> str:
        """Identify the data, for checkpoints: of one set its own."""
        if len(self.sets) == 1:
            return self.sets[0].fingerprint
        return hashlib.sha256("\n".join(shards.fingerprint for shards in self.sets).encode()).hexdigest()

    def record_batch_info(self, i: int) -> RecordBatchInfo:
        """Say where record batch i of all lies and what it holds."""
        number, i = self._find(i)
        return self.sets[number].record_batch_info(i)

    def place_of(self, i: int) -> str:
        """Name record batch i of all by its file, which is not opened for it."""
        number, i = self._find(i)
        return self.sets[number].place_of(i)

    def read(self, i: int) -> RecordBatch:
        """Check and read record batch i of all; raises DataError as `ShardSet.read`."""
        number, i = self._find(i)
        return self.sets[number].read(i)

    def _find(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"record batch {i} is outside 0..{len(self) - 1}")
        number = bisect_right(self._first, i) - 1
        return number, i - self._first[number]


@dataclass(frozen=True)
class MixtureOrder:
    """Which record batch of several data sets a stream reads as its `pick`-th; `StreamOrder` is the order of one."""

    sizes: tuple[int, ...]
    """Record batches of each data set."""
    shares: tuple[float, ...]
    """Shares of the picks, positive, summing to 1."""
    streams: int
    """S, streams of the run."""
    seed: int
    """Another seed, another order."""

    @property
    def record_batches(self) -> int:
        """Record batches of all data sets."""
        return sum(self.sizes)

    def dataset(self, stream: int, pick: int) -> int:
        """Return the number of the data set."""
        return int(self._dealt[(pick * self.streams + stream) % PERIOD])

    def record_batch(self, stream: int, pick: int) -> int:
        """Return the record batch, counted over all data sets as `ShardSets` does."""
        dataset = self.dataset(stream, pick)
        epoch, place = divmod(self._pick_of_dataset(stream, pick), self.sizes[dataset])
        # Each data set's order is its own: the same text in two of them is not read in step.
        key = ((self.seed * len(self.sizes) + dataset) << 32) + epoch
        return sum(self.sizes[:dataset]) + permute(place, self.sizes[dataset], key)

    def epoch(self, stream: int, pick: int) -> int:
        """Return the epoch of its own data set that the pick belongs to."""
        return self._pick_of_dataset(stream, pick) // self.sizes[self.dataset(stream, pick)]

    def _pick_of_dataset(self, stream: int, pick: int) -> int:
        rounds, place = divmod(pick * self.streams + stream, PERIOD)
        dataset = self._dealt[place]
        return rounds * int((self._dealt == dataset).sum()) + int(self._before[place])

    @cached_property
    def _dealt(self) -> np.ndarray:
        """Data set of each pick of a period, int64 [PERIOD]."""
        shares = np.array(self.shares)
        counts = np.zeros(len(shares))
        dealt = np.empty(PERIOD, np.int64)
        for place in range(PERIOD):
            dealt[place] = np.argmax(shares * (place + 1) - counts)
            counts[dealt[place]] += 1
        return dealt

    @cached_property
    def _before(self) -> np.ndarray:
        """How many picks of the same data set come before in the period, int64 [PERIOD]."""
        before = np.empty(PERIOD, np.int64)
        for dataset in range(len(self.sizes)):
            of_it = self._dealt == dataset
            before[of_it] = np.arange(of_it.sum())
        return before


def mixture_order(sets: ShardSets, weights: Sequence[float], *, streams: int, seed: int) -> MixtureOrder:
    """Return the order in which data sets give their weights' shares of *bytes*.

    A pick of a data set whose record batches hold more text counts for more, so shares of picks are weights over mean
    bytes.

    Args:
        sets: the data sets.
        weights: of each, positive; need not sum to 1.
        streams: streams of the run.
        seed: of the order.

    Raises:
        DataError: a weight is not positive, or too small against the others.
    """
    assert len(weights) == len(sets.sets)
    if not (np.isfinite(weights).all() and min(weights) > 0):
        raise DataError(f"data.mixture: weights must be positive numbers, got {', '.join(map(str, weights))}")
    picks = np.array([weight * len(s) / s.text_bytes for weight, s in zip(weights, sets.sets, strict=True)])
    shares = picks / picks.sum()
    if shares.min() < SMALLEST_SHARE:
        raise DataError(
            f"data.mixture: a weight asks for {shares.min():.2g} of the record batches, the least is {SMALLEST_SHARE}; "
            "raise it, or leave the data set out"
        )
    return MixtureOrder(tuple(len(s) for s in sets.sets), tuple(shares.tolist()), streams, seed)


def dataset_names(paths: Sequence[str]) -> list[str]:
    """Return short names for metrics: the directories' own, or whole paths where two are the same."""
    names = [Path(path).name for path in paths]
    return [name if names.count(name) == 1 else path for name, path in zip(names, paths, strict=True)]

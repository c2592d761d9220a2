"""The order of the data as a function: a keyed permutation of record batches, in O(1) memory.

`permute(i, size, key)` is a bijection of 0..size-1, so that an epoch needs no shuffled list and a run resumes at any
position at once. It is a Feistel network on the smallest even number of bits that holds `size`; a value that lands
outside walks on until it lands inside (cycle walking), at most 4 steps on average.

>>> [permute(i, 7, key=0) for i in range(7)]
[2, 5, 1, 4, 3, 6, 0]
>>> sorted(permute(i, 1000, key=3) for i in range(1000)) == list(range(1000))
True
"""

from dataclasses import dataclass

_ROUNDS = 6
_MASK64 = (1 << 64) - 1


def permute(index: int, size: int, key: int) -> int:
    """Return where the keyed permutation of 0..size-1 sends `index`.

    Args:
        index: 0 <= index < size.
        size: at least 1.
        key: any non-negative integer; another key, another permutation.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for round_ in range(_ROUNDS):
            left, right = right, left ^ (_mix64(right ^ _mix64(key * _ROUNDS + round_)) & mask)
        index = (left << half_bits) | right
        if index < size:
            return index


def _mix64(value: int) -> int:
    """Scramble into 64 bits (the finaliser of splitmix64); of a longer value all bits count."""
    if value > _MASK64:
        value = (value & _MASK64) ^ _mix64(value >> 64)
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


@dataclass(frozen=True)
class StreamOrder:
    """Which record batch a stream reads as its `pick`-th.

    The endless sequence is epoch 0's permutation of the record batches, then epoch 1's, and so on; its g-th record
    batch goes to stream g mod `streams`.
    """

    record_batches: int
    """R, record batches in the data; at least `streams`, so that no stream reads one twice in an epoch."""
    streams: int
    """S, streams of the run."""
    seed: int
    """Another seed, another order."""

    def record_batch(self, stream: int, pick: int) -> int:
        """Return the record batch, 0..R-1."""
        epoch, place = divmod(pick * self.streams + stream, self.record_batches)
        return permute(place, self.record_batches, key=(self.seed << 32) + epoch)

    def epoch(self, stream: int, pick: int) -> int:
        """Return the epoch that the stream's `pick`-th record batch belongs to."""
        return (pick * self.streams + stream) // self.record_batches

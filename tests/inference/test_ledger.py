"""Patches of a generation, against counting them anew from where patches begin."""

import numpy as np
import pytest

from blt_titan.inference.ledger import PatchLedger
from blt_titan.patching import starts_to_lengths


class Twin:
    """Keeps nothing but where patches begin, the position after the last byte included."""

    def __init__(self, starts: list[np.ndarray]):
        self.starts = [row.tolist() for row in starts]

    def add_byte(self, ends: np.ndarray) -> list[int]:
        """Return the bytes of each row's newest byte's patch up to that byte."""
        patch_bytes = []
        for row, end in zip(self.starts, ends, strict=True):
            begin = max(i for i, start in enumerate(row) if start)
            patch_bytes.append(len(row) - begin)
            row.append(bool(end))
        return patch_bytes

    def state(self) -> list[tuple[int, int, int, list[int]]]:
        """Positions, closed patches, bytes of the open patch, lengths with the next position."""
        rows = []
        for row in self.starts:
            n_bytes = len(row) - 1
            begins = [i for i, start in enumerate(row) if start]
            closed = sum(end <= n_bytes for end in begins[1:])
            rows.append((n_bytes, closed, n_bytes - begins[-1], starts_to_lengths(np.array(row)).tolist()))
        return rows


def state(ledger: PatchLedger) -> list[tuple[int, int, int, list[int]]]:
    counts = zip(ledger.positions.tolist(), ledger.closed.tolist(), ledger.open_bytes.tolist(), strict=True)
    return [(*row, ledger.lengths(number)) for number, row in enumerate(counts)]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_it_counts_as_its_twin(share, seed):
    rng = np.random.default_rng(seed)
    starts = [rng.random(n + 1) < share for n in (1, 2, 7, 40)]
    for row in starts:
        row[:2] = True  # BOS is a patch
    ledger, twin = PatchLedger(starts), Twin(starts)
    assert state(ledger) == twin.state()
    for _ in range(30):
        ends = rng.random(len(starts)) < share
        assert ledger.add_byte(ends).tolist() == twin.add_byte(ends)
        assert state(ledger) == twin.state()


def test_the_example_of_the_module():
    starts = np.array([True, True, False, False, True, False, False])
    ledger = PatchLedger([starts])
    assert state(ledger) == [(6, 2, 2, [1, 3, 3])]
    assert ledger.add_byte(np.array([True])).tolist() == [3]
    assert state(ledger) == [(7, 3, 0, [1, 3, 3, 1])]

"""Rows to measure: one document each, patches of a mean length drawn with a seed, patch slots as in training.

    Work(rows=1, n_bytes=18)      mean patch 4.5: the patch of BOS, and 4 patches of the 18 bytes to be predicted
    patch_lengths   1 6 2 7 3     sum S + 1, as `transformers` takes them

A training row has more patch slots than patches, because the packer fills whichever of bytes and patches runs out
first: an eighth more here. Peers that take lengths get no padding.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from blt_titan.batch import Batch
from blt_titan.byte_vocab import BOS_ID, BYTE_OFFSET
from blt_titan.model.patch_lengths import layout_from_patch_lengths

MEAN_PATCH_BYTES = 4.5
SLOTS_OVER_PATCHES = 9 / 8
"""As segments of 2,048 bytes and 512 patches have at 4.5 bytes a patch."""


@dataclass(frozen=True)
class Work:
    """What one step is made of: rows that are full of real bytes."""

    rows: int
    n_bytes: int
    """S of a row."""
    patch_bytes: float = MEAN_PATCH_BYTES
    """Mean length of a patch."""

    @property
    def patches(self) -> int:
        """Patches of a row, the one of BOS included."""
        return 1 + max(1, round(self.n_bytes / self.patch_bytes))

    @property
    def patch_slots(self) -> int:
        """Patch slots P of a row, at least its patches: a multiple of 16."""
        return 16 * math.ceil(max(self.patches, self.n_bytes / self.patch_bytes * SLOTS_OVER_PATCHES) / 16)

    @property
    def total_bytes(self) -> int:
        """Bytes of a step, all of which have a target."""
        return self.rows * self.n_bytes

    def __str__(self) -> str:
        return f"{self.rows} x {self.n_bytes:,}"


@dataclass(frozen=True)
class Drawn:
    """The rows of a work, as ours and as `transformers` takes them."""

    batch: Batch
    """int32, as the loader makes them; the layout has `Work.patch_slots` slots."""
    patch_lengths_BP: torch.Tensor
    """int64, each row `[1, ...]` with sum S + 1, no padding."""


def draw_rows(work: Work, *, seed: int = 0) -> Drawn:
    """Draw random bytes and the lengths of their patches.

    Every row has the same number of patches, cut at places drawn without replacement; so their lengths are spread as a
    geometric distribution is, and their mean is met exactly.
    """
    rng = np.random.default_rng(seed)
    B, S, P = work.rows, work.n_bytes, work.patches
    all_ids = torch.from_numpy(rng.integers(BYTE_OFFSET, BYTE_OFFSET + 256, (B, S + 1), dtype=np.int32))
    all_ids[:, 0] = BOS_ID
    lengths_BP = np.ones((B, P), np.int64)
    for row in lengths_BP:
        cuts = np.sort(rng.choice(S - 1, P - 2, replace=False)) + 1
        row[1:] = np.diff(np.concatenate([[0], cuts, [S]]))
    patch_lengths_BP = torch.from_numpy(lengths_BP)
    padded = torch.nn.functional.pad(patch_lengths_BP, (0, work.patch_slots - P))
    ids_BS = all_ids[:, :-1].contiguous()
    layout = layout_from_patch_lengths(ids_BS, padded).map(lambda tensor: tensor.int())
    return Drawn(Batch(ids_BS, layout, all_ids[:, 1:].contiguous()), patch_lengths_BP)

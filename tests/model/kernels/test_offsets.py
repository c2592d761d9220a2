"""Runs of bytes: where they begin, and back to the patch of each byte."""

import pytest
import torch

from blt_titan.model.kernels.offsets import first_of_patches, patch_of_bytes
from tests.helpers.byte_runs import LEADING, LONG, ODD, patches_of


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("lengths", "slots", "leading"),
    [(ODD, 40, LEADING), (ODD, 31, None), (LONG, 546, None)],
    ids=["led", "odd", "long"],
)
def test_runs_equal_counting(lengths, slots, leading, dtype):
    patch_BS = patches_of(lengths, slots, leading).to(dtype)
    P = len(lengths[0])
    first_BP1 = first_of_patches(patch_BS, P)
    assert first_BP1.dtype == torch.int32
    assert first_BP1.shape == (len(lengths), P + 1)
    for b, row in enumerate(lengths):
        assert first_BP1[b].diff().tolist() == row
        for p in range(P):
            run = patch_BS[b, first_BP1[b, p] : first_BP1[b, p + 1]]
            assert (run == p).all()
    held_BS, is_held_BS = patch_of_bytes(first_BP1, slots)
    assert torch.equal(is_held_BS, patch_BS >= 0)
    assert torch.equal(held_BS, patch_BS.clamp(min=0).long())

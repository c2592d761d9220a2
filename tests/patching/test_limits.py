"""The bound on patches, and masks of starts against lengths."""

import numpy as np
import pytest
import torch

from blt_titan.patching import lengths_to_starts, limit_patch_bytes, starts_to_lengths

both_kinds = pytest.mark.parametrize("to_kind", [np.asarray, torch.tensor], ids=["numpy", "torch"])


def serial_limit(starts, max_patch_bytes):
    """Walk along: start where the rule does, and where the current patch is full."""
    limited, held = [], 0
    for by_rule in starts:
        begins = by_rule or held == max_patch_bytes
        held = 1 if begins else held + 1
        limited.append(begins)
    return limited


def random_starts(n, seed):
    starts = np.random.default_rng(seed).random(n) < 0.12
    starts[:2] = True
    return starts


@both_kinds
@pytest.mark.parametrize("max_patch_bytes", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("n", [1, 2, 17, 500])
def test_limit_equals_the_serial_twin(to_kind, max_patch_bytes, n):
    starts = random_starts(n, seed=n)
    limited = limit_patch_bytes(to_kind(starts), max_patch_bytes)
    assert limited.tolist() == serial_limit(starts.tolist(), max_patch_bytes)
    assert int(starts_to_lengths(limited).max()) <= max_patch_bytes


@both_kinds
def test_no_limit_leaves_the_mask_as_it_is(to_kind):
    starts = to_kind(random_starts(30, seed=0))
    assert limit_patch_bytes(starts, None) is starts


@both_kinds
def test_a_limit_below_one_is_refused(to_kind):
    with pytest.raises(ValueError, match="max_patch_bytes=0: must be at least 1, or None"):
        limit_patch_bytes(to_kind([True]), 0)


@both_kinds
@pytest.mark.parametrize("n", [0, 1, 2, 300])
def test_starts_and_lengths_go_back_and_forth(to_kind, n):
    starts = random_starts(n, seed=n)
    lengths = starts_to_lengths(to_kind(starts))
    assert lengths.dtype in (np.int64, torch.int64)
    assert int(lengths.sum()) == n
    assert lengths_to_starts(lengths).tolist() == starts.tolist()
    padded = to_kind([*lengths.tolist(), 0, 0, 0]) if n else lengths
    assert lengths_to_starts(padded).tolist() == starts.tolist()


@both_kinds
@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([False, True], "position 0 must start"),
        ([1, 0], "1-D bool mask, got .*int64"),
        ([[True]], r"shape \(1, 1\)"),
    ],
)
def test_masks_are_checked(to_kind, starts, message):
    with pytest.raises(ValueError, match=message):
        starts_to_lengths(to_kind(starts))


@both_kinds
@pytest.mark.parametrize("lengths", [[1, -1], [1, 0, 2], [[1]]])
def test_lengths_are_checked(to_kind, lengths):
    with pytest.raises(ValueError, match="lengths: must be"):
        lengths_to_starts(to_kind(lengths))

"""Calibration against counting patches document by document, and budgets against filling segments one by one."""

import numpy as np
import pytest

from blt_titan.data.store.errors import DataError
from blt_titan.patching import entropy_patch_starts, patch_lengths
from blt_titan.patching.rounding import UINT8_EDGES_NATS, from_storage, to_storage
from blt_titan.scoring.calibration import (
    SEGMENT_PATCHES,
    Sample,
    best_budgets,
    calibrate,
    histogram_text,
    quantization_disagreement,
)

MEAN_RTOL = 0.005
MAX_PATCH_BYTES = 64


def sample_of(storage="float16", n_documents=300) -> Sample:
    rng = np.random.default_rng(0)
    entropies, begins = [], []
    for _ in range(n_documents):
        h = rng.gamma(1.2, 0.8, int(rng.integers(2, 800))).astype(np.float32)
        # Entropies hang together, as those of text do.
        h[1:] = 0.6 * h[1:] + 0.4 * h[:-1]
        entropies.append(from_storage(to_storage(h, storage)))
        entropies[-1][[0, -1]] = 0
        begins.append(np.arange(len(h)) == 0)
    return Sample(np.concatenate(entropies), np.concatenate(begins), storage)


def documents(sample: Sample) -> list[np.ndarray]:
    return np.split(sample.entropies_nats, np.flatnonzero(sample.begins)[1:])


@pytest.mark.parametrize("target", [2.5, 4.5, 8.0])
@pytest.mark.parametrize("rule", ["global", "monotonic", "add"])
def test_the_mean_is_the_wanted_one_and_is_what_documents_alone_give(rule, target):
    sample = sample_of()
    add = 0.0 if rule == "add" else None
    found = calibrate(sample, target, rule=rule, threshold_add=add, max_patch_bytes=MAX_PATCH_BYTES)
    alone = np.concatenate(
        [
            patch_lengths(h, found.threshold, rule=rule, threshold_add=add, max_patch_bytes=MAX_PATCH_BYTES)
            for h in documents(sample)
        ]
    )
    np.testing.assert_array_equal(found.lengths, alone)
    assert abs(alone.mean() - target) <= MEAN_RTOL * target


def test_a_global_threshold_lies_where_rounding_moves_no_boundary():
    found = calibrate(sample_of(), 4.5)
    assert found.threshold is not None
    nearest = np.float16(found.threshold)
    below, above = (float(np.nextafter(nearest, np.float16(end))) for end in (-np.inf, np.inf))
    midpoints = [(below + float(nearest)) / 2, (float(nearest) + above) / 2]
    assert found.threshold in midpoints
    exact = np.random.default_rng(1).uniform(found.threshold - 0.01, found.threshold + 0.01, 100_000)
    np.testing.assert_array_equal(from_storage(exact.astype(np.float16)) > found.threshold, exact > found.threshold)


def test_of_codes_a_threshold_is_an_edge():
    found = calibrate(sample_of("uint8"), 4.5)
    assert np.float32(found.threshold) in UINT8_EDGES_NATS


def test_what_uint8_changes_is_counted():
    sample = sample_of()
    exact = np.random.default_rng(1).normal(sample.entropies_nats, 1e-4).clip(0).astype(np.float32)
    found = quantization_disagreement(exact, sample.begins, targets=(3, 4.5, 1000))
    assert [one.target_patch_bytes for one in found] == [3, 4.5]
    for one in found:
        assert abs(one.uint8_threshold / one.float16_threshold - 1) < 0.036
        by_code = entropy_patch_starts(exact, threshold=one.uint8_threshold, begins=sample.begins)
        by_value = entropy_patch_starts(exact, threshold=one.float16_threshold, begins=sample.begins)
        # Both thresholds lie where rounding moves nothing, so the exact values give the same share.
        assert one.share == pytest.approx((by_code != by_value).sum() / by_value.sum(), abs=1e-3)
        assert 0 < one.share < 0.05


def test_top_k_cuts_to_the_size():
    assert abs(calibrate(sample_of(), 4, rule="topk").mean_patch_bytes - 4) < 0.1


def test_patches_that_the_limit_cut_are_counted():
    sample = sample_of()
    found = calibrate(sample, 5.0, max_patch_bytes=8)
    unlimited = np.concatenate([patch_lengths(h, found.threshold) for h in documents(sample)])
    assert found.cut_by_limit == ((unlimited - 1) // 8).sum() > 0
    assert found.lengths.max() <= 8


def test_a_mean_out_of_reach_says_what_can_be_had():
    with pytest.raises(
        DataError, match=r"patches of 30 bytes cannot be had.*max_patch_bytes 8: thresholds give 1\.\d+ to"
    ):
        calibrate(sample_of(), 30.0, max_patch_bytes=8)


def fill(lengths: list[int], patches: int, n_bytes: int) -> tuple[int, int, int]:
    """Segments that were filled, and the patches and bytes in them."""
    segments = in_segments = bytes_in_segments = held = held_bytes = 0
    for length in lengths:
        if held == patches or held_bytes + length > n_bytes:
            segments, in_segments, bytes_in_segments = segments + 1, in_segments + held, bytes_in_segments + held_bytes
            held = held_bytes = 0
        held, held_bytes = held + 1, held_bytes + length
    return segments, in_segments, bytes_in_segments


def test_budgets_are_counted_and_are_the_best():
    lengths = calibrate(sample_of(), 4.5).lengths
    budgets = best_budgets(lengths, cost_of_byte=2.0, cost_of_patch=30.0, longest_patch=512)
    assert [budget.patches for budget in budgets] == list(SEGMENT_PATCHES)
    for budget in budgets:
        shares = []
        for n_bytes in (budget.bytes - 64, budget.bytes, budget.bytes + 64):
            segments, used_patches, used_bytes = fill(lengths.tolist(), budget.patches, n_bytes)
            used, slots = 2.0 * used_bytes + 30.0 * used_patches, segments * (2.0 * n_bytes + 30.0 * budget.patches)
            shares.append(1 - used / slots)
        assert abs(budget.padded_compute - shares[1]) < 1e-9
        assert shares[1] <= min(shares[0], shares[2]) + 0.01
    padded = [budget.padded_compute for budget in budgets]
    assert padded[0] > padded[2], "longer segments waste less"


def test_the_histogram_has_every_patch():
    text = histogram_text(np.array([1, 1, 2, 50]), rows=4)
    assert [line.split()[:2] for line in text.splitlines()] == [
        ["1", "50.00%"],
        ["2", "25.00%"],
        ["3", "0.00%"],
        ["4+", "25.00%"],
    ]

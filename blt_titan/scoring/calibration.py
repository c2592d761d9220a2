"""Choose a threshold for a wanted patch size, and the budgets of a segment that waste least.

In: a sample of a data set's entropies. Out: the threshold at which patches have the wanted mean, the distribution of
their lengths, and for several segment sizes the byte budget with the smallest share of compute on padding.

A threshold is put where rounding moves no boundary: amid two neighbouring float16 values, or on an edge of the uint8
codes, whichever the sidecar stores (the rules that compare differences take any number).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import numpy as np

from blt_titan.byte_vocab import BOS_ID
from blt_titan.data.rows.order import permute
from blt_titan.data.rows.packing import frame_documents
from blt_titan.data.store.errors import DataError
from blt_titan.data.store.shards import ShardSet
from blt_titan.data.store.sidecars import EntropySidecar
from blt_titan.patching import EntropyRule, entropy_patch_starts, starts_to_lengths
from blt_titan.patching.rounding import UINT8_EDGES_NATS, Storage, from_storage, to_storage

SEGMENT_PATCHES = (256, 512, 1024, 2048, 4096)
_BUDGETS = np.arange(0.80, 1.61, 0.02)  # of the mean bytes of a segment's patches
_BUDGET_STEP = 64
_SIMULATED_PATCHES = 500_000


class Sample(NamedTuple):
    """Record batches of a data set, side by side."""

    entropies_nats: np.ndarray
    """H after each id, fp32 [N]; 0 at BOS and EOS."""
    begins: np.ndarray
    """Where documents begin, bool [N]."""
    storage: Storage


@dataclass(frozen=True)
class Calibration:
    """A threshold and what it does to the sample."""

    rule: EntropyRule
    threshold: float | None
    threshold_add: float | None
    lengths: np.ndarray
    """Bytes of every patch, int64 [P]."""
    cut_by_limit: int
    """Patches that begin because the one before was full."""

    @property
    def mean_patch_bytes(self) -> float:
        """Ids in a patch, BOS and EOS counted, as the metric of a run counts them."""
        return float(self.lengths.mean())

    def distribution(self) -> dict[str, Any]:
        """Return rule, threshold, mean, `counts`: how many patches have 1, 2, ... bytes, and the share that was cut."""
        return {
            "rule": self.rule,
            "threshold": self.threshold,
            "mean": round(self.mean_patch_bytes, 4),
            "cut_share": self.cut_by_limit / len(self.lengths),
            "counts": np.bincount(self.lengths)[1:].tolist(),
        }


class SegmentBudget(NamedTuple):
    """Slots of a segment, and what share of them and of the compute is padding."""

    patches: int
    bytes: int
    padded_patches: float
    padded_bytes: float
    padded_compute: float


def read_sample(shards: ShardSet, sidecar: EntropySidecar, *, sample_bytes: int, seed: int = 0) -> Sample:
    """Read record batches in random order until `sample_bytes` of text, or all."""
    entropies, begins, total = [], [], 0
    for i in range(len(shards)):
        batch = shards.read(permute(i, len(shards), key=seed))
        ids, is_byte = frame_documents(batch.text, batch.offsets)
        h = np.zeros(len(ids), np.float32)
        h[is_byte] = sidecar(batch)
        entropies.append(h)
        begins.append(ids == BOS_ID)
        total += len(batch.text)
        if total >= sample_bytes:
            break
    return Sample(np.concatenate(entropies), np.concatenate(begins), sidecar.settings.storage)


def calibrate(
    sample: Sample,
    target_patch_bytes: float,
    *,
    rule: EntropyRule = "global",
    threshold_add: float | None = None,
    max_patch_bytes: int = 512,
) -> Calibration:
    """Find the threshold whose mean patch length is nearest to the target.

    Args:
        sample: of the data.
        target_patch_bytes: wanted mean, above 1.
        rule: `global`, `monotonic`, `add`; `topk` needs no threshold and cuts each document to the size.
        threshold_add: of `add`, given; the threshold is sought.
        max_patch_bytes: longer patches are split.

    Raises:
        DataError: no threshold gives such a mean; says what can be reached.
    """
    if rule == "topk":
        return _calibrated(sample, rule, None, None, max_patch_bytes, round(target_patch_bytes))
    candidates = _candidates(sample, rule)

    def mean_at(place: int) -> float:
        options = {"threshold": float(candidates[place]), "threshold_add": threshold_add}
        starts = entropy_patch_starts(
            sample.entropies_nats, rule=rule, begins=sample.begins, max_patch_bytes=max_patch_bytes, **options
        )
        return len(starts) / int(starts.sum())

    # The mean grows with the threshold.
    low, high = 0, len(candidates) - 1
    smallest, largest = mean_at(low), mean_at(high)
    if not smallest <= target_patch_bytes <= largest:
        raise DataError(
            f"patches of {target_patch_bytes:g} bytes cannot be had with rule {rule!r} and max_patch_bytes "
            f"{max_patch_bytes}: thresholds give {smallest:.2f} to {largest:.2f}"
        )
    while high - low > 1:
        middle = (low + high) // 2
        if mean_at(middle) < target_patch_bytes:
            low = middle
        else:
            high = middle
    nearest = min((low, high), key=lambda place: abs(mean_at(place) - target_patch_bytes))
    return _calibrated(sample, rule, float(candidates[nearest]), threshold_add, max_patch_bytes, None)


class Disagreement(NamedTuple):
    """How uint8 codes and float16 values cut the same text, each at its own threshold for a wanted patch size."""

    target_patch_bytes: float
    float16_threshold: float
    uint8_threshold: float
    share: float
    """Positions where only one of them begins a patch, over patches."""


def quantization_disagreement(
    entropies_nats: np.ndarray,
    begins: np.ndarray,
    *,
    targets: Sequence[float] = (4, 4.5, 6, 8),
    max_patch_bytes: int = 512,
) -> list[Disagreement]:
    """Compare the boundaries of rule `global` from uint8 codes with those from float16.

    Args:
        entropies_nats: as the model gave them, fp32 [N]; 0 at BOS and EOS.
        begins: where documents begin, bool [N].
        targets: wanted mean patches, in bytes; one that no threshold gives is left out.
        max_patch_bytes: longer patches are split.
    """
    found = []
    for target in targets:
        thresholds, starts = [], []
        for storage in get_args(Storage):
            sample = Sample(from_storage(to_storage(entropies_nats, storage)), begins, storage)
            try:
                threshold = calibrate(sample, target, max_patch_bytes=max_patch_bytes).threshold
            except DataError:
                break
            thresholds.append(threshold)
            starts.append(
                entropy_patch_starts(
                    sample.entropies_nats, threshold=threshold, begins=begins, max_patch_bytes=max_patch_bytes
                )
            )
        else:
            share = float((starts[0] != starts[1]).sum() / starts[0].sum())
            found.append(Disagreement(target, thresholds[0], thresholds[1], share))
    return found


def best_budgets(
    lengths: np.ndarray,
    *,
    cost_of_byte: float,
    cost_of_patch: float,
    longest_patch: int,
    segment_patches: Sequence[int] = SEGMENT_PATCHES,
) -> list[SegmentBudget]:
    """Find for each segment size the bytes that waste least compute, by packing the patches as rows are packed.

    Args:
        lengths: patches in their order, integer [P].
        cost_of_byte: FLOPs that a byte slot costs, in any unit.
        cost_of_patch: FLOPs that a patch slot costs, in the same unit.
        longest_patch: a segment must hold it.
        segment_patches: the sizes, in patches, from 2; one that the sample does not fill is left out.

    Raises:
        ValueError: a size is smaller.
    """
    if min(segment_patches, default=2) < 2:
        raise ValueError(f"segment_patches = {min(segment_patches)}: must be at least 2")
    lengths = lengths[:_SIMULATED_PATCHES]
    cuts = np.concatenate([[0], np.cumsum(lengths)])
    budgets = []
    for patches in segment_patches:
        wanted = _BUDGETS * patches * lengths.mean()
        tried = {max(-(-int(size) // _BUDGET_STEP) * _BUDGET_STEP, longest_patch) for size in wanted}
        of_size = (_pack(cuts, patches, size, cost_of_byte, cost_of_patch) for size in sorted(tried))
        if fitting := [budget for budget in of_size if budget is not None]:
            budgets.append(min(fitting, key=lambda budget: budget.padded_compute))
    return budgets


def _pack(
    cuts: np.ndarray, patches: int, n_bytes: int, cost_of_byte: float, cost_of_patch: float
) -> SegmentBudget | None:
    """Fill segments; the last, which the sample leaves unfilled, does not count. None if it is the only one."""
    place = segments = filled = 0
    while place < len(cuts) - 1:
        filled = place
        place = min(int(cuts.searchsorted(cuts[place] + n_bytes, side="right")) - 1, place + patches)
        segments += 1
    segments -= 1
    if segments < 1:
        return None
    byte_slots, patch_slots = segments * n_bytes, segments * patches
    used = cuts[filled] * cost_of_byte + filled * cost_of_patch
    return SegmentBudget(
        patches,
        n_bytes,
        1 - filled / patch_slots,
        float(1 - cuts[filled] / byte_slots),
        float(1 - used / (byte_slots * cost_of_byte + patch_slots * cost_of_patch)),
    )


def _candidates(sample: Sample, rule: EntropyRule) -> np.ndarray:
    """Return thresholds to choose from, ascending, float64."""
    if rule != "global":
        return np.linspace(-8.0, 8.0, 160_001)
    if sample.storage == "uint8":
        return UINT8_EDGES_NATS.astype(np.float64)
    # The bit patterns of positive float16 values, read as integers, are in their order.
    values = np.arange(np.float16(8.0).view(np.uint16), dtype=np.uint16).view(np.float16).astype(np.float64)
    return (values[:-1] + values[1:]) / 2


def _calibrated(
    sample: Sample,
    rule: EntropyRule,
    threshold: float | None,
    threshold_add: float | None,
    max_patch_bytes: int,
    patch_size: int | None,
) -> Calibration:
    def mark(limit: int | None) -> np.ndarray:
        if rule == "topk":
            return np.concatenate(
                [
                    entropy_patch_starts(h, rule=rule, patch_size=patch_size, max_patch_bytes=limit)
                    for h in _documents(sample)
                ]
            )
        return entropy_patch_starts(
            sample.entropies_nats,
            rule=rule,
            threshold=threshold,
            threshold_add=threshold_add,
            begins=sample.begins,
            max_patch_bytes=limit,
        )

    starts, unlimited = mark(max_patch_bytes), mark(None)
    return Calibration(rule, threshold, threshold_add, starts_to_lengths(starts), int(starts.sum() - unlimited.sum()))


def _documents(sample: Sample) -> Iterator[np.ndarray]:
    yield from np.split(sample.entropies_nats, np.flatnonzero(sample.begins)[1:])


def histogram_text(lengths: np.ndarray, *, width: int = 50, rows: int = 24) -> str:
    """Draw the distribution of patch lengths with characters; the last row is all longer ones."""
    counts = np.bincount(np.minimum(lengths, rows), minlength=rows + 1)[1:]
    shares = counts / counts.sum()
    lines = []
    for length, share in enumerate(shares, start=1):
        label = f"{length:>3}" if length < rows else f"{length:>2}+"
        lines.append(f"{label} {share:6.2%} {'█' * round(share / shares.max() * width)}")
    return "\n".join(lines)

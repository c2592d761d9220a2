"""The layout of rows against a twin that is written slot by slot."""

import doctest

import numpy as np
import pytest
import torch

from blt_titan import layout as module
from blt_titan.batch import PADDING, ContextSlice
from blt_titan.layout import lay_out

Patch = tuple[int, int]
"""Bytes and document."""


def random_row(rng: np.random.Generator, slices: int, slots: int) -> list[list[Patch]]:
    """Patches of each slice: some slices are full, some empty; documents go on from slice to slice."""
    document, row = 0, []
    for _ in range(slices):
        patches = []
        for _ in range(int(rng.choice([0, slots, rng.integers(slots + 1)]))):
            document += int(rng.random() < 0.3)
            patches.append((int(rng.integers(1, 6)), document))
        row.append(patches)
    return row


def slot_by_slot(
    row: list[list[Patch]], slots: int, byte_slots: int, index: int, last_is_open: bool
) -> dict[str, list[int]]:
    """Lay out slice `index`: the byte at i reads the patch before the one that holds i + 1."""
    expected: dict[str, list[int]] = {name: [] for name in ("patch_pos_BP", "patch_doc_BP")}
    patches_before = 0
    for patches in row:
        for slot in range(slots):
            is_real = slot < len(patches)
            expected["patch_pos_BP"].append(patches_before + slot if is_real else 0)
            expected["patch_doc_BP"].append(patches[slot][1] if is_real else PADDING)
        patches_before += len(patches)

    holder = []
    for slot, (n_bytes, _) in enumerate(row[index]):
        for _ in range(n_bytes):
            holder.append(slot)
    position = 0
    for patches in row[:index]:
        for n_bytes, _ in patches:
            position += n_bytes
    for name in ("byte_pos_BS", "byte_doc_BS", "byte_patch_BS", "source_patch_BS"):
        expected[name] = []
    for i in range(byte_slots):
        if i >= len(holder):
            expected["byte_pos_BS"].append(0)
            for name in ("byte_doc_BS", "byte_patch_BS", "source_patch_BS"):
                expected[name].append(PADDING)
            continue
        expected["byte_pos_BS"].append(position + i)
        expected["byte_doc_BS"].append(row[index][holder[i]][1])
        expected["byte_patch_BS"].append(holder[i])
        after_last = holder[-1] if last_is_open else holder[-1] + 1
        of_target = holder[i + 1] if i + 1 < len(holder) else after_last
        if of_target > 0:
            expected["source_patch_BS"].append(of_target - 1)
        else:
            expected["source_patch_BS"].append(slots if index else PADDING)
    return expected


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("slices", [1, 2, 3, 8])
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_rows_are_those_of_the_slot_by_slot_twin(slices, slots, dtype):
    rng = np.random.default_rng(slices * 10 + slots)
    for _ in range(20):
        rows = [random_row(rng, slices, slots) for _ in range(int(rng.integers(1, 6)))]
        lengths, docs = np.zeros((2, len(rows), slices * slots), dtype)
        docs[:] = 77  # not read where there is no patch
        for number, row in enumerate(rows):
            for c, patches in enumerate(row):
                for slot, patch in enumerate(patches):
                    lengths[number, c * slots + slot], docs[number, c * slots + slot] = patch
        longest = max(sum(n_bytes for n_bytes, _ in patches) for row in rows for patches in row)
        byte_slots = longest + int(rng.integers(3))
        is_open = rng.random(len(rows)) < 0.5 if slices == 1 else np.zeros(len(rows), bool)
        for index in range(slices):
            layout = lay_out(
                lengths,
                docs,
                byte_slots,
                context_slice=ContextSlice(index, slices),
                last_is_open_B=is_open if slices == 1 else None,
            )
            assert layout.slice == ()
            for number, row in enumerate(rows):
                expected = slot_by_slot(row, slots, byte_slots, index, bool(is_open[number]))
                for name, field in zip(layout._fields, layout[:-1], strict=False):
                    assert field.dtype == torch.from_numpy(lengths).dtype
                    assert field.is_contiguous()
                    assert field[number].tolist() == expected[name], (name, index, number)


def test_doctests():
    assert doctest.testmod(module).failed == 0
    assert doctest.testmod(module).attempted > 0


def test_the_example_of_the_module():
    docs = np.zeros((1, 6), np.int64)
    whole = lay_out(np.array([[1, 3, 4, 2, 0, 0]]), docs, 12)
    halves = [lay_out(np.array([[1, 3, 0, 4, 2, 0]]), docs, 6, context_slice=ContextSlice(c, 2)) for c in (0, 1)]
    pad, before = PADDING, 3
    assert whole.byte_patch_BS.tolist() == [[0, 1, 1, 1, 2, 2, 2, 2, 3, 3, pad, pad]]
    assert whole.source_patch_BS.tolist() == [[0, 0, 0, 1, 1, 1, 1, 2, 2, 3, pad, pad]]
    assert [half.byte_patch_BS[0].tolist() for half in halves] == [[0, 1, 1, 1, pad, pad], [0, 0, 0, 0, 1, 1]]
    assert [half.source_patch_BS[0].tolist() for half in halves] == [
        [0, 0, 0, 1, pad, pad],
        [before, before, before, 0, 0, 1],
    ]
    assert [half.byte_pos_BS[0].tolist() for half in halves] == [[0, 1, 2, 3, 0, 0], [4, 5, 6, 7, 8, 9]]
    assert all(half.patch_pos_BP.tolist() == [[0, 1, 0, 2, 3, 0]] for half in halves)

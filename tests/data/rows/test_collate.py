"""Slices of rows against a byte-by-byte twin, and against the whole row."""

import numpy as np
import pytest
import torch

from blt_titan.batch import IGNORE_LABEL, LAYOUT_FIELDS, PADDING, SLICE_FIELDS, WHOLE_ROW, ContextSlice
from blt_titan.byte_vocab import BOS_ID, EOS_ID, document_ids
from blt_titan.data.rows.collate import collate_rows
from blt_titan.data.rows.packing import PatchedIds, Row, RowShape, empty_row, pack_row
from tests.helpers.layout_fields import fields_of

WINDOW = 12  # longer than some slices
REACH = 13


def random_rows(shape: RowShape, count: int, seed: int) -> list[Row]:
    """Rows with documents that cross segments, ragged patches, full ones and ones that end early."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        ids = np.concatenate([document_ids(rng.bytes(int(rng.integers(0, 20)))) for _ in range(12)])
        ids = ids[int(rng.integers(0, 10)) : int(rng.integers(11, 2 * shape.n_bytes))]
        special = np.isin(ids[:-1], (BOS_ID, EOS_ID))
        starts = np.concatenate([[True], special | (rng.random(len(ids) - 1) < 0.5)])
        starts[:: shape.segment_bytes] = True  # no patch is longer than a segment
        rows.append(pack_row(PatchedIds(ids, np.append(np.flatnonzero(starts), len(ids))), shape))
    return [*rows, empty_row(shape)]


def slice_byte_by_byte(row: Row, shape: RowShape, part: ContextSlice) -> dict[str, list[int]]:
    ids, cuts = row.ids.tolist(), row.cuts.tolist()
    patch_of = [p for p in range(len(cuts) - 1) for _ in range(cuts[p], cuts[p + 1])]
    doc_of, document = [], 0
    for i in range(row.n_ids):
        document += i > 0 and ids[i] == BOS_ID
        doc_of.append(document)
    segment_of_patch = [next(s for s, end in enumerate(row.segment_ends) if p < end) for p in range(len(cuts) - 1)]
    slice_of_patch = [segment * part.count // shape.segments for segment in segment_of_patch]
    S, slots = shape.n_bytes // part.count, shape.n_patches // part.count
    mine = [i for i in range(row.n_ids) if slice_of_patch[patch_of[i]] == part.index]
    own_patches = [p for p in range(len(cuts) - 1) if slice_of_patch[p] == part.index]
    first = own_patches[0] if own_patches else 0
    sources = [(patch_of[i + 1] if i + 1 < row.n_ids else len(cuts) - 1) - 1 for i in mine]

    def padded(values: list[int], size: int, fill: int) -> list[int]:
        return [*values, *[fill] * (size - len(values))]

    out = {
        "ids_BS": padded([ids[i] for i in mine], S, 0),
        "labels_BS": padded([IGNORE_LABEL if ids[i] == EOS_ID else ids[i + 1] for i in mine], S, IGNORE_LABEL),
        "byte_pos_BS": padded(mine, S, 0),
        "byte_doc_BS": padded([doc_of[i] for i in mine], S, PADDING),
        "byte_patch_BS": padded([patch_of[i] - first for i in mine], S, PADDING),
        "source_patch_BS": padded([slots if s < first else s - first for s in sources], S, PADDING),
        "patch_pos_BP": [],
        "patch_doc_BP": [],
    }
    for c in range(part.count):
        patches = [p for p in range(len(cuts) - 1) if slice_of_patch[p] == c]
        out["patch_pos_BP"] += padded(patches, slots, 0)
        out["patch_doc_BP"] += padded([doc_of[cuts[p]] for p in patches], slots, PADDING)
    if part.count > 1:
        slice_of = [slice_of_patch[patch] for patch in patch_of]
        begin = sum(c < part.index for c in slice_of)
        before = [i if i >= 0 else None for i in range(begin - part.reach_bytes, begin)]
        out["before_ids_BR"] = [0 if i is None else ids[i] for i in before]
        out["before_doc_BR"] = [PADDING if i is None else doc_of[i] for i in before]
        out["last_patch_B1"] = [max(len(own_patches) - 1, 0)]
        # The tails that arrive, by what they hold: a halo must find the bytes before the slice in them.
        tail = min(part.window_bytes - 1, S)
        out["tail_BT"] = [slot if slot >= 0 else PADDING for slot in range(len(mine) - tail, len(mine))]
        arrived = []
        for sender in range(max(part.index - part.halo_slices, 0), part.index):
            held = [i for i in range(row.n_ids) if slice_of[i] == sender][-tail:]
            arrived += [None] * (tail - len(held)) + held
        before = range(begin - part.window_bytes + 1, begin)
        out["halo_BW"] = [arrived.index(i) if i >= 0 and mine else PADDING for i in before]
    return out


SHAPES = [RowShape(4, 16, 5), RowShape(4, 6, 6), RowShape(8, 5, 3), RowShape(6, 9, 4)]


@pytest.mark.parametrize(
    ("shape", "count"), [(shape, count) for shape in SHAPES for count in (1, 2, 3, 4, 8) if shape.segments % count == 0]
)
def test_slices_are_those_of_the_byte_by_byte_twin(shape, count):
    rows = random_rows(shape, 40, seed=count)
    slices_with_foreign_source = 0
    for index in range(count):
        part = ContextSlice(index, count, window_bytes=WINDOW, reach_bytes=REACH, halo_slices=count - 1)
        batch = collate_rows(rows, shape, part)
        layout = fields_of(batch.layout)
        assert list(layout) == [*LAYOUT_FIELDS, *(SLICE_FIELDS if count > 1 else ())]
        fields = layout | {"ids_BS": batch.ids_BS, "labels_BS": batch.labels_BS}
        for i, row in enumerate(rows):
            for name, expected in slice_byte_by_byte(row, shape, part).items():
                assert fields[name].dtype == torch.int32
                assert fields[name].is_contiguous()
                assert fields[name][i].tolist() == expected, (name, i)
        slices_with_foreign_source += int((batch.layout.source_patch_BS == shape.n_patches // count).any(1).sum())
    assert slices_with_foreign_source > (0 if count > 1 else -1)


def test_the_example_of_the_module():
    ids = np.arange(10, 24, dtype=np.int16)
    shape = RowShape(2, 6, 3)
    row = pack_row(PatchedIds(ids, np.cumsum([0, 1, 3, 4, 2, 4])), shape)
    halves = [fields_of(collate_rows([row], shape, ContextSlice(index, 2, 4, 3, 1)).layout) for index in (0, 1)]
    pad, before = PADDING, 3
    assert [half["byte_patch_BS"][0].tolist() for half in halves] == [[0, 1, 1, 1, pad, pad], [0, 0, 0, 0, 1, 1]]
    assert [half["source_patch_BS"][0].tolist() for half in halves] == [
        [0, 0, 0, 1, pad, pad],
        [before, before, before, 0, 0, 1],
    ]
    assert [half["byte_pos_BS"][0].tolist() for half in halves] == [[0, 1, 2, 3, 0, 0], [4, 5, 6, 7, 8, 9]]
    for half in halves:
        assert half["patch_pos_BP"][0].tolist() == [0, 1, 0, 2, 3, 0]
        assert half["patch_doc_BP"][0].tolist() == [0, 0, pad, 0, 0, pad]
    assert halves[1]["before_ids_BR"][0].tolist() == [11, 12, 13]
    assert halves[1]["halo_BW"][0].tolist() == [0, 1, 2]
    assert halves[0]["tail_BT"][0].tolist() == [1, 2, 3]
    whole = collate_rows([row], shape, WHOLE_ROW).layout
    assert whole.source_patch_BS[0].tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 3, pad, pad]

from collections.abc import Sequence

import numpy as np
import pytest

from blt_titan.batch import IGNORE_LABEL, PADDING
from blt_titan.byte_vocab import BOS_ID, BOUNDARY_ID, EOS_ID, document_ids
from blt_titan.data.rows.packing import PatchedIds, RowShape, empty_row, pack_row
from blt_titan.data.rows.patcher import patch_documents
from blt_titan.patching import rule_patch_starts
from blt_titan.patching.rule import PatchRule
from tests.helpers.whole_rows import FIELDS, laid_out


def spaces(ids: np.ndarray) -> np.ndarray:
    return rule_patch_starts(ids, rule="space")


def from_lengths(ids: np.ndarray, lengths: Sequence[int]) -> PatchedIds:
    assert sum(lengths) == len(ids)
    return PatchedIds(ids, np.cumsum([0, *lengths]))


def random_source(rng: np.random.Generator, n_ids: int, longest_patch: int, mean_document: int) -> PatchedIds:
    """Documents with random patches: BOS and EOS end one, as in every rule; it may begin inside a document."""
    ids = [np.empty(0, np.int16)]
    while sum(map(len, ids)) < n_ids:
        ids.append(document_ids(rng.bytes(int(rng.integers(1, 2 * mean_document)))))
    together = np.concatenate(ids)
    if rng.random() < 0.5:
        together = together[int(rng.integers(len(ids[1]))) :]
    starts = [0]
    for i in range(1, len(together)):
        special = together[i - 1] in (BOS_ID, EOS_ID)
        if special or i - starts[-1] == longest_patch or rng.random() < 2 / longest_patch:
            starts.append(i)
    return PatchedIds(together, np.array([*starts, len(together)]))


def pack_byte_by_byte(source: PatchedIds, shape: RowShape) -> dict[str, list[int]]:
    """Fill a row as the docstrings of `packing.py` and `batch.py` say, one byte at a time."""
    lengths = np.diff(source.cuts).tolist()
    if lengths[0] > 1:
        lengths = [1, lengths[0] - 1, *lengths[1:]]
    placed: list[int] = []
    for _ in range(shape.segments):
        bytes_used = patches_used = 0
        while (
            len(placed) < len(lengths)
            and patches_used + 1 <= shape.segment_patches
            and bytes_used + lengths[len(placed)] <= shape.segment_bytes
        ):
            bytes_used += lengths[len(placed)]
            patches_used += 1
            placed.append(lengths[len(placed)])

    ids = source.ids.tolist()
    patch_of = [patch for patch, length in enumerate(placed) for _ in range(length)]
    row: dict[str, list[int]] = {name: [] for name in FIELDS}
    document = 0
    for i, patch in enumerate(patch_of):
        if i and ids[i] == BOS_ID:
            document += 1
        following = ids[i + 1] if i + 1 < len(ids) else None
        # The patch of the target, which in the next row would start one.
        patch_of_target = patch_of[i + 1] if i + 1 < len(patch_of) else len(placed)
        row["token_ids"].append(ids[i])
        row["labels"].append(IGNORE_LABEL if following is None or following == BOS_ID else following)
        row["byte_pos"].append(i)
        row["byte_doc"].append(document)
        row["byte_patch"].append(patch)
        row["source_patch"].append(patch_of_target - 1)
        if patch == len(row["patch_pos"]):
            row["patch_pos"].append(patch)
            row["patch_doc"].append(document)
    padding = dict.fromkeys(FIELDS, PADDING) | dict(token_ids=BOUNDARY_ID, labels=IGNORE_LABEL, byte_pos=0, patch_pos=0)
    for name, values in row.items():
        slots = shape.n_patches if name in ("patch_pos", "patch_doc") else shape.n_bytes
        values += [padding[name]] * (slots - len(values))
    return row


SHAPES = [
    RowShape(1, 32, 8),
    RowShape(1, 32, 1),
    RowShape(1, 40, 40),
    RowShape(2, 16, 4),
    RowShape(2, 20, 100),
    RowShape(4, 16, 3),
    RowShape(4, 9, 5),
    RowShape(8, 12, 2),
    RowShape(8, 8, 8),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_those_of_the_byte_by_byte_packer(shape):
    rng = np.random.default_rng(0)
    for trial in range(60):
        # From less than a row, which pads, to more than one.
        n_ids = int(rng.integers(1, 2 * shape.n_bytes))
        source = random_source(rng, n_ids, longest_patch=int(rng.integers(1, 9)), mean_document=1 + trial)
        row = laid_out(pack_row(source, shape), shape)
        expected = pack_byte_by_byte(source, shape)
        for name in FIELDS:
            field = getattr(row, name)
            assert field.dtype == np.int32
            assert field.tolist() == expected[name], name
        assert row.n_ids == sum(place != PADDING for place in expected["byte_doc"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_holds_in_every_row(shape):
    rng = np.random.default_rng(1)
    for trial in range(60):
        source = random_source(rng, int(rng.integers(3, 3 * shape.n_bytes)), 8, 1 + trial)
        row = laid_out(pack_row(source, shape), shape)
        n, n_patches = row.n_ids, int((row.patch_doc != PADDING).sum())
        real = slice(0, n)
        assert 1 <= n <= min(shape.n_bytes, len(source.ids))
        # Padding is at the end, and only there.
        for name in ("byte_doc", "byte_patch", "source_patch"):
            assert (getattr(row, name)[real] >= 0).all()
            assert (getattr(row, name)[n:] == PADDING).all()
        assert (row.patch_doc[n_patches:] == PADDING).all()
        assert (row.labels[n:] == IGNORE_LABEL).all()
        # Positions 0 and 1 start patches, and patches are numbered without gaps.
        assert row.byte_patch[0] == 0
        assert n == 1 or row.byte_patch[1] == 1
        steps = np.diff(row.byte_patch[real])
        assert set(steps) <= {0, 1}
        assert row.byte_patch[n - 1] == n_patches - 1
        # No byte reads the patch of its target, nor a later one.
        np.testing.assert_array_equal(row.source_patch[: n - 1], row.byte_patch[1:n] - 1)
        assert row.source_patch[n - 1] == n_patches - 1
        # EOS has no target; any other byte that something follows has the byte that follows.
        is_eos = source.ids[:n] == EOS_ID
        assert (row.labels[real][is_eos] == IGNORE_LABEL).all()
        inside = np.flatnonzero(~is_eos)
        inside = inside[inside + 1 < len(source.ids)]
        np.testing.assert_array_equal(row.labels[inside], source.ids[inside + 1])
        assert BOS_ID not in row.labels
        # A patch lies in one document, and says which.
        np.testing.assert_array_equal(row.patch_doc[row.byte_patch[real]], row.byte_doc[real])


def test_segments_keep_their_budgets_and_are_as_full_as_they_can_be():
    rng = np.random.default_rng(2)
    for shape in SHAPES:
        source = random_source(rng, 4 * shape.n_bytes, 8, 30)
        row = laid_out(pack_row(source, shape), shape)
        lengths = np.bincount(row.byte_patch[: row.n_ids]).tolist()
        rest = np.diff(source.cuts[source.cuts >= row.n_ids]).tolist()
        # What the row holds needs all segments: one more patch would overflow the last.
        segments = [[0, 0]]
        for length in [*lengths, *rest]:
            if segments[-1][0] + length > shape.segment_bytes or segments[-1][1] == shape.segment_patches:
                segments.append([0, 0])
            segments[-1][0] += length
            segments[-1][1] += 1
        in_row = segments[: shape.segments]
        assert all(held <= shape.segment_bytes and patches <= shape.segment_patches for held, patches in in_row)
        assert (sum(held for held, _ in in_row), sum(patches for _, patches in in_row)) == (row.n_ids, len(lengths))


def test_the_example_of_the_module():
    ids = document_ids(bytes(range(16)))
    shape = RowShape(segments=2, segment_bytes=6, segment_patches=3)
    row = laid_out(pack_row(from_lengths(ids, [1, 3, 4, 2, 1, 5, 2]), shape), shape)
    assert row.n_ids == 10
    assert row.byte_patch.tolist() == [0, 1, 1, 1, 2, 2, 2, 2, 3, 3, PADDING, PADDING]
    assert row.patch_pos.tolist() == [0, 1, 2, 3, 0, 0]
    assert row.patch_doc.tolist() == [0, 0, 0, 0, PADDING, PADDING]
    assert row.labels.tolist() == [*ids[1:11], IGNORE_LABEL, IGNORE_LABEL]
    following = laid_out(pack_row(from_lengths(ids[10:], [1, 5, 2]), shape), shape)
    assert following.byte_patch.tolist()[:8] == [0, 1, 1, 1, 1, 1, 2, 2]


def test_the_example_of_the_batch_contract():
    ids = document_ids(b"ab c")
    row = laid_out(
        pack_row(PatchedIds(ids, np.append(np.flatnonzero(spaces(ids)), len(ids))), RowShape(1, 9, 5)),
        RowShape(1, 9, 5),
    )
    dash = IGNORE_LABEL
    assert row.token_ids.tolist() == [*ids, 0, 0, 0]
    assert row.labels.tolist() == [*ids[1:], dash, dash, dash, dash]
    assert row.byte_pos.tolist() == [0, 1, 2, 3, 4, 5, 0, 0, 0]
    assert row.byte_doc.tolist() == [0] * 6 + [-1] * 3
    assert row.byte_patch.tolist() == [0, 1, 1, 1, 2, 2, -1, -1, -1]
    assert row.source_patch.tolist() == [0, 0, 0, 1, 1, 2, -1, -1, -1]
    assert row.patch_pos.tolist() == [0, 1, 2, 0, 0]
    assert row.patch_doc.tolist() == [0, 0, 0, -1, -1]


def test_a_long_first_patch_becomes_one_and_the_rest():
    ids = np.arange(10, 16, dtype=np.int16)
    row = laid_out(pack_row(from_lengths(ids, [4, 2]), RowShape(1, 8, 8)), RowShape(1, 8, 8))
    assert row.byte_patch.tolist()[:6] == [0, 1, 1, 1, 2, 2]
    assert row.labels.tolist() == [11, 12, 13, 14, 15, *[IGNORE_LABEL] * 3]  # nothing follows the last
    # The patches may be used up by the one; the rest then begins the next row.
    row = laid_out(pack_row(from_lengths(ids, [4, 2]), RowShape(1, 8, 1)), RowShape(1, 8, 1))
    assert (row.n_ids, row.labels[0], row.source_patch[0]) == (1, 11, 0)


def test_a_row_does_not_write_to_its_source():
    source = from_lengths(np.arange(10, 16, dtype=np.int16), [4, 2])
    before = PatchedIds(*(array.copy() for array in source))
    row = pack_row(source, RowShape(1, 8, 8))
    # What is split or appended for the row is a copy, whatever of the source it shares otherwise.
    assert row.cuts[1] == 1 != source.cuts[1]
    for array, was in zip(source, before, strict=True):
        np.testing.assert_array_equal(array, was)


@pytest.mark.parametrize(
    "documents", [[b"Hi"], [b""], [b"", b"a", b""], [b"one, two", b"three four\n", b"\x00\xff" * 9]], ids=str
)
def test_patch_documents_frames_each_document(documents):
    text = np.frombuffer(b"".join(documents), np.uint8)
    offsets = np.cumsum([0, *map(len, documents)])
    ids, cuts = patch_documents(text, offsets, PatchRule("space"))
    expected = np.concatenate([document_ids(document) for document in documents])
    np.testing.assert_array_equal(ids, expected)
    assert ids.dtype == np.int16
    assert cuts.tolist() == [*np.flatnonzero(spaces(expected)), len(expected)]


def test_an_empty_row_is_all_padding():
    shape = RowShape(2, 6, 3)
    row = laid_out(empty_row(shape), shape)
    expected = [[0] * 12, [IGNORE_LABEL] * 12, [0] * 12, *[[PADDING] * 12] * 3, [0] * 6, [PADDING] * 6]
    assert [getattr(row, name).tolist() for name in FIELDS] == expected
    assert row.n_ids == 0

from itertools import pairwise

import numpy as np
import pytest

from blt_titan.batch import IGNORE_LABEL
from blt_titan.byte_vocab import BOS_ID, EOS_ID, document_ids
from blt_titan.data.rows.packing import PatchedIds, Row, RowShape
from blt_titan.data.rows.patcher import patch_documents
from blt_titan.data.rows.streams import POSITION_FIELDS, QUARANTINED, RowStream
from blt_titan.patching.rule import PatchRule
from tests.helpers.whole_rows import laid_out

RecordBatches = list[list[bytes]]

MAX_PATCH_BYTES = 6
SHAPES = [RowShape(1, 24, 5), RowShape(2, 16, 8), RowShape(4, 8, 2), RowShape(8, 6, 6), RowShape(1, 6, 1)]


def words(rng: np.random.Generator, size: int) -> bytes:
    return bytes(rng.choice(np.frombuffer(b"aeio  ,.\xc3\xa9\n", np.uint8), size))


def awkward_record_batches() -> RecordBatches:
    rng = np.random.default_rng(0)
    return [
        [words(rng, 300)],  # longer than many rows
        [b"x"],  # shorter than a row, so that several record batches go into one
        [b"y", b"", b"z"],
        [words(rng, int(size)) for size in rng.integers(1, 40, size=12)],
        [b"nospacesatallsothatonlythemaximumcutsit" * 3, b" " * 50],
        *[[words(rng, 1)] for _ in range(5)],
        [words(rng, int(size)) for size in rng.integers(1, 200, size=5)],
    ]


def stream_of(record_batches: RecordBatches, shape: RowShape) -> RowStream:
    """One epoch of record batches as a stream that ends."""
    rule = PatchRule("space", max_patch_bytes=MAX_PATCH_BYTES)

    def read_pick(pick: int) -> PatchedIds | None:
        if pick >= len(record_batches):
            return None
        documents = record_batches[pick]
        offsets = np.cumsum([0, *map(len, documents)])
        return patch_documents(np.frombuffer(b"".join(documents), np.uint8), offsets, rule)

    return RowStream(read_pick, shape)


def all_rows(stream: RowStream) -> list[Row]:
    return list(iter(stream.next_row, None))


def delivered_ids(rows: list[Row]) -> list[int]:
    return [int(i) for row in rows for i in row.ids[:-1]]


def delivered_documents(rows: list[Row]) -> list[bytes]:
    documents: list[bytearray] = []
    for i in delivered_ids(rows):
        if i == BOS_ID:
            documents.append(bytearray())
        elif i != EOS_ID:
            documents[-1].append(i - 4)
    return [bytes(document) for document in documents]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_documents_come_out_as_they_went_in(shape):
    record_batches = awkward_record_batches()
    rows = all_rows(stream_of(record_batches, shape))
    assert delivered_documents(rows) == [document for batch in record_batches for document in batch]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_byte_and_every_eos_is_a_target_once(shape):
    record_batches = awkward_record_batches()
    rows = [laid_out(row, shape) for row in all_rows(stream_of(record_batches, shape))]
    ids = [int(i) for batch in record_batches for document in batch for i in document_ids(document)]
    # In order, so that a target lost at one border cannot hide behind one that another repeats.
    labels = np.concatenate([row.labels for row in rows])
    assert labels[labels != IGNORE_LABEL].tolist() == [i for i in ids if i != BOS_ID]
    # And each at the slot just before it: after any input but EOS, the next id of the data is the label.
    pairs = [
        (int(i), int(label))
        for row in rows
        for i, label in zip(row.token_ids[: row.n_ids], row.labels[: row.n_ids], strict=True)
    ]
    assert pairs == [(i, IGNORE_LABEL if i == EOS_ID else after) for i, after in pairwise([*ids, IGNORE_LABEL])]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_stream_continues_from_any_row_bit_for_bit(shape):
    record_batches = awkward_record_batches()
    stream = stream_of(record_batches, shape)
    rows: list[Row] = []
    positions = [stream.position()]
    while (row := stream.next_row()) is not None:
        rows.append(row)
        positions.append(stream.position())
    assert len(rows) > 15
    moved = stream_of(record_batches, shape)  # goes to and fro, so that nothing of the earlier place may stay
    for number in np.random.default_rng(1).permutation(len(positions))[:100]:
        for resumed in (stream_of(record_batches, shape), moved):
            resumed.seek(positions[number])
            np.testing.assert_array_equal(resumed.position(), positions[number])
            for expected, position in list(zip(rows, positions[1:], strict=True))[number : number + 8]:
                row = resumed.next_row()
                assert row is not None
                assert row.n_ids == expected.n_ids
                for mine, theirs in zip(row, expected, strict=True):
                    np.testing.assert_array_equal(mine, theirs)
                np.testing.assert_array_equal(resumed.position(), position)
    moved.seek(positions[-1])
    assert moved.next_row() is None


def test_a_position_names_the_record_batch_that_the_next_row_begins_in():
    record_batches = [[b"abc", b"de"], [b"f"], [b"ghijklmnop"]]  # 9, 3 and 12 ids
    stream = stream_of(record_batches, RowShape(1, 6, 6))
    begins = np.cumsum([0, 9, 3, 12])
    taken = 0
    for number in range(1, 20):
        row = stream.next_row()
        if row is None:
            break
        taken += row.n_ids
        pick, ids_taken, rows, _ = stream.position()
        assert (begins[pick] + ids_taken, rows) == (taken, number)
        assert pick == np.searchsorted(begins, taken, side="right") - 1
    assert taken == 24
    assert POSITION_FIELDS == ("pick", "ids_taken", "rows", "quarantined")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("damaged", [{0}, {3}, {1, 2}, {0, 5, 10}, set(range(11))], ids=str)
def test_what_is_quarantined_is_passed_over_and_counted(shape, damaged):
    record_batches = awkward_record_batches()

    def stream_with_damage() -> RowStream:
        stream = stream_of(record_batches, shape)
        read = stream.read_pick
        stream.read_pick = lambda pick: QUARANTINED if pick in damaged else read(pick)
        return stream

    kept = [batch for pick, batch in enumerate(record_batches) if pick not in damaged]
    stream, rows, positions = stream_with_damage(), [], []
    while (row := stream.next_row()) is not None:
        rows.append(row)
        positions.append(stream.position())
    assert delivered_documents(rows) == [document for batch in kept for document in batch]
    if not rows:
        return
    assert positions[-1][3] == len(damaged - ({10} if len(record_batches) == 10 else set()))
    counted = [position[3] for position in positions]
    assert counted == sorted(counted)
    # Going on in the middle counts none twice.
    for number in range(0, len(rows), max(1, len(rows) // 8)):
        resumed = stream_with_damage()
        resumed.seek(positions[number])
        assert [row.n_ids for row in all_rows(resumed)] == [row.n_ids for row in rows[number + 1 :]]
        assert resumed.position()[3] == positions[-1][3]


def test_what_is_damaged_after_its_first_rows_loses_the_rest_alone():
    record_batches = [[b"abcdefghijklmnop"], [b"qrs"]]
    stream = stream_of(record_batches, RowShape(1, 6, 6))
    first = stream.next_row()
    assert first is not None
    resumed = stream_of(record_batches, RowShape(1, 6, 6))
    read = resumed.read_pick
    resumed.read_pick = lambda pick: QUARANTINED if pick == 0 else read(pick)
    resumed.seek(stream.position())
    assert resumed.position().tolist() == [1, 0, 1, 1]
    assert delivered_documents(all_rows(resumed)) == [b"qrs"]


def test_nothing_is_read_before_it_is_needed():
    record_batches = [[b"a" * 20] for _ in range(10)]
    whole = stream_of(record_batches, RowShape(1, 12, 12))
    picks: list[int] = []

    def read_pick(pick: int) -> PatchedIds | None:
        picks.append(pick)
        return whole.read_pick(pick)

    stream = RowStream(read_pick, whole.shape)
    assert picks == []
    stream.next_row()
    assert picks == [0]
    all_rows(stream)
    assert picks == list(range(11))  # each once; the last says that there are no more


def test_the_end_delivers_what_is_left_and_stays_the_end():
    stream = stream_of([[b"ab"], [b"c"]], RowShape(1, 64, 64))
    row = stream.next_row()
    assert row is not None
    assert row.n_ids == 7
    assert delivered_documents([row]) == [b"ab", b"c"]
    assert stream.next_row() is None
    assert stream.next_row() is None
    assert stream_of([], RowShape(1, 8, 8)).next_row() is None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_patch_is_longer_than_its_maximum(shape):
    rows = all_rows(stream_of(awkward_record_batches(), shape))
    lengths = np.concatenate([np.diff(row.cuts) for row in rows])
    assert lengths.min() == 1
    # The smallest shape has one patch in a row, which the row's border cuts to one byte.
    assert lengths.max() == (MAX_PATCH_BYTES if shape.n_patches > 1 else 1)


def test_memory_is_given_back_as_rows_are_taken():
    stream = stream_of([[b"word " * 20_000]], RowShape(1, 1000, 1000))
    left = 100_002
    while (row := stream.next_row()) is not None:
        left -= row.n_ids
        held = stream._held.ids
        owner = held if held.base is None else held.base
        assert owner.size <= max(2 * left + 2, 1000)

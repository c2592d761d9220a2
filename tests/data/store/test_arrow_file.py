"""Columns of others' Arrow files: what Arrow would follow outside of its buffers is refused, all else stays."""

import numpy as np
import pyarrow as pa
import pytest

from blt_titan.data.store.arrow_file import checked_text

TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()]
TEXTS = [b"one", b"", None, b"long enough to lie outside of a view", b"caf\xe9"]


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_a_sound_column_gives_its_bytes_whether_or_not_they_are_utf8(kind):
    as_bytes = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    column = pa.array(TEXTS, as_bytes.get(kind, kind)).view(kind)
    assert checked_text(column).to_pylist() == TEXTS
    assert checked_text(column[1:4]).to_pylist() == TEXTS[1:4]
    codes = checked_text(pa.DictionaryArray.from_arrays(pa.array([3, None, 0], pa.int8()), column))
    assert (codes.indices.to_pylist(), codes.dictionary.to_pylist()) == ([3, None, 0], TEXTS)


@pytest.mark.parametrize("kind", TYPES[:2] + TYPES[3:5], ids=str)
@pytest.mark.parametrize("inner", [2**30, -5, 9, -(2**31)])
def test_offsets_that_lie_are_refused(kind, inner):
    width = np.int64 if "large" in str(kind) else np.int32
    buffers = [None, pa.py_buffer(np.array([0, inner, 8], width)), pa.py_buffer(b"eight by")]
    column = pa.Array.from_buffers(kind, 2, buffers)
    for lying in (column, pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int8()), column)):
        with pytest.raises(pa.ArrowException):
            checked_text(lying)


@pytest.mark.parametrize("kind", [pa.string_view(), pa.binary_view()], ids=str)
@pytest.mark.parametrize(("number", "offset"), [(0, 2**30), (7, 0), (-1, 0), (0, -8)])
def test_views_that_lie_are_refused(kind, number, offset):
    view = np.array([20, int.from_bytes(b"aaaa", "little"), number, offset], np.int32)
    column = pa.Array.from_buffers(kind, 1, [None, pa.py_buffer(view), pa.py_buffer(b"a" * 20)])
    with pytest.raises(pa.ArrowException):
        checked_text(column)


@pytest.mark.parametrize("code", [2, -1, 127])
def test_codes_outside_of_their_dictionary_are_refused(code):
    codes = pa.DictionaryArray.from_arrays(pa.array([0, code], pa.int8()), pa.array(["a", "b"]), safe=False)
    with pytest.raises(pa.ArrowException):
        checked_text(codes)

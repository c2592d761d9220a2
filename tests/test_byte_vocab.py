"""The vocabulary: its doctests, and every byte there and back."""

import doctest

import numpy as np

from blt_titan import byte_vocab
from blt_titan.byte_vocab import BOS_ID, EOS_ID, VOCAB_SIZE, bytes_to_ids, document_ids, ids_to_bytes


def test_doctests():
    result = doctest.testmod(byte_vocab)
    assert result.failed == 0
    assert result.attempted > 0


def test_every_byte_survives_and_has_its_own_id():
    text = bytes(range(256))
    ids = bytes_to_ids(text)
    assert ids.tolist() == list(range(4, VOCAB_SIZE))
    assert ids_to_bytes(ids) == text


def test_a_document_is_bos_bytes_eos():
    for text in (b"", b"\x00\xff", "π".encode()):
        ids = document_ids(text)
        assert ids.dtype == np.int16
        assert (ids[0], ids[-1], len(ids)) == (BOS_ID, EOS_ID, len(text) + 2)
        assert ids_to_bytes(ids) == text

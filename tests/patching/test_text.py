"""Rules that read bytes only: the contract's worked example, serial twins, causality, errors."""

import numpy as np
import pytest
import torch

from blt_titan.byte_vocab import BOS_ID, document_ids
from blt_titan.patching import (
    byte_patch_starts,
    rule_patch_starts,
    space_patch_starts,
    starts_to_lengths,
    static_patch_starts,
)

both_kinds = pytest.mark.parametrize("to_kind", [np.asarray, torch.tensor], ids=["numpy", "torch"])
EXAMPLE = document_ids("Hi, it's 42% of π.".encode())
RULES = [("space", None), ("static", 1), ("static", 4), ("byte", None)]


def is_space_like(id_):
    byte = id_ - 4
    return byte >= 0 and not (byte < 128 and chr(byte).isalnum()) and not 0x80 <= byte <= 0xBF


def serial_starts(ids, *, rule, stride, include_next, max_patch_bytes):
    """Decide byte by byte, knowing only earlier ids and whether this one is a BOS."""
    starts, in_document, held_since_rule = [], 0, 0
    for j in range(len(ids) + include_next):
        begins = j == 0 or (j < len(ids) and ids[j] == BOS_ID)
        in_document = 0 if begins else in_document + 1
        after_special = j > 0 and ids[j - 1] < 4
        if rule == "byte" or j == 0 or after_special:
            by_rule = True
        elif rule == "static":
            by_rule = in_document <= 1 or (in_document - 1) % stride == 0
        else:
            by_rule = is_space_like(ids[j - 1]) and not (j > 1 and is_space_like(ids[j - 2]))
        if rule == "static" and begins:
            by_rule = True
        held_since_rule = 0 if by_rule else held_since_rule + 1
        full = max_patch_bytes is not None and held_since_rule % max_patch_bytes == 0
        starts.append(bool(by_rule or full))
    return starts


def random_documents(seed):
    rng = np.random.default_rng(seed)
    alphabet = np.frombuffer("abz09AZ  .,\n/:@[`{π€".encode() + bytes(range(256)), dtype=np.uint8)
    return np.concatenate([document_ids(rng.choice(alphabet, size=n).tobytes()) for n in (0, 1, 60, 7, 130)])


@both_kinds
@pytest.mark.parametrize("include_next", [False, True])
def test_space_rule_on_the_worked_example(to_kind, include_next):
    assert len(EXAMPLE) == 21
    starts = space_patch_starts(to_kind(EXAMPLE), include_next=include_next)
    assert type(starts) is type(to_kind(EXAMPLE))
    assert starts_to_lengths(starts).tolist() == [1, 3, 4, 2, 3, 4, 3, 1] + [1] * include_next


@both_kinds
def test_the_lookahead_starts_iff_the_last_byte_ends_a_patch(to_kind):
    for text, starts_next in [(b"no", False), (b"no ", True), (b"no  ", False)]:
        ids = to_kind(document_ids(text)[:-1])
        assert bool(space_patch_starts(ids, include_next=True)[-1]) is starts_next


@both_kinds
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("begin", [0, 5, 40])
@pytest.mark.parametrize("include_next", [False, True])
@pytest.mark.parametrize("max_patch_bytes", [None, 1, 3])
@pytest.mark.parametrize(("rule", "stride"), RULES)
def test_equals_the_serial_twin(to_kind, seed, begin, include_next, max_patch_bytes, rule, stride):
    ids = random_documents(seed)[begin:]
    options = {
        "rule": rule,
        "stride": stride,
        "include_next": include_next,
        "max_patch_bytes": max_patch_bytes,
    }
    assert rule_patch_starts(to_kind(ids), **options).tolist() == serial_starts(ids.tolist(), **options)


@both_kinds
@pytest.mark.parametrize(("rule", "stride"), RULES)
def test_concatenated_documents_are_cut_like_each_alone(to_kind, rule, stride):
    documents = [document_ids(text) for text in (b"one two", b"", b"  three, four")]
    options = {"rule": rule, "stride": stride, "max_patch_bytes": 5}
    alone = [start for ids in documents for start in rule_patch_starts(to_kind(ids), **options).tolist()]
    assert rule_patch_starts(to_kind(np.concatenate(documents)), **options).tolist() == alone


@both_kinds
@pytest.mark.parametrize(("rule", "stride"), RULES)
def test_a_prefix_has_the_same_starts(to_kind, rule, stride):
    ids = to_kind(random_documents(9))
    options = {"rule": rule, "stride": stride, "max_patch_bytes": 4, "include_next": True}
    full = rule_patch_starts(ids, **options).tolist()
    for n in range(1, len(ids) + 1):
        assert rule_patch_starts(ids[:n], **options).tolist() == full[: n + 1]


@both_kinds
def test_static_stride_counts_from_position_1_of_each_document(to_kind):
    ids = to_kind(np.concatenate([document_ids(b"abcdefg"), document_ids(b"hi")]))
    starts = static_patch_starts(ids, stride=3)
    assert starts_to_lengths(starts).tolist() == [1, 3, 3, 2, 1, 3]


@both_kinds
def test_static_starts_at_a_bos_without_an_eos_before_it(to_kind):
    ids = to_kind(np.concatenate([document_ids(b"abc")[:-1], document_ids(b"hi")]))
    assert starts_to_lengths(static_patch_starts(ids, stride=8)).tolist() == [1, 3, 1, 3]


@both_kinds
@pytest.mark.parametrize(("rule", "stride"), RULES)
def test_no_ids_have_no_starts_but_the_lookahead(to_kind, rule, stride):
    ids = to_kind(np.array([], dtype=np.int16))
    options = {"rule": rule, "stride": stride, "max_patch_bytes": 4}
    assert rule_patch_starts(ids, **options).tolist() == []
    assert rule_patch_starts(ids, include_next=True, **options).tolist() == [True]


@both_kinds
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "words"}, "rule='words': must be one of space, static, byte"),
        ({"rule": "static"}, "stride=None: rule='static' needs"),
        ({"rule": "static", "stride": 0}, "stride=0: must be at least 1"),
        ({"rule": "space", "stride": 4}, "stride=4: rule='space' does not use it"),
        ({"rule": "byte", "max_patch_bytes": 0}, "max_patch_bytes=0: must be at least 1"),
    ],
)
def test_errors_say_what_was_given(to_kind, options, message):
    with pytest.raises(ValueError, match=message):
        rule_patch_starts(to_kind(EXAMPLE), **options)


@both_kinds
@pytest.mark.parametrize("function", [space_patch_starts, byte_patch_starts])
def test_ids_are_checked(to_kind, function):
    with pytest.raises(ValueError, match=r"must be 1-D, got shape \(1, 21\)"):
        function(to_kind(EXAMPLE[None]))
    with pytest.raises(ValueError, match=r"integers of at least 16 bits.*uint8"):
        function(to_kind(np.frombuffer(b"raw bytes", dtype=np.uint8).copy()))
    with pytest.raises(ValueError, match=r"integers of at least 16 bits.*float"):
        function(to_kind(EXAMPLE.astype(np.float32)))


def test_ids_outside_the_vocabulary_are_refused_in_numpy():
    with pytest.raises(ValueError, match=r"must lie in 0\.\.259, got -100\.\.7"):
        space_patch_starts(np.array([1, 7, -100]))

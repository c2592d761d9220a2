"""Rules of one's own: marked document by document, followed byte by byte, and named where they are not known."""

import json
import re

import numpy as np
import pytest
import torch

from blt_titan.byte_vocab import BOS_ID, BYTE_OFFSET, document_ids
from blt_titan.checkpoint.json_fields import FieldError, read_rule
from blt_titan.data.rows.patcher import patch_documents
from blt_titan.patching import registry
from blt_titan.patching.registry import NextBytes, register_rule
from blt_titan.patching.rule import PatchCursor, PatchRule
from blt_titan.patching.trial import trial_faults

DOCUMENTS = [b"patches of bytes", b"", b"a", "é voilà, eau".encode()]


def vowels(rule, ids, entropies_nats):
    assert entropies_nats is None
    assert (ids == BOS_ID).sum() == 1, "one document, from its beginning"
    return np.isin(ids - BYTE_OFFSET, list(b"aeiou"))


def next_vowels(rule, at: NextBytes):
    return np.isin(at.ids_B - BYTE_OFFSET, list(b"aeiou"))


def sure_then_unsure(rule, ids, entropies_nats):
    """A rule by both: after a letter whose entropy is above the threshold, where the one before was below."""
    before = np.concatenate([[0], entropies_nats[:-1]])
    return (entropies_nats > rule.threshold) & (before <= rule.threshold) & (ids >= BYTE_OFFSET + ord("a"))


@pytest.fixture(autouse=True)
def own_rules(monkeypatch):
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))
    register_rule("vowels", vowels)
    register_rule("sure_then_unsure", sure_then_unsure, by_entropy=True, takes=["threshold"])


def ends_of(content: bytes) -> list[bool]:
    """By hand: BOS, each vowel, EOS."""
    return [True, *(chr(byte) in "aeiou" for byte in content), True]


def test_documents_are_marked_each_alone():
    ids = np.concatenate([document_ids(content) for content in DOCUMENTS])
    expected = [end for content in DOCUMENTS for end in ends_of(content)]
    rule = PatchRule("vowels")
    assert rule.mark(ids).tolist() == [True, *expected[:-1]]
    assert rule.mark(ids, include_next=True).tolist() == [True, *expected]
    assert not rule.by_entropy
    limited = PatchRule("vowels", max_patch_bytes=2).mark(ids, include_next=True)
    assert np.diff(np.flatnonzero(limited)).max() == 2


def test_a_rule_by_entropy_gets_ids_and_entropies():
    rng = np.random.default_rng(0)
    ids = np.concatenate([document_ids(content) for content in DOCUMENTS])
    entropies = rng.uniform(0, 2, len(ids)).astype(np.float32)
    rule = PatchRule("sure_then_unsure", threshold=1.0)
    assert rule.by_entropy
    together = rule.mark(ids, entropies, begins=ids == BOS_ID)
    alone, begin = [], 0
    for content in DOCUMENTS:
        end = begin + len(content) + 2
        alone += rule.mark(ids[begin:end], entropies[begin:end]).tolist()
        begin = end
    assert together.tolist() == alone
    assert len(DOCUMENTS) * 2 < sum(alone) < len(alone)


@pytest.mark.parametrize("mark_next", [None, next_vowels], ids=["marked anew", "by byte"])
@pytest.mark.parametrize("limit", [None, 3])
def test_a_cursor_ends_patches_where_the_whole_document_does(monkeypatch, mark_next, limit):
    monkeypatch.delitem(registry._KINDS, "vowels")
    register_rule("vowels", vowels, mark_next=mark_next)
    rule = PatchRule("vowels", max_patch_bytes=limit)
    rows = [b"to be, or not", b"rhythms, eau "]
    ids = np.stack([document_ids(row) for row in rows])
    marked = np.stack([rule.mark(of_row, include_next=True)[1:] for of_row in ids])
    for known in (0, 5):
        cursor = PatchCursor(rule, 2)
        if known:
            cursor.catch_up(ids, None, np.array([known, known]))
        ends = [cursor.ends(ids[:, i]) for i in range(known, ids.shape[1])]
        assert (np.stack(ends, axis=1) == marked[:, known:]).all()


def test_a_cursor_by_entropy_ends_patches_where_the_whole_document_does():
    ids = np.stack([document_ids(b"to be, or not")])
    entropies = np.random.default_rng(1).uniform(0, 2, ids.shape).astype(np.float32)
    rule = PatchRule("sure_then_unsure", threshold=0.7, max_patch_bytes=6)
    cursor = PatchCursor(rule)
    cursor.catch_up(ids, entropies, np.array([3]))
    ends = [bool(cursor.ends(ids[:, i], entropies[:, i])[0]) for i in range(3, ids.shape[1])]
    assert ends == rule.mark(ids[0], entropies[0], include_next=True)[4:].tolist()


def test_what_cannot_be_registered_is_refused():
    register_rule("vowels", vowels)  # the same once more, as a notebook does
    for name, message in (
        ("space", "is registered already, by blt_titan.patching.built_in"),
        ("vowels", "is registered already, by tests.patching.test_registry.vowels"),
        ("my rule", "a name is made of letters, digits and underscores"),
    ):
        with pytest.raises(ValueError, match=message):
            register_rule(name, sure_then_unsure)
    with pytest.raises(ValueError, match="takes 'patch_size': it may take threshold, threshold_add, stride"):
        register_rule("mine", vowels, takes=["patch_size"])


def test_a_rule_that_returns_something_else_is_named():
    register_rule("lengths", lambda rule, ids, entropies_nats: np.ones(3))
    with pytest.raises(ValueError, match=r"rule = 'lengths': returned float64 of shape \(3,\) for 4 ids"):
        PatchRule("lengths").mark(document_ids(b"ab"))


def test_a_rule_that_is_not_registered_is_named():
    rule = PatchRule("consonants")
    message = "rule = 'consonants': must be one of 'space', 'static', 'byte'"
    for call in (lambda: rule.mark(document_ids(b"a")), lambda: PatchCursor(rule), lambda: rule.by_entropy):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(FieldError, match=r"step-3: patching\.rule = 'consonants', must be one of 'space'"):
        read_rule(json.loads('{"rule": "consonants", "storage": "float16"}'), "step-3: patching")
    options = {"threshold": None, "threshold_add": None, "stride": None, "max_patch_bytes": 9, "storage": "float16"}
    assert read_rule({"rule": "vowels", **options}, "step-3: patching") == PatchRule("vowels", max_patch_bytes=9)
    with pytest.raises(FieldError, match="'vowels' takes no stride"):
        read_rule({"rule": "vowels", **options, "stride": 3}, "step-3: patching")


def test_built_in_rules_take_tensors_too():
    ids = np.concatenate([document_ids(content) for content in DOCUMENTS])
    for rule in (PatchRule("space", max_patch_bytes=4), PatchRule("static", stride=3), PatchRule("byte")):
        assert rule.mark(torch.from_numpy(ids)).tolist() == rule.mark(ids).tolist()


def rises(rule, ids, entropies_nats):
    """Reads the entropy before a byte, BOS's too."""
    before = np.concatenate([[0], entropies_nats[:-1]])
    return entropies_nats - before > 1


def next_rises(rule, at: NextBytes):
    assert at.entropies_B is not None
    return at.entropies_B - at.before_nats_B > 1


@pytest.mark.parametrize("mark_next", [None, next_rises], ids=["marked anew", "by byte"])
def test_what_follows_bos_is_the_same_in_training_and_in_generation(mark_next):
    register_rule("rises", rises, by_entropy=True, mark_next=mark_next)
    rule, text = PatchRule("rises"), b"abcdef"
    nats = np.array([0.5, 2.0, 3.5, 0.1, 0.2, 3.0], np.float32)
    trained = patch_documents(np.frombuffer(text, np.uint8), np.array([0, len(text)]), rule, nats)
    ids = document_ids(text)
    # A model has entropies after BOS and EOS too; a sidecar has none.
    by_model = np.concatenate([[3.0], nats, [1.0]]).astype(np.float32)
    starts = rule.mark(ids, by_model)
    assert np.flatnonzero(starts).tolist() == trained.cuts[:-1].tolist()
    cursor = PatchCursor(rule)
    cursor.catch_up(ids[None, :1], by_model[None, :1], np.array([1]))
    ends = [bool(cursor.ends(ids[i : i + 1], by_model[i : i + 1])[0]) for i in range(1, len(ids))]
    assert ends[:-1] == starts[2:].tolist()


def looks_ahead(rule, ids, entropies_nats):
    return np.append(ids[1:] == BYTE_OFFSET + ord(" "), False)


@pytest.mark.parametrize(
    ("mark_ends", "mark_next", "fault"),
    [
        (vowels, next_vowels, None),
        (looks_ahead, None, r"is not causal: 3 ids of a document are cut otherwise alone than in the whole one"),
        (vowels, lambda rule, at: at.ids_B == BYTE_OFFSET + ord("e"), r"mark_next and mark_ends differ at position 2"),
        (vowels, lambda rule, at: np.ones(len(at.ids_B)), r"fails on a text of \d+ bytes \(RuleError: .* float64"),
        (lambda rule, ids, entropies_nats: ids[99], None, r"fails on a text of \d+ bytes \(IndexError"),
    ],
    ids=["sound", "looks ahead", "two answers", "no bools", "raises"],
)
def test_a_rule_is_tried_before_anything_is_trained_by_it(mark_ends, mark_next, fault):
    register_rule("tried", mark_ends, mark_next=mark_next)
    found = list(trial_faults(PatchRule("tried", max_patch_bytes=7)))
    assert not found if fault is None else re.match(f"rule = 'tried': {fault}", found[0])
    assert list(trial_faults(PatchRule("space"))) == []

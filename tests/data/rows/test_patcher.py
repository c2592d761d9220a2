"""Patchers: the same text cut by text and by entropies, and what they say decides."""

import doctest
import pickle

import numpy as np
import pytest

from blt_titan.byte_vocab import BOS_ID, document_ids
from blt_titan.data.rows import patcher as module
from blt_titan.data.rows.patcher import EntropyPatcher, TextPatcher, patch_decisions
from blt_titan.data.store.shards import RecordBatch, ShardSet
from blt_titan.patching.rounding import Storage
from blt_titan.patching.rule import PatchRule
from tests.helpers.small_loader import random_documents, write

DOCUMENTS = random_documents(3)


class Entropies:
    """A value for each byte of a text, by its place in the record batch."""

    fingerprint = "of a model"
    storage: Storage = "uint8"

    def __call__(self, batch: RecordBatch) -> np.ndarray:
        return (np.arange(len(batch.text), dtype=np.float32) * 0.37) % 3


def test_each_document_is_cut_as_if_it_were_alone(tmp_path):
    write(tmp_path / "data", DOCUMENTS)
    shards = ShardSet(tmp_path / "data", "train")
    text_rule = PatchRule("space", max_patch_bytes=7)
    entropy_rule = PatchRule("global", 1.0, max_patch_bytes=7)
    entropies = Entropies()
    patchers = [TextPatcher(text_rule), EntropyPatcher(entropy_rule, entropies)]
    for batch in shards:
        nats = entropies(batch)
        for patcher in pickle.loads(pickle.dumps(patchers)):  # as they reach a worker
            ids, cuts = patcher.patch(batch)
            begins = [*np.flatnonzero(ids == BOS_ID), len(ids)]
            expected = []
            for number in range(batch.rows):
                first, last = batch.offsets[number : number + 2]
                alone = document_ids(batch.text[first:last].tobytes())
                np.testing.assert_array_equal(ids[begins[number] : begins[number + 1]], alone)
                of_document = np.concatenate([[0], nats[first:last], [0]]).astype(np.float32)
                marks = patcher.rule.mark(alone, of_document if patcher.rule.by_entropy else None)
                expected += (begins[number] + np.flatnonzero(marks)).tolist()
            assert cuts.tolist() == [*expected, len(ids)]


def test_what_decides_is_told_by_names_that_stay():
    rule = PatchRule("global", 1.5, max_patch_bytes=9)
    decided = EntropyPatcher(rule, Entropies()).decided_by
    assert decided == {
        "patching.rule": "global",
        "patching.threshold": 1.5,
        "patching.threshold_add": None,
        "patching.stride": None,
        "patching.max_patch_bytes": 9,
        "entropies": "of a model",
    }
    space = PatchRule("space")
    assert TextPatcher(space).decided_by == patch_decisions(space, None)
    assert "entropies" not in TextPatcher(space).decided_by


def test_the_rule_takes_the_rounding_of_its_entropies():
    assert EntropyPatcher(PatchRule("global", 1.0), Entropies()).rule.storage == "uint8"


def test_a_rule_without_what_it_needs_is_refused():
    with pytest.raises(ValueError, match="rule='global' needs an entropy model"):
        TextPatcher(PatchRule("global", 1.0))
    with pytest.raises(ValueError, match="rule='space' takes no entropy model"):
        EntropyPatcher(PatchRule("space"), Entropies())


def test_doctests():
    assert doctest.testmod(module).failed == 0
    assert doctest.testmod(module).attempted > 0

"""Manifests: those that are refused, and the round trip."""

import pytest

from blt_titan.data.store.errors import DataError
from blt_titan.data.store.manifest import (
    MANIFEST_NAME,
    Counts,
    Manifest,
    ShardEntry,
    read_manifest,
    write_manifest,
)
from blt_titan.data.store.shards import ShardSet
from tests.helpers.shard_files import SOURCE_COUNTS, edit_manifest


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(version=2), "version 2 is unknown"),
        (lambda c: c.update(format="parquet"), "format 'parquet'"),
        (lambda c: c.pop("format"), "format None"),
        (lambda c: c.pop("counts"), "malformed"),
        (lambda c: c["splits"].pop("train"), "malformed"),
        (lambda c: c["splits"]["train"][0].update(surplus=1), "malformed"),
        (lambda c: c["splits"]["train"][0].update(file_bytes="many"), "file_bytes must be a whole number"),
        (lambda c: c["splits"]["train"][0].update(file="../elsewhere.arrow"), "plain file name"),
        (lambda c: c["splits"]["train"][0].update(file="train\0.arrow"), "plain file name"),
        (lambda c: c["splits"]["train"][0].update(record_batches=2**63), "record_batches must be at most file_bytes"),
        (lambda c: c["splits"]["train"].append(c["splits"]["train"][0]), "a file is named twice"),
        (lambda c: c["splits"].update(validation=c["splits"]["train"]), "a file is named twice"),
        (lambda c: c["counts"].update(documents=1), "counts say 1 documents"),
        (lambda c: c["settings"].update(sources=1), "sources must be a list"),
        (lambda c: c.update(sources=[dict.fromkeys(SOURCE_COUNTS, "many")]), "documents must be a whole number"),
        (lambda c: c.update(sources=[dict.fromkeys(SOURCE_COUNTS, 1)]), "source must be a string"),
    ],
)
def test_an_unknown_or_malformed_manifest_is_refused(three_shards, edit, message):
    edit_manifest(three_shards, edit)
    with pytest.raises(DataError, match=rf"manifest\.json: .*{message}"):
        ShardSet(three_shards, "train")


def test_a_manifest_that_is_missing_or_not_json_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"manifest\.json: no such file"):
        ShardSet(tmp_path, "train")
    for content in ("{", "[]", "\xff"):
        (tmp_path / MANIFEST_NAME).write_text(content, encoding="latin-1")
        with pytest.raises(DataError, match=r"manifest\.json"):
            ShardSet(tmp_path, "train")


def test_a_manifest_round_trips(tmp_path):
    shard = ShardEntry("train-00000.arrow", "train-00000.index.npy", "00", 9, 1, 1, 1)
    manifest = Manifest({"seed": 1, "max_bytes": None}, Counts(1, 1, 2, 3, 4), {"train": (shard,), "validation": ()})
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]

"""Byte shards that tests write, read whole and edit."""

import json
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from blt_titan.data.store.manifest import (
    MANIFEST_NAME,
    Counts,
    Manifest,
    SourceCounts,
    write_manifest,
)
from blt_titan.data.store.shards import ShardSet, ShardWriter, install

Documents = list[tuple[str, bytes]]


def write(directory: Path, documents: Documents, *, record_batch_bytes=1000, shard_bytes=2**30) -> None:
    """Write a data set whose train split is `documents`, in this order, and whose validation split is empty."""
    directory.mkdir(exist_ok=True)
    writer = ShardWriter(directory, "train", record_batch_bytes=record_batch_bytes, shard_bytes=shard_bytes)
    for begin, end in pairwise((0, len(documents) // 3, len(documents))):
        ids, texts = zip(*documents[begin:end], strict=True) if end > begin else ((), ())
        writer.add(pa.array(ids, pa.string()), pa.array(texts, pa.binary()))
    shards = writer.finish()
    install(directory, shards)
    counts = Counts(len(documents), sum(len(text) for _, text in documents), 0, 0, 0)
    write_manifest(directory, Manifest({}, counts, {"train": shards, "validation": ()}))


def read_all(shard_set: ShardSet) -> Documents:
    return [(doc_id, batch.document(row).tobytes()) for batch in shard_set for row, doc_id in enumerate(batch.doc_ids)]


def random_documents(count: int, mean_bytes: int, seed: int = 0) -> Documents:
    rng = np.random.default_rng(seed)
    return [(f"d{i}", rng.bytes(int(rng.integers(2 * mean_bytes)))) for i in range(count)]


def edit_manifest(directory: Path, edit) -> None:
    path = directory / MANIFEST_NAME
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


SOURCE_COUNTS = [field.name for field in fields(SourceCounts)]

"""What tests of `prepare` share: sixty small files, a call with small shards, and what came out."""

from pathlib import Path

import numpy as np

from blt_titan.data.prepare.job import PrepareSummary, prepare
from blt_titan.data.store.shards import ShardSet


def write_source(directory: Path) -> Path:
    """Sixty files of random text, and an empty one and a binary one."""
    directory.mkdir()
    rng = np.random.default_rng(0)
    for i in range(60):
        (directory / f"{i}.txt").write_bytes(rng.integers(32, 255, 50 + 10 * i, np.uint8).tobytes())
    (directory / "empty").write_bytes(b"")
    (directory / "binary").write_bytes(b"\0")
    return directory


def run(source: Path | str, out: Path | str, **settings) -> PrepareSummary:
    defaults = {"validation_fraction": 0.2, "seed": 0, "record_batch_bytes": 1000, "shard_bytes": 8000}
    return prepare([source], out, progress=False, **(defaults | settings))


def texts(out: Path, split: str) -> dict[str, bytes]:
    return {
        doc_id: batch.document(row).tobytes()
        for batch in ShardSet(out, split)
        for row, doc_id in enumerate(batch.doc_ids)
    }


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}

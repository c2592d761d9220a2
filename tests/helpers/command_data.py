"""Byte shards with a sidecar of made-up entropies, and what a folder holds."""

from pathlib import Path

import numpy as np

from blt_titan.data.prepare.job import prepare
from blt_titan.data.store.manifest import SPLITS
from blt_titan.data.store.shards import ShardSet
from blt_titan.data.store.sidecars import (
    SidecarSettings,
    SidecarWriter,
    begin_sidecar,
    complete_sidecar,
    sidecar_directory,
)


def scored_data(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    (folder / "source").mkdir()
    for i in range(40):
        text = rng.choice(np.frombuffer(b"abcd \n", np.uint8), 500 + 17 * i).tobytes()
        (folder / "source" / f"{i}.txt").write_bytes(text)
    data = folder / "data"
    prepare([folder / "source"], data, validation_fraction=0.1, seed=0, record_batch_bytes=2000, progress=False)
    settings = SidecarSettings("float16", {"dim": 1}, "0" * 64, "float32")
    begin_sidecar(data, "default", settings)
    for split in SPLITS:
        shards = ShardSet(data, split)
        for entry in shards.entries:
            writer = SidecarWriter(sidecar_directory(data, "default"), entry, "float16")
            for batch in shards:
                writer.add(batch.batch_in_shard, rng.gamma(1.5, 0.6, len(batch.text)).astype(np.float32), batch.crc32)
            writer.finish()
    assert complete_sidecar(data, "default", settings)
    return data


def everything_in(folder: Path) -> dict[str, bytes]:
    """Give the content of every file below a folder, and b"" for directories."""
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}

"""A small data set in several shards, and loaders over it whose rows can be compared."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from blt_titan.batch import Batch
from blt_titan.data.rows.loader import RowLoader
from blt_titan.data.rows.order import StreamOrder
from blt_titan.data.rows.packing import RowShape
from blt_titan.data.rows.patcher import TextPatcher
from blt_titan.data.rows.source import RowSource
from blt_titan.data.store.manifest import Counts, Manifest, write_manifest
from blt_titan.data.store.shards import ShardSet, ShardWriter, install
from blt_titan.patching.rule import PatchRule
from tests.helpers.layout_fields import fields_of

SHAPE = RowShape(segments=2, segment_bytes=32, segment_patches=10)
STREAMS = 12
ROWS_PER_BATCH = 2
PATCHER = TextPatcher(PatchRule("space", max_patch_bytes=16))


def write(directory: Path, documents: list[bytes]) -> None:
    """Write a data set whose train and validation splits both hold `documents`, in several shards."""
    directory.mkdir()
    splits = {}
    for split in ("train", "validation"):
        writer = ShardWriter(directory, split, record_batch_bytes=200, shard_bytes=4000)
        writer.add(pa.array(list(map(str, range(len(documents))))), pa.array(documents, pa.binary()))
        splits[split] = writer.finish()
        install(directory, splits[split])
    counts = Counts(2 * len(documents), 2 * sum(map(len, documents)), 0, 0, 0)
    write_manifest(directory, Manifest({}, counts, splits))


def random_documents(seed: int) -> list[bytes]:
    rng = np.random.default_rng(seed)
    sizes = [1, 2, 900, *rng.integers(1, 150, size=80).tolist()]
    return [bytes(rng.choice(np.frombuffer(b"abcdefgh  ,", np.uint8), size)) for size in sizes]


def loader_of(directory: Path, *, seed=0, streams=STREAMS, rows_per_batch=ROWS_PER_BATCH, **changes) -> RowLoader:
    shards = ShardSet(directory, "train")
    order = StreamOrder(len(shards), streams, seed)
    return RowLoader(RowSource(shards, PATCHER, SHAPE), order, rows_per_batch=rows_per_batch, **changes)


def take(loader: RowLoader, count: int) -> list[Batch]:
    return list(itertools.islice(loader, count))


def rows_of(batches: list[Batch]) -> torch.Tensor:
    """All fields of each row side by side, [rows, 6 S + 2 P]."""
    fields = [[batch.ids_BS, *fields_of(batch.layout).values(), batch.labels_BS] for batch in batches]
    return torch.cat([torch.cat(of_batch, dim=1) for of_batch in fields])


def interleaved(ranks: list[torch.Tensor], first_row: int = 0) -> torch.Tensor:
    """Rows of the ranks in the run's order, from a row of the run on: row n is rank n mod dp's."""
    first = first_row % len(ranks)
    return torch.stack([*ranks[first:], *ranks[:first]], dim=1).flatten(0, 1)


def merged(states: list[dict[str, Any]]) -> dict[str, Any]:
    """What `merge_positions` and a save over all ranks make of their states."""
    assert len({state["rows_served"] for state in states}) == 1
    table = np.stack([state["positions"] for state in states]).max(axis=0)
    return states[0] | {"positions": table}

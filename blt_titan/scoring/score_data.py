"""Score a data set: from shards and an entropy model to sidecars, a shard at a time, on any number of ranks.

Ranks share nothing but the directory. Rank r of R takes every R-th shard, if it is not done; whoever finishes the last
one completes the sidecar. A rank that is killed leaves a temporary file, and its shard is scored again.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from blt_titan.byte_vocab import BYTE_OFFSET
from blt_titan.checkpoint.description import identity
from blt_titan.checkpoint.digest import weights_digest
from blt_titan.data.rows.packing import frame_documents
from blt_titan.data.store.manifest import SPLITS, read_manifest
from blt_titan.data.store.shards import RecordBatch, ShardSet
from blt_titan.data.store.sidecars import (
    SidecarSettings,
    SidecarWriter,
    begin_sidecar,
    complete_sidecar,
    is_done,
    sidecar_directory,
    withdraw_sidecar,
)
from blt_titan.model.entropy_model import EntropyModel
from blt_titan.patching.rounding import Storage
from blt_titan.progress import ProgressBar
from blt_titan.scoring.entropies import EntropyScorer


@dataclass(frozen=True)
class ScoreSummary:
    """What one rank did."""

    shards: int
    text_bytes: int
    byte_slots: int
    """Computed, padding included."""
    complete: bool
    """Whether all shards are done now, by whichever rank."""


def sidecar_settings(model: EntropyModel, storage: Storage, compute_dtype: str) -> SidecarSettings:
    """Return what a sidecar is made with; `model` still in fp32."""
    digest = weights_digest({name: [parameter] for name, parameter in model.named_parameters()})
    return SidecarSettings(storage, identity(model.args), digest, compute_dtype)


def score_data(
    data: str | os.PathLike[str],
    name: str,
    scorer: EntropyScorer,
    settings: SidecarSettings,
    *,
    rank: int = 0,
    ranks: int = 1,
    verify: bool = False,
    observe: Callable[[np.ndarray, np.ndarray], None] | None = None,
    progress: bool = False,
) -> ScoreSummary:
    """Write the sidecar `name` of a data set, or go on with it.

    Args:
        data: a directory of byte shards.
        name: of the sidecar.
        scorer: of the model that `settings` describes.
        settings: from `sidecar_settings`.
        rank: this rank, from 0.
        ranks: ranks that share the work.
        verify: check every record batch of finished shards, and score damaged ones again.
        observe: is called with the ids of each record batch and their entropies as the model gives them, fp32.
        progress: show a progress bar.

    Raises:
        DataError: there is no data set, its text is damaged, or a sidecar of this name was made with other settings.
    """
    directory, manifest = sidecar_directory(data, name), read_manifest(data)
    begin_sidecar(data, name, settings)
    own = [(split, shard) for split in SPLITS for shard in manifest.splits[split]][rank::ranks]
    own = [
        (split, shard)
        for split, shard in own
        if not is_done(directory, shard, verify=settings.storage if verify else None)
    ]
    if own:
        withdraw_sidecar(data, name)
    n_bytes, before = 0, scorer.slots_run
    total = sum(shard.text_bytes for _, shard in own)
    with ProgressBar(total=total, unit="B", unit_scale=True, desc="scoring", disable=not progress) as bar:
        for split, shard in own:
            writer = SidecarWriter(directory, shard, settings.storage)
            try:
                requests = _requests(ShardSet(data, split, only=shard.file, manifest=manifest))
                for (batch, ids), entropies in scorer.score_all(requests):
                    writer.add(batch.batch_in_shard, entropies[ids >= BYTE_OFFSET], batch.crc32)
                    bar.update(len(batch.text))
                    if observe is not None:
                        observe(ids, entropies)
                writer.finish()
            except BaseException:
                writer.abandon()
                raise
            n_bytes += shard.text_bytes
    complete = complete_sidecar(data, name, settings)
    return ScoreSummary(len(own), n_bytes, scorer.slots_run - before, complete)


def _requests(shards: ShardSet) -> Iterator[tuple[tuple[RecordBatch, np.ndarray], np.ndarray]]:
    for batch in shards:
        ids, _ = frame_documents(batch.text, batch.offsets)
        yield (batch, ids), ids

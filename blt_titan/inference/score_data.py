"""Score a data set: from shards and an entropy model to sidecars, a shard at a time, on any number of ranks.

Ranks share nothing but the directory. Rank r of R takes every R-th shard that is not done; whoever finishes the last
one completes the sidecar. A rank that is killed leaves temporary files, and its shard is scored again.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate

import numpy as np
from tqdm import tqdm

from blt_titan.byte_vocab import BYTE_OFFSET
from blt_titan.data.entropies import (
    SIDECAR_NAME,
    SidecarSettings,
    SidecarWriter,
    Storage,
    begin_sidecar,
    complete_sidecar,
    is_done,
    sidecar_directory,
)
from blt_titan.data.manifest import SPLITS, ShardEntry, read_manifest
from blt_titan.data.packing import frame_documents
from blt_titan.data.shards import RecordBatch, ShardSet
from blt_titan.inference.entropies import EntropyScorer
from blt_titan.model.entropy_model import EntropyModel


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
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().float().numpy().tobytes())
    args = {key: value for key, value in asdict(model.args).items() if key not in ("init_seed", "attention_backend")}
    return SidecarSettings(storage, args, digest.hexdigest(), compute_dtype)


def score_data(
    data: str | os.PathLike[str],
    name: str,
    scorer: EntropyScorer,
    settings: SidecarSettings,
    *,
    rank: int = 0,
    ranks: int = 1,
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
        observe: is called with the ids of each record batch and their entropies as the model gives them, fp32.
        progress: show a progress bar.

    Raises:
        DataError: text is damaged, or a sidecar of this name was made with other settings.
    """
    if not begin_sidecar(data, name, settings):
        return ScoreSummary(0, 0, 0, complete=True)
    directory = sidecar_directory(data, name)
    splits = read_manifest(data).splits
    numbered = [(split, number) for split in SPLITS for number in range(len(splits[split]))]
    own = [(s, n) for s, n in numbered[rank::ranks] if not is_done(directory, splits[s][n])]
    if (directory / SIDECAR_NAME).exists():  # another rank has just completed it
        return ScoreSummary(0, 0, 0, complete=True)
    n_shards = n_bytes = 0
    before = scorer.slots_run
    total = sum(splits[s][n].text_bytes for s, n in own)
    with tqdm(total=total, unit="B", unit_scale=True, desc="scoring", disable=not progress) as bar:
        for split, number in own:
            shard = splits[split][number]
            writer = SidecarWriter(directory, shard, settings.storage)
            try:
                for (batch, ids), entropies in scorer.score_all(_requests(data, split, number, splits[split])):
                    writer.add(batch.batch_in_shard, entropies[ids >= BYTE_OFFSET], batch.crc32)
                    bar.update(len(batch.text))
                    if observe is not None:
                        observe(ids, entropies)
            except BaseException:
                writer.abandon()
                raise
            writer.finish()
            n_shards, n_bytes = n_shards + 1, n_bytes + shard.text_bytes
    return ScoreSummary(n_shards, n_bytes, scorer.slots_run - before, complete=complete_sidecar(data, name, settings))


def _requests(
    data: str | os.PathLike[str], split: str, number: int, shards: tuple[ShardEntry, ...]
) -> Iterator[tuple[tuple[RecordBatch, np.ndarray], np.ndarray]]:
    shard_set = ShardSet(data, split)
    first = [0, *accumulate(shard.record_batches for shard in shards)]
    for i in range(first[number], first[number + 1]):
        batch = shard_set.read(i)
        ids, _ = frame_documents(batch.text, batch.offsets)
        yield (batch, ids), ids

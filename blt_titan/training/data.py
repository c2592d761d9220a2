"""The data of a run: from the sections of its settings to shards, their order, their entropies, and rows."""

from pathlib import Path

from blt_titan.data.rows.mixture import MixtureOrder, ShardSets, mixture_order
from blt_titan.data.rows.order import StreamOrder
from blt_titan.data.rows.packing import RowShape
from blt_titan.data.rows.patcher import EntropyPatcher, TextPatcher
from blt_titan.data.rows.source import RowSource
from blt_titan.data.store.object_store import Fetching
from blt_titan.data.store.shards import ShardSet
from blt_titan.data.store.sidecars import EntropySidecar, EntropySidecars
from blt_titan.job_config import Data, Patching
from blt_titan.patching.rule import PatchRule
from blt_titan.scoring.online import OnlineEntropies, Share, online_entropies, online_model
from blt_titan.titan import Training, device_type


def dataset_paths(data: Data, training: Training) -> list[str]:
    """Return the directories of a run's byte shards; empty if the settings name none."""
    return list(data.mixture) or [path for path in (training.dataset_path,) if path is not None]


def fetching_of(data: Data, timeout_s: float | None = None) -> Fetching:
    """Return how a run reads object stores.

    Args:
        data: the settings.
        timeout_s: how long its ranks ask a store, see `fetch_timeout_s`; None where no rank waits for another.
    """
    where = {} if data.cache_dir is None else {"cache_dir": Path(data.cache_dir)}
    return Fetching(
        cache_bytes=data.cache_bytes, timeout_s=timeout_s or data.fetch_timeout_s or Fetching.timeout_s, **where
    )


def open_shards(paths: list[str], split: str, fetching: Fetching) -> ShardSets:
    """Open one split of the data in some directories, here or in an object store.

    Raises:
        DataError: a directory is missing or damaged, or has no such split.
    """
    return ShardSets([ShardSet(path, split, fetching=fetching) for path in paths])


def stream_order(data: Data, shards: ShardSets) -> StreamOrder | MixtureOrder:
    """Return the order of a run's training data.

    Raises:
        DataError: the weights of a mixture cannot be had.
    """
    if not data.mixture:
        return StreamOrder(len(shards), data.streams, data.seed)
    return mixture_order(shards, list(data.mixture.values()), streams=data.streams, seed=data.seed)


def open_sidecars(paths: list[str], name: str, shards: ShardSets) -> EntropySidecars:
    """Open the sidecars called `name` in each of the directories that `shards` was opened from.

    Raises:
        DataError: a sidecar is missing, incomplete or of another text.
    """
    return EntropySidecars([EntropySidecar(path, name, s) for path, s in zip(paths, shards.sets, strict=True)])


def row_source(
    data: Data,
    training: Training,
    patching: Patching,
    split: str,
    *,
    seq_len: int,
    share: Share | None = None,
    fetching: Fetching | None = None,
) -> RowSource:
    """Return what makes the rows of one split.

    Args:
        data: where the rows come from, and their segments.
        training: names the directory if `data` has no mixture.
        patching: where patches begin.
        split: `train` or `validation`.
        seq_len: byte slots of a row.
        share: gives entropies that are made while training to all ranks that read the same rows.
        fetching: how object stores are read; None where no rank waits for another.

    Raises:
        DataError: the data or its entropies are missing or damaged.
        CheckpointError: the entropy model of `patching.source = "online"` cannot be loaded.
    """
    shape = RowShape(seq_len // data.segment_bytes, data.segment_bytes, data.segment_patches)
    paths, rule = dataset_paths(data, training), PatchRule.of(patching)
    shards = open_shards(paths, split, fetching or fetching_of(data))
    ahead = data.fetch_ahead if shards.is_remote else 0
    if not rule.by_entropy:
        return RowSource(shards, TextPatcher(rule), shape, ahead)
    entropies: EntropySidecars | OnlineEntropies
    if patching.source == "sidecar":
        entropies = open_sidecars(paths, patching.sidecar, shards)
    else:
        assert patching.entropy_checkpoint is not None, "checked with the settings"
        entropies = online_entropies(patching.entropy_checkpoint, device=device_type, share=share)
    return RowSource(shards, EntropyPatcher(rule, entropies), shape, ahead)


def entropies_fingerprint(patching: Patching, paths: list[str], shards: ShardSets) -> str | None:
    """Return the fingerprint of the entropy model that a run's patches come from; None if they need none.

    Raises:
        DataError: a sidecar is missing, incomplete or of another text.
        CheckpointError: the entropy model cannot be loaded.
    """
    if not PatchRule.of(patching).by_entropy:
        return None
    if patching.source == "sidecar":
        return open_sidecars(paths, patching.sidecar, shards).fingerprint
    assert patching.entropy_checkpoint is not None, "checked with the settings"
    return online_model(patching.entropy_checkpoint)[1]
